"""Compare captions per second with transformers' `generate`, on the same weights in one run.

    python -m benchmarks.decoder [--language-model opt|t5] [--repeats 5] [--threads 2] [--out FILE]

Random weights in bfloat16: ViT 768 x 12 at 224/14, Q-Former of BERT-base's size with 32 queries, OPT of 125M
or T5 of base size; 5 beams and 20 new tokens by default. Every text has its full length, so both sides do the
same work. The sides take turns; the report contains medians of pairwise ratios. `generate` runs with the
attention that is faster, which is measured first. It keeps its Q-Former in float32; --qformer sets the dtype
of ours. LD_PRELOAD sets the allocator of both sides.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import Blip2ForConditionalGeneration

from benchmarks.random_checkpoint import IMAGE_TOKEN, NUM_QUERY_TOKENS, make_checkpoint
from benchmarks.reporting import describe_allocator, spread_of
from model import Blip2, DecodeRequest, GenerationParams, MemoryRequirement
from model.checkpoints import LoadOptions
from model.generation import run_requests

PROMPT = "w7 w8 w9"
NUM_TOGETHER = 16
TRANSFORMERS_BATCH = 16
NUM_MIXED = 32

Run = Callable[[Sequence["Request"], Tensor], object]


@dataclass(frozen=True, slots=True)
class Request:
    """Parameters of one caption; image: index into the pixel values."""

    image: int
    num_tokens: int = 20
    num_beams: int = 5


@dataclass(frozen=True, slots=True)
class Stages:
    """Seconds of each stage of one run."""

    vision: float
    qformer: float
    language: float


class ThisProject:
    """This project: images are encoded in one batch, and texts are decoded with continuous batching."""

    def __init__(self, directory: Path, qformer_dtype: torch.dtype) -> None:
        self._blip2 = Blip2.from_pretrained(str(directory), LoadOptions(dtype=torch.bfloat16))
        self._blip2.pack(qformer_dtype)
        self.language_model = self._blip2.require_language_model()

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], pixels: Tensor) -> Stages:
        started = time.perf_counter()
        image_features = self._blip2.encode_images(pixels[[request.image for request in requests]])
        encoded = time.perf_counter()
        inputs = self._blip2.project_queries(self._blip2.encode_queries(image_features))
        projected = time.perf_counter()
        self._generate(requests, inputs)
        return Stages(encoded - started, projected - encoded, time.perf_counter() - projected)

    def kv_bytes(self, requests: Sequence[Request]) -> int:
        """Compute the maximal size of the KV cache of these requests, in bytes."""
        num_prefix_tokens = NUM_QUERY_TOKENS + len(self.language_model.tokenize(PROMPT))
        return self.language_model.kv_bytes(
            [
                MemoryRequirement(num_prefix_tokens, request.num_beams, request.num_tokens)
                for request in requests
            ]
        )

    def _generate(self, requests: Sequence[Request], inputs: Tensor) -> None:
        prompt_ids = self.language_model.tokenize(PROMPT)
        decode_requests = [
            DecodeRequest(
                one,
                prompt_ids,
                GenerationParams(
                    num_beams=request.num_beams,
                    max_new_tokens=request.num_tokens,
                    min_new_tokens=request.num_tokens,
                ),
            )
            for one, request in zip(inputs, requests, strict=True)
        ]
        for request, (answer, *_) in zip(
            requests, run_requests(self.language_model, decode_requests), strict=True
        ):
            assert answer.num_tokens == request.num_tokens


class Transformers:
    """`generate` of transformers; the requests of a call are one batch, as long as its longest text."""

    def __init__(self, directory: Path, prompt_ids: Sequence[int], attention: str) -> None:
        self._model = Blip2ForConditionalGeneration.from_pretrained(
            directory, dtype=torch.bfloat16, attn_implementation=attention
        ).eval()
        self._input_ids = torch.tensor([[IMAGE_TOKEN] * NUM_QUERY_TOKENS + list(prompt_ids)])

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], pixels: Tensor) -> None:
        num_tokens = max(request.num_tokens for request in requests)
        input_ids = self._input_ids.expand(len(requests), -1)
        self._model.generate(
            pixel_values=pixels[[request.image for request in requests]].to(torch.bfloat16),
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            num_beams=requests[0].num_beams,
            do_sample=False,
            max_new_tokens=num_tokens,
            min_new_tokens=num_tokens,
        )

    def run_one_by_one(self, requests: Sequence[Request], pixels: Tensor) -> None:
        for request in requests:
            self.run([request], pixels)

    def run_grouped(self, requests: Sequence[Request], pixels: Tensor) -> None:
        """Group the requests by number of beams, and sort each group by length."""
        for num_beams in sorted({request.num_beams for request in requests}):
            group = [request for request in requests if request.num_beams == num_beams]
            group.sort(key=lambda request: request.num_tokens)
            for start in range(0, len(group), TRANSFORMERS_BATCH):
                self.run(group[start : start + TRANSFORMERS_BATCH], pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description="Captions per second beside transformers' generate.")
    parser.add_argument("--language-model", choices=["opt", "t5"], default="opt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--qformer", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--growth", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), arguments.language_model)
        lines = list(_report(Path(folder), arguments))
    text = "\n".join(lines) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


def _report(directory: Path, arguments: argparse.Namespace) -> Iterator[str]:
    ours = ThisProject(directory, getattr(torch, arguments.qformer))
    pixels = torch.randn(64, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    attention, theirs = _build_fastest(directory, ours, pixels)
    yield from _heading(arguments, attention)
    cases: list[tuple[str, Sequence[Request], Run]] = [
        ("1 image", [Request(0)], theirs.run),
        (f"{NUM_TOGETHER} images; generate one by one", _uniform_load(), theirs.run_one_by_one),
        (f"{NUM_TOGETHER} images; generate in one batch", _uniform_load(), theirs.run),
        (
            f"{NUM_MIXED} images, 3 to 30 tokens, 1 or 5 beams; generate in sorted groups",
            _mixed_load(),
            theirs.run_grouped,
        ),
    ]
    for name, requests, run in cases:
        pairs = [
            (_seconds(partial(ours.run, requests, pixels)), _seconds(partial(run, requests, pixels)))
            for _ in range(arguments.repeats + 1)
        ][1:]  # the first pair warms up
        our_median_s, their_median_s = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = spread_of(our_s / their_s for our_s, their_s in pairs)
        yield _emit(f"| {name} | {our_median_s:.2f} | {their_median_s:.2f} | {ratio} |")
    yield _emit("")
    yield from _scaling(ours, pixels, arguments)


def _build_fastest(directory: Path, ours: ThisProject, pixels: Tensor) -> tuple[str, Transformers]:
    """Build transformers' model with the attention that is faster in `generate`; return its name too."""
    prompt_ids = ours.language_model.tokenize(PROMPT)
    models = {name: Transformers(directory, prompt_ids, name) for name in ("sdpa", "eager")}
    seconds = {
        name: _median_s(partial(model.run, _uniform_load(), pixels), 2) for name, model in models.items()
    }
    fastest = min(seconds, key=lambda name: seconds[name])
    return fastest, models[fastest]


def _heading(arguments: argparse.Namespace, attention: str) -> Iterator[str]:
    options = {
        "language-model": arguments.language_model,
        "repeats": arguments.repeats,
        "qformer": arguments.qformer,
    }
    command = " ".join(f"--{name} {value}" for name, value in options.items())
    yield _emit(f"# The decoder compared with transformers' generate: {arguments.language_model}")
    yield _emit("")
    yield _emit(
        f"`python -m benchmarks.decoder {command}`, torch {torch.__version__}, bfloat16, {arguments.threads} "
        f"threads, allocator {describe_allocator()}; generate with {attention} attention. Seconds are "
        "medians, ratios medians of pairs (least, most)."
    )
    yield _emit("")
    yield _emit("| load | this project, s | generate, s | this project / generate |")
    yield _emit("|---|---|---|---|")


def _scaling(ours: ThisProject, pixels: Tensor, arguments: argparse.Namespace) -> Iterator[str]:
    yield _emit(
        "| images in one batch | s | captions per second | vision | Q-Former | language model "
        "| maximal KV cache per image, MiB |"
    )
    yield _emit("|---|---|---|---|---|---|---|")
    for count in arguments.growth:
        requests = [Request(image) for image in range(count)]
        runs = [ours.run(requests, pixels) for _ in range(max(1, arguments.repeats // 2))]
        stages = [statistics.median(stage) for stage in zip(*map(astuple, runs), strict=True)]
        seconds = sum(stages)
        shares = " | ".join(f"{stage / seconds:.0%}" for stage in stages)
        mebibytes = ours.kv_bytes(requests) / count / 2**20
        yield _emit(f"| {count} | {seconds:.2f} | {count / seconds:.2f} | {shares} | {mebibytes:.1f} |")


def _uniform_load() -> list[Request]:
    return [Request(image) for image in range(NUM_TOGETHER)]


def _mixed_load() -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(image, num_tokens=int(rng.integers(3, 31)), num_beams=int(rng.choice([1, 5])))
        for image in range(NUM_MIXED)
    ]


def _median_s(work: Callable[[], object], repeats: int) -> float:
    return statistics.median(_seconds(work) for _ in range(repeats))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _emit(line: str) -> str:
    """Print a line of the report, and return it."""
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
