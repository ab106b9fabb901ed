"""Captions, answers and matches of many images, written line by line; a run that was cut off goes on."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from model.blip2 import Blip2
from model.errors import InvalidPixelsError, ModelError, TaskUnavailableError
from model.generation import DecodeJob, GenerationParams, run_jobs
from model.matching import Matcher
from model.preprocess import DAMAGE, make_upright

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp"})
_MAX_JOBS = 32  # texts that are written at once
_MAX_PAIRS = 32  # images and texts that are matched at once
_LINE_START = b'{"image": '
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Work:
    """What is asked of every image.

    run: turns [B, P, V] image features into what is said of each. asked: what was asked, as it stands in
    every line.
    """

    run: Callable[[Tensor], list[dict[str, Any]]]
    asked: dict[str, Any]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Gives files as they are named, and the images below directories in order of name.

    Raises ModelError where a path is not there.
    """
    found: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ModelError(f"{path} is not there; name image files, or directories of them")
        below = sorted(each for each in path.rglob("*") if each.suffix.lower() in SUFFIXES)
        if path.is_dir() and not below:
            raise ModelError(
                f"{path} holds no images ({', '.join(sorted(SUFFIXES))}); name another directory"
            )
        found += below if path.is_dir() else [path]
    return list(dict.fromkeys(found))


def caption_work(blip2: Blip2, prompt: str | None, params: GenerationParams) -> Work:
    """Says what `params.num_return_sequences` captions each image has, best first."""
    language_model = blip2.require_language_model()
    prompt = blip2.prompts.caption_prompt() if prompt is None else prompt
    prompt_ids = language_model.tokenize(prompt)

    def work(image_features: Tensor) -> list[dict[str, Any]]:
        (query_output,) = blip2.encode_for_each(image_features, [prompt])
        inputs = blip2.project_queries(query_output)
        answers = run_jobs(language_model, [DecodeJob(each, prompt_ids, params) for each in inputs])
        return [
            {"captions": [{"text": one.text, "score": one.score} for one in captions]} for captions in answers
        ]

    return Work(work, {"model": blip2.name, "prompt": prompt, "num_beams": params.num_beams})


def answer_work(blip2: Blip2, questions: Sequence[str], params: GenerationParams) -> Work:
    """Answers every question about each image, in the prompt that the language model answers best to."""
    language_model = blip2.require_language_model()
    prompts = [language_model.tokenize(blip2.prompts.question_prompt(question)) for question in questions]

    def work(image_features: Tensor) -> list[dict[str, Any]]:
        outputs = blip2.encode_for_each(image_features, questions)
        inputs = torch.stack([blip2.project_queries(output) for output in outputs], dim=1)  # [B, M, Q, L]
        jobs = [
            DecodeJob(each, prompt_ids, params)
            for of_image in inputs
            for each, prompt_ids in zip(of_image, prompts, strict=True)
        ]
        said = (run_jobs(language_model, some) for some in _batches(jobs, _MAX_JOBS))
        best = (answers[0] for some in said for answers in some)
        return [
            {"answers": [{"answer": one.text, "score": one.score} for one in islice(best, len(questions))]}
            for _ in inputs
        ]

    return Work(work, {"model": blip2.name, "questions": list(questions), "num_beams": params.num_beams})


def match_work(blip2: Blip2, texts: Sequence[str]) -> Work:
    """Scores every text against each image: cosine (ITC), and the probability that they belong together."""
    if blip2.matcher is None:
        raise TaskUnavailableError(
            f"the checkpoint {blip2.name!r} has no ITC and ITM heads; load one with them"
        )
    matcher: Matcher = blip2.matcher
    input_ids, attention_mask = matcher.tokenize(texts)
    with torch.inference_mode():
        text_embeds = torch.cat(
            [
                matcher.text_embeds(input_ids[rows], attention_mask[rows])
                for rows in torch.split(torch.arange(len(texts)), _MAX_PAIRS)
            ]
        )

    def work(image_features: Tensor) -> list[dict[str, Any]]:
        image_embeds = matcher.image_embeds(matcher.encode_image_queries(image_features).query_output)
        cosines = matcher.itc_scores(image_embeds, text_embeds)  # [B, M]
        found = []
        for features, row in zip(image_features, cosines.tolist(), strict=True):
            probabilities: list[float] = []
            for rows in torch.split(torch.arange(len(texts)), _MAX_PAIRS):
                pairs = features.expand(len(rows), -1, -1)
                logits = matcher.match_logits(pairs, input_ids[rows], attention_mask[rows])
                probabilities += logits.softmax(dim=1)[:, 1].tolist()
            scored = zip(row, probabilities, strict=True)
            found.append({"matches": [{"itc": itc, "itm_probability": itm} for itc, itm in scored]})
        return found

    return Work(work, {"model": blip2.name, "texts": list(texts)})


def run_bulk(
    blip2: Blip2, images: Sequence[Path], work: Work, out: Path, *, batch_size: int = 8
) -> tuple[int, int]:
    """Writes one JSON line for each image that `out` has no line of yet.

    Gives how many, and how many of all its lines tell of an image that cannot be read.

    A line is {"image": path} with what was asked and what is said, or with "error" where the file cannot be
    read. A batch is written as a whole and flushed, so that a run cut off at any moment goes on
    where it stopped; half a line at the end is taken away first. Raises ModelError where the lines that are
    there answer something else.
    """
    done = _lines_of(out, work.asked)
    todo = [path for path in images if str(path) not in done]
    failed = sum(done.values())
    with out.open("a", encoding="utf-8") as file, tqdm(total=len(todo), unit="image") as progress:
        for paths in _batches(todo, batch_size):
            lines = _run_batch(blip2, paths, work)
            failed += sum("error" in line for line in lines)
            file.writelines(json.dumps(line) + "\n" for line in lines)
            file.flush()
            progress.update(len(paths))
    return len(todo), failed


@torch.inference_mode()
def _run_batch(blip2: Blip2, paths: Sequence[Path], work: Work) -> list[dict[str, Any]]:
    pixels: dict[Path, Tensor] = {}
    errors: dict[Path, str] = {}
    for path in paths:
        try:
            with Image.open(path) as image:
                pixels[path] = blip2.preprocess(make_upright(image))
        except (*DAMAGE, InvalidPixelsError, Image.DecompressionBombError) as error:
            errors[path] = str(error)
    said = iter(work.run(blip2.encode_images(torch.stack(list(pixels.values())))) if pixels else ())
    return [
        {"image": str(path), **work.asked, **({"error": errors[path]} if path in errors else next(said))}
        for path in paths
    ]


def _lines_of(out: Path, asked: dict[str, Any]) -> dict[str, bool]:
    """Gives the images that have a line, and whether it tells of an error; cuts off half a line."""
    if not out.exists():
        return {}
    content = out.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    tail = content[len(whole) :]
    try:
        if not (tail.startswith(_LINE_START) or _LINE_START.startswith(tail)):
            raise ValueError(f"the last line begins with {tail[:20]!r}")
        lines = [json.loads(line) for line in whole.splitlines()]
        images = {str(line["image"]): "error" in line for line in lines}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{out} holds lines that this command did not write ({error!r}); name another file"
        ) from error
    for line in lines:
        if any(line.get(key) != value for key, value in asked.items()):
            raise ModelError(f"{out} holds answers to something else than {asked}; name another file")
    if tail:
        with out.open("r+b") as file:
            file.truncate(len(whole))
    return images


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
