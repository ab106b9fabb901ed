"""Start the service on a checkpoint of published size, and compare its captions with those of transformers.

    python -m benchmarks.real_size [--repeats 3] [--directory DIR] [--out benchmarks/real_size.md]

The checkpoint is the one of `benchmarks.loading`: ViT-g/14, Q-Former and OPT-2.7B, random bfloat16 weights.
The service starts with a cold file cache, `--repeats` times. Then service and transformers, each in a process
of its own and on all cores, answer one request and eight requests together in turns: 5 beams, exactly 30
tokens. transformers computes the eight as one batch. Linux only: memory is read from /proc.
"""

import argparse
import asyncio
import base64
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from io import BytesIO
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import httpx
import torch
from PIL import Image

from benchmarks.loading import IMAGE_TOKEN, NUM_QUERY_TOKENS, empty_file_cache, make_checkpoint
from benchmarks.server_process import ServerProcess, free_port, stopped_on_exit

NUM_TOKENS: Final = 30
NUM_TOGETHER: Final = 8
KV_BYTES: Final = 2**30  # the captions of eight images at once
_GIB: Final = 2**30
_LOG_MARK: Final = "ready: "


@dataclass(frozen=True, slots=True)
class Start:
    """A start of the service: seconds until ready, and of its two parts; bytes of memory when ready."""

    ready_s: float
    load_s: float
    warmup_s: float
    anonymous_bytes: int
    file_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the service with a model of published size.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="of the checkpoint, which is kept")
    parser.add_argument("--out", type=Path, help="also write the tables to this file")
    arguments = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        checkpoint = arguments.directory or folder
        if not (checkpoint / "config.json").exists():
            make_checkpoint(checkpoint)
        starts = []
        for repeat in range(arguments.repeats):
            empty_file_cache(checkpoint)
            begin_s = time.perf_counter()
            server = stack.enter_context(stopped_on_exit(_start_service(checkpoint, folder)))
            server.wait_ready()
            starts.append(_measure_start(server, time.perf_counter() - begin_s))
            if repeat < arguments.repeats - 1:
                server.stop()
        pairs = _compare(server, checkpoint, arguments.repeats)
    text = "\n".join(_report(starts, pairs)) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


def _start_service(checkpoint: Path, folder: Path) -> ServerProcess:
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BLIP2_")}
    environment |= {"BLIP2_MODEL": str(checkpoint), "BLIP2_DTYPE": "bfloat16", "BLIP2_PORT": str(port)}
    environment |= {"BLIP2_KV_BYTES": str(KV_BYTES)}
    command = [sys.executable, "-m", "service"]
    return ServerProcess(
        "service", command, environment=environment, folder=folder, port=port, ready_path="/readyz"
    )


def _measure_start(server: ServerProcess, ready_s: float) -> Start:
    lines = [json.loads(line) for line in server.log_end().splitlines() if line.startswith("{")]
    words = next(line["message"] for line in lines if line["message"].startswith(_LOG_MARK)).split()
    load_s, warmup_s = (float(words[index - 1]) for index, word in enumerate(words) if word == "s")
    status = Path(f"/proc/{server.process.pid}/status").read_text().splitlines()
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status if line.startswith("Rss")}
    return Start(ready_s, load_s, warmup_s, sizes["RssAnon"], sizes["RssFile"])


def _compare(server: ServerProcess, checkpoint: Path, repeats: int) -> dict[int, list[tuple[float, float]]]:
    """Return pairs of seconds, of the service and of transformers, by the number of requests together."""
    context = get_context("spawn")
    ours, theirs = context.Pipe()
    peer = context.Process(target=_serve_transformers, args=(theirs, checkpoint), daemon=True)
    peer.start()
    ours.recv()  # it is loaded
    shades = itertools.count()

    def measure(count: int) -> tuple[float, float]:
        images = [Image.new("RGB", (480, 360), (next(shades), 90, 200)) for _ in range(count)]
        start_s = time.perf_counter()
        asyncio.run(_caption(server.url, images))
        our_s = time.perf_counter() - start_s
        ours.send(images)
        return our_s, ours.recv()

    measure(1)  # to warm up
    rounds = [(measure(1), measure(NUM_TOGETHER)) for _ in range(repeats)]
    pairs = dict(zip((1, NUM_TOGETHER), map(list, zip(*rounds, strict=True)), strict=True))
    ours.send(None)
    peer.join()
    return pairs


async def _caption(url: str, images: list[Image.Image]) -> None:
    async with httpx.AsyncClient(timeout=600, trust_env=False) as client:
        answers = await asyncio.gather(
            *(client.post(f"{url}/caption", json=_body(image)) for image in images)
        )
    for answer in answers:
        answer.raise_for_status()


def _body(image: Image.Image) -> dict[str, object]:
    file = BytesIO()
    image.save(file, "PNG")
    encoded = base64.b64encode(file.getvalue()).decode()
    return {"image": encoded, "num_beams": 5, "min_new_tokens": NUM_TOKENS, "max_new_tokens": NUM_TOKENS}


def _serve_transformers(connection: Connection, checkpoint: Path) -> None:
    """Caption the images that arrive; answer with the seconds that it took."""
    from transformers import Blip2ForConditionalGeneration, BlipImageProcessor

    model = Blip2ForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    processor = BlipImageProcessor.from_pretrained(checkpoint)
    connection.send("loaded")

    @torch.inference_mode()
    def caption(images: list[Image.Image]) -> None:
        pixels = processor(images, return_tensors="pt").pixel_values.to(torch.bfloat16)
        model.generate(
            pixel_values=pixels,
            input_ids=torch.tensor([[IMAGE_TOKEN] * NUM_QUERY_TOKENS + [2]] * len(images)),
            num_beams=5,
            do_sample=False,
            length_penalty=1.0,
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
        )

    while (images := connection.recv()) is not None:
        start_s = time.perf_counter()
        caption(images)
        connection.send(time.perf_counter() - start_s)


def _report(starts: list[Start], pairs: dict[int, list[tuple[float, float]]]) -> list[str]:
    def median(field: str) -> float:
        return statistics.median(getattr(start, field) for start in starts)

    threads, version = torch.get_num_threads(), torch.__version__
    lines = [
        "# The service with a model of published size",
        "",
        f"`python -m benchmarks.real_size --repeats {len(starts)}`: ViT-g/14 + OPT-2.7B, random bfloat16 "
        f"weights, 6.98 GiB, on a CPU ({threads} threads, torch {version}). Medians, starts with a cold file "
        "cache.",
        "",
        "| until ready, s | of which load and packing, s | warm-up, s | anonymous memory | file pages |",
        "|---|---|---|---|---|",
        f"| {median('ready_s'):.1f} | {median('load_s'):.1f} | {median('warmup_s'):.1f} "
        f"| {median('anonymous_bytes') / _GIB:.2f} GiB | {median('file_bytes') / _GIB:.2f} GiB |",
        "",
        f"Captions of 5 beams and {NUM_TOKENS} tokens, in turns; `BLIP2_KV_BYTES={KV_BYTES}`:",
        "",
        "| requests together | service, s | transformers, s | transformers / service, by pair |",
        "|---|---|---|---|",
    ]
    for count, measured in pairs.items():
        our_s, their_s = (statistics.median(side) for side in zip(*measured, strict=True))
        ratios = ", ".join(f"{theirs / ours:.2f}" for ours, theirs in measured)
        lines.append(f"| {count} | {our_s:.1f} | {their_s:.1f} | {ratios} |")
    return lines


if __name__ == "__main__":
    main()
