"""Captions per second, here and by transformers' `generate`, on the same weights in one run.

    python -m benchmarks.decoder [--language-model opt|t5] [--repeats 5] [--threads 2] [--out FILE]

Random weights in bfloat16: ViT 768 x 12 at 224/14, Q-Former of BERT-base's size with 32 queries, OPT of 125M
or T5 of base size; beams 5, 20 new tokens unless said. Every answer has its full length, so both sides do the
same work. The sides take turns; ratios are made pair by pair, and medians are given. `generate` runs with the
attention that is faster for it, found first; it keeps its Q-Former in float32, ours is in the type of
--qformer. Set an allocator for both sides, by LD_PRELOAD, or for neither.
"""

import argparse
import os
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
from model import Blip2, DecodeJob, GenerationParams
from model.checkpoints import LoadOptions
from model.decoding import run_jobs
from model.language import Extent

PROMPT = "w7 w8 w9"
NUM_TOGETHER = 16
PEER_BATCH = 16
NUM_MIXED = 32


@dataclass(frozen=True, slots=True)
class Request:
    """One image, asked for so many tokens with so many beams."""

    image: int
    num_tokens: int = 20
    num_beams: int = 5


@dataclass(frozen=True, slots=True)
class Stages:
    """Where the time of one run went, in seconds."""

    vision: float
    qformer: float
    language: float


class Ours:
    """This project: images encoded together, texts advanced together."""

    def __init__(self, directory: Path, qformer_dtype: torch.dtype) -> None:
        self._blip2 = Blip2.from_pretrained(str(directory), LoadOptions(dtype=torch.bfloat16))
        self._blip2.pack(qformer_dtype)
        self.language_model = self._blip2.require_language_model()

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], pixels: Tensor) -> Stages:
        started = time.perf_counter()
        image_features = self._blip2.encode_images(pixels[[request.image for request in requests]])
        seen = time.perf_counter()
        inputs = self._blip2.project_queries(self._blip2.encode_queries(image_features))
        queried = time.perf_counter()
        self._answer(requests, inputs)
        return Stages(seen - started, queried - seen, time.perf_counter() - queried)

    def kv_bytes(self, requests: Sequence[Request]) -> int:
        """Gives the most that keys and values of these requests take together."""
        num_prefix_tokens = NUM_QUERY_TOKENS + len(self.language_model.tokenize(PROMPT))
        return self.language_model.build_state().num_bytes(
            [Extent(num_prefix_tokens, request.num_beams, request.num_tokens) for request in requests]
        )

    def _answer(self, requests: Sequence[Request], inputs: Tensor) -> None:
        prompt_ids = self.language_model.tokenize(PROMPT)
        jobs = [
            DecodeJob(
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
        for request, (answer, *_) in zip(requests, run_jobs(self.language_model, jobs), strict=True):
            assert answer.num_tokens == request.num_tokens


class Peer:
    """`generate` of transformers; all requests of a call are one batch, which runs as long as its longest."""

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
        """As a careful user batches a mixed load: by beams, sorted by length."""
        for num_beams in sorted({request.num_beams for request in requests}):
            group = [request for request in requests if request.num_beams == num_beams]
            group.sort(key=lambda request: request.num_tokens)
            for start in range(0, len(group), PEER_BATCH):
                self.run(group[start : start + PEER_BATCH], pixels)


def main() -> None:
    parser = argparse.ArgumentParser(description="Captions per second beside transformers' generate.")
    parser.add_argument("--language-model", choices=["opt", "t5"], default="opt")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--qformer", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--growth", type=int, nargs="*", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--out", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        make_checkpoint(Path(folder), arguments.language_model)
        lines = list(_report(Path(folder), arguments))
    text = "\n".join(lines) + "\n"
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


def _report(directory: Path, arguments: argparse.Namespace) -> Iterator[str]:
    ours = Ours(directory, getattr(torch, arguments.qformer))
    pixels = torch.randn(64, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    peers = {name: Peer(directory, ours.language_model.tokenize(PROMPT), name) for name in ("sdpa", "eager")}
    one, together = [Request(0)], [Request(at) for at in range(NUM_TOGETHER)]
    chosen = {name: _median_s(partial(peer.run, together, pixels), 2) for name, peer in peers.items()}
    best = min(chosen, key=lambda name: chosen[name])
    peer = peers.pop(best)
    peers.clear()
    mixed = _mixed_load()
    command = " ".join(
        f"--{name} {value}"
        for name, value in (
            ("language-model", arguments.language_model),
            ("repeats", arguments.repeats),
            ("qformer", arguments.qformer),
        )
    )
    allocator = Path(os.environ["LD_PRELOAD"]).name if "LD_PRELOAD" in os.environ else "glibc's"
    yield _say(f"# The decoder beside transformers' generate: {arguments.language_model}")
    yield _say("")
    yield _say(
        f"`python -m benchmarks.decoder {command}`, torch {torch.__version__}, bfloat16, {arguments.threads} "
        f"threads, allocator {allocator}; generate with {best} attention. Seconds are medians, ratios "
        "medians of pairs (least, most)."
    )
    yield _say("")
    yield _say("| load | this project, s | generate, s | our time / its time |")
    yield _say("|---|---|---|---|")
    cases: list[tuple[str, Sequence[Request], Callable[[Sequence[Request], Tensor], object]]] = [
        ("one image alone", one, peer.run),
        (f"{NUM_TOGETHER} together; it one by one", together, peer.run_one_by_one),
        (f"{NUM_TOGETHER} together; it in one batch", together, peer.run),
        (f"{NUM_MIXED} mixed, 3 to 30 tokens, beams 1 and 5; it grouped and sorted", mixed, peer.run_grouped),
    ]
    for name, requests, run_peer in cases:
        pairs = [
            (_seconds(partial(ours.run, requests, pixels)), _seconds(partial(run_peer, requests, pixels)))
            for _ in range(arguments.repeats + 1)
        ][1:]  # the first warms up
        ratios = [our_s / its_s for our_s, its_s in pairs]
        ours_s, its_s = (statistics.median(side) for side in zip(*pairs, strict=True))
        yield _say(
            f"| {name} | {ours_s:.2f} | {its_s:.2f} "
            f"| {statistics.median(ratios):.2f} ({min(ratios):.2f}, {max(ratios):.2f}) |"
        )
    yield _say("")
    yield from _growth(ours, pixels, arguments)


def _growth(ours: Ours, pixels: Tensor, arguments: argparse.Namespace) -> Iterator[str]:
    yield _say(
        "| images together | s | captions per second | vision | Q-Former | language model "
        "| keys and values of each at most, MiB |"
    )
    yield _say("|---|---|---|---|---|---|---|")
    for count in arguments.growth:
        requests = [Request(at) for at in range(count)]
        runs = [ours.run(requests, pixels) for _ in range(max(1, arguments.repeats // 2))]
        stages = [statistics.median(stage) for stage in zip(*map(astuple, runs), strict=True)]
        seconds = sum(stages)
        shares = " | ".join(f"{stage / seconds:.0%}" for stage in stages)
        mebibytes = ours.kv_bytes(requests) / count / 2**20
        yield _say(f"| {count} | {seconds:.2f} | {count / seconds:.2f} | {shares} | {mebibytes:.1f} |")


def _mixed_load() -> list[Request]:
    rng = np.random.default_rng(0)
    return [
        Request(at, num_tokens=int(rng.integers(3, 31)), num_beams=int(rng.choice([1, 5])))
        for at in range(NUM_MIXED)
    ]


def _median_s(work: Callable[[], object], repeats: int) -> float:
    return statistics.median(_seconds(work) for _ in range(repeats))


def _seconds(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _say(line: str) -> str:
    print(line, flush=True)
    return line


if __name__ == "__main__":
    main()
