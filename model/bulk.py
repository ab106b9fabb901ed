"""Bulk tasks: captions, answers and matches of many images as JSON lines.

An interrupted run can be continued.
"""

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from model.blip2 import Blip2
from model.errors import ModelError, NonFiniteError
from model.generation import DecodeRequest, Generation, GenerationParams, run_requests
from model.images.decoding import decode_image
from model.images.header import find_warnings, sniff_format

SUFFIXES = frozenset({
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".mpo", ".webp", ".gif", ".tif", ".tiff",
    ".bmp", ".dib", ".avif", ".avifs", ".heic", ".heics", ".heif", ".heifs", ".hif",
    ".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".jph", ".jhc",
})  # fmt: skip
_MAX_REQUESTS = 32  # decoded together
_MAX_PAIRS = 32  # of image and text, matched together
_RECORD_START = b'{"image": '
_SIGNATURE_BYTES = 64
_log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BulkTask:
    """A task for every image.

    run: maps [B, P, V] image features to the results of each image. query: model, prompt and parameters, as
    they stand in every record.
    """

    run: Callable[[Tensor], list[dict[str, Any]]]
    query: dict[str, Any]


def find_images(paths: Sequence[Path]) -> list[Path]:
    """Return the given files, and the images below given directories in order of name.

    Hidden files and those in hidden directories are no images there. A file without a suffix is one by its
    first bytes. Raises ModelError where a path is absent, or a directory holds no images.
    """
    images: list[Path] = []
    for path in paths:
        if not path.exists():
            raise ModelError(f"{path} is not there; name image files, or directories of them")
        if not path.is_dir():
            images.append(path)
            continue
        found: list[Path] = []
        others: list[Path] = []
        for each in sorted(path.rglob("*")):
            is_hidden = any(part.startswith(".") for part in each.relative_to(path).parts)
            if not (is_hidden or each.is_dir()):
                (found if _is_image(each) else others).append(each)
        if not found:
            raise ModelError(
                f"{path} holds no images ({', '.join(sorted(SUFFIXES))}); name another directory"
            )
        if others:
            _log.warning("%s: left out %d files that are no images, as %s", path, len(others), others[0].name)
        images += found
    return list(dict.fromkeys(images))


def _is_image(path: Path) -> bool:
    if path.suffix or not path.is_file():
        return path.suffix.lower() in SUFFIXES
    with path.open("rb") as file:
        try:
            sniff_format(file.read(_SIGNATURE_BYTES))
        except ModelError:
            return False
    return True


def build_captioning(blip2: Blip2, prompt: str | None, params: GenerationParams) -> BulkTask:
    """Build the task of captioning: `params.num_return_sequences` captions of each image, best first."""
    language_model = blip2.require_language_model()
    prompt = blip2.prompts.caption_prompt() if prompt is None else prompt
    prompt_ids = language_model.tokenize(prompt)

    def run(image_features: Tensor) -> list[dict[str, Any]]:
        (query_output,) = blip2.encode_questions(image_features, [prompt])
        inputs = blip2.project_queries(query_output)  # [B, Q, L]
        requests = [DecodeRequest(each, prompt_ids, params) for each in inputs]
        return [
            {"captions": [{"text": one.text, "score": one.score} for one in captions]}
            for captions in run_requests(language_model, requests)
        ]

    return BulkTask(run, {"model": blip2.name, "prompt": prompt, "num_beams": params.num_beams})


def build_answering(blip2: Blip2, questions: Sequence[str], params: GenerationParams) -> BulkTask:
    """Build the task of answering every question about each image, in the checkpoint's question prompt."""
    language_model = blip2.require_language_model()
    prompts = [language_model.tokenize(blip2.prompts.question_prompt(question)) for question in questions]

    def run(image_features: Tensor) -> list[dict[str, Any]]:
        outputs = blip2.encode_questions(image_features, questions)
        inputs = torch.stack([blip2.project_queries(output) for output in outputs], dim=1)  # [B, M, Q, L]
        requests = [
            DecodeRequest(each, prompt_ids, params)
            for image_inputs in inputs
            for each, prompt_ids in zip(image_inputs, prompts, strict=True)
        ]
        batches = (run_requests(language_model, batch) for batch in _batches(requests, _MAX_REQUESTS))
        answers: Iterator[Generation] = (generations[0] for batch in batches for generations in batch)
        return [
            {"answers": [{"answer": one.text, "score": one.score} for one in islice(answers, len(questions))]}
            for _ in inputs
        ]

    return BulkTask(run, {"model": blip2.name, "questions": list(questions), "num_beams": params.num_beams})


def build_matching(blip2: Blip2, texts: Sequence[str]) -> BulkTask:
    """Build the task of matching: cosine (ITC) and match probability (ITM) of every text and image."""
    matcher = blip2.require_matcher()
    input_ids, attention_mask = matcher.tokenize(texts)
    chunks = torch.split(torch.arange(len(texts)), _MAX_PAIRS)
    with torch.inference_mode():
        text_embeds = torch.cat(
            [matcher.text_embeds(input_ids[rows], attention_mask[rows]) for rows in chunks]
        )

    def run(image_features: Tensor) -> list[dict[str, Any]]:
        cosines = matcher.itc_scores(matcher.embed_images(image_features), text_embeds)  # [B, M]
        results = []
        for features, row in zip(image_features, cosines.tolist(), strict=True):
            probabilities: list[float] = []
            for rows in chunks:
                pairs = features.expand(len(rows), -1, -1)
                logits = matcher.match_logits(pairs, input_ids[rows], attention_mask[rows])
                probabilities += logits.softmax(dim=1)[:, 1].tolist()
            scores = zip(row, probabilities, strict=True)
            results.append({"matches": [{"itc": itc, "itm_probability": itm} for itc, itm in scores]})
        return results

    return BulkTask(run, {"model": blip2.name, "texts": list(texts)})


def run_bulk(
    blip2: Blip2, images: Sequence[Path], task: BulkTask, out: Path, *, batch_size: int = 8
) -> tuple[int, int]:
    """Write one JSON record for each image that has none in `out` yet.

    Returns the number of written records, and the number of all records with an error.

    A record is {"image": path} with the query and the results, or with "error" where the file is unreadable
    or a score is not finite; "warnings" tell of a file that is damaged, but read. A batch is written as a
    whole and flushed, so that an interrupted run can be continued; an incomplete last line is cut off first.
    Raises ModelError where the records in `out` belong to another query, and NonFiniteError for a score that
    is not finite before any image has its results.
    """
    has_error = _read_finished(out, task.query)
    pending = [path for path in images if str(path) not in has_error]
    num_errors = sum(has_error.values())
    has_worked = num_errors < len(has_error)
    with out.open("a", encoding="utf-8") as file, tqdm(total=len(pending), unit="image") as progress:
        for paths in _batches(pending, batch_size):
            records, not_finite = _run_batch(blip2, paths, task)
            num_batch_errors = sum("error" in record for record in records)
            has_worked = has_worked or num_batch_errors < len(records)
            if not_finite is not None and not has_worked:  # the weights, not an image
                raise not_finite
            num_errors += num_batch_errors
            file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
            file.flush()
            progress.update(len(paths))
    return len(pending), num_errors


@torch.inference_mode()
def _run_batch(
    blip2: Blip2, paths: Sequence[Path], task: BulkTask
) -> tuple[list[dict[str, Any]], NonFiniteError | None]:
    """Return the record of each image, and the error of the last one whose scores are not finite."""
    pixels: dict[Path, Tensor] = {}
    outcomes: dict[Path, dict[str, Any]] = {}  # results and warnings, or an error
    for path in paths:
        try:
            data = path.read_bytes()
            pixels[path] = blip2.preprocess(decode_image(data, blip2.preprocess.image_size))
            outcomes[path] = {"warnings": warnings} if (warnings := list(find_warnings(data))) else {}
        except (ModelError, OSError, MemoryError) as error:
            outcomes[path] = {"error": str(error)}
    results = task.run(blip2.encode_images(torch.stack(list(pixels.values())))) if pixels else []
    not_finite = None
    for path, result in zip(pixels, results, strict=True):
        if _is_finite(result):
            outcomes[path] = result | outcomes[path]
        else:
            not_finite = NonFiniteError(str(path))
            outcomes[path] = {"error": str(not_finite)}
    records = [{"image": str(path), **task.query, **outcomes[path]} for path in paths]
    return records, not_finite


def _is_finite(result: dict[str, Any]) -> bool:
    try:
        json.dumps(result, allow_nan=False)
    except ValueError:
        return False
    return True


def _read_finished(out: Path, query: dict[str, Any]) -> dict[str, bool]:
    """Return the images with a record and whether it is an error; cut off an incomplete last line."""
    if not out.exists():
        return {}
    content = out.read_bytes()
    complete = content[: content.rfind(b"\n") + 1]
    incomplete = content[len(complete) :]
    try:
        if not (incomplete.startswith(_RECORD_START) or _RECORD_START.startswith(incomplete)):
            raise ValueError(f"the last line begins with {incomplete[:20]!r}")
        records = [json.loads(line) for line in complete.splitlines()]
        has_error = {str(record["image"]): "error" in record for record in records}
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{out} holds lines that this command did not write ({error!r}); name another file"
        ) from error
    for record in records:
        if any(record.get(key) != value for key, value in query.items()):
            raise ModelError(f"{out} holds answers to something else than {query}; name another file")
    if incomplete:
        with out.open("r+b") as file:
            file.truncate(len(complete))
    return has_error


def _batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while batch := list(islice(iterator, size)):
        yield batch
