"""Compare time and memory of loading a checkpoint of published size with transformers.

    python -m benchmarks.loading [--repeats 3] [--directory DIR] [--out benchmarks/loading.md]

The checkpoint is generated: ViT-g/14, Q-Former and OPT-2.7B with random weights in bfloat16, in the Hub's
format, 7.5 GB. It is kept if --directory is given. Each side loads it and generates one caption of 20 tokens
with five beams, in a separate process, in turns. Linux only: memory is read from /proc.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2QFormerConfig,
    Blip2VisionConfig,
    BlipImageProcessor,
    OPTConfig,
    PreTrainedTokenizerFast,
)

M = TypeVar("M")
SIDES = ("this project", "transformers")
NEW_TOKENS = 20
IMAGE_TOKEN = 50265
NUM_QUERY_TOKENS = 32
_GIB = 2**30
_SAMPLE_S = 0.1


@dataclass(frozen=True, slots=True)
class Measured:
    """Time and memory of one run; peak_bytes: maximum of anonymous memory plus resident checkpoint pages."""

    load_s: float
    caption_s: float
    peak_bytes: int
    anonymous_bytes: int


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure time and memory of loading a checkpoint.")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--directory", type=Path, help="of the checkpoint, which is kept")
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side is not None:
        run = _run_ours if arguments.side == SIDES[0] else _run_transformers
        print(json.dumps(asdict(run(arguments.directory))))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory = arguments.directory or Path(temporary)
        if not (directory / "config.json").exists():
            make_checkpoint(directory)
        runs = [(side, _run_in_process(side, directory)) for _ in range(arguments.repeats) for side in SIDES]
        text = "\n".join(_report(directory, runs, arguments.repeats)) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


def make_checkpoint(directory: Path) -> None:
    """Write ViT-g/14 + OPT-2.7B with the sizes of BLIP-2 and weights from N(0, 0.02)."""
    text_config = OPTConfig(
        vocab_size=50304,
        hidden_size=2560,
        word_embed_proj_dim=2560,
        ffn_dim=10240,
        num_hidden_layers=32,
        num_attention_heads=32,
        max_position_embeddings=2048,
        eos_token_id=50118,
        bos_token_id=2,
        pad_token_id=1,
    )
    config = Blip2Config(
        vision_config=Blip2VisionConfig(image_size=224).to_dict(),
        qformer_config=Blip2QFormerConfig().to_dict(),
        text_config=text_config.to_dict(),
        num_query_tokens=NUM_QUERY_TOKENS,
        image_token_index=IMAGE_TOKEN,
    )
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(config)
    model.to(torch.bfloat16).to_empty(device="cpu")
    torch.manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.normal_(std=0.02)
    model.tie_weights()
    model.save_pretrained(directory, max_shard_size="4GB")
    vocabulary = {f"w{index}": index for index in range(50304)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="w3")))
    tokenizer.save_pretrained(directory)
    BlipImageProcessor(size={"height": 224, "width": 224}).save_pretrained(directory)


def empty_file_cache(directory: Path) -> None:
    """Drop a checkpoint from the file cache, so that it is read from the disk."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _run_in_process(side: str, directory: Path) -> Measured:
    """Run one side in a separate process, after dropping the checkpoint from the file cache."""
    empty_file_cache(directory)
    command = [sys.executable, "-m", "benchmarks.loading", "--side", side, "--directory", str(directory)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Measured(**json.loads(done.stdout.splitlines()[-1]))


def _run_ours(directory: Path) -> Measured:
    from model import Blip2, GenerationParams
    from model.checkpoints import LoadOptions

    def load() -> Blip2:
        return Blip2.from_pretrained(str(directory), LoadOptions(dtype=torch.bfloat16))

    @torch.inference_mode()
    def caption(blip2: Blip2) -> None:
        features = blip2.encode_images(blip2.preprocess(_image())[None])
        inputs = blip2.project_queries(blip2.encode_queries(features))
        params = GenerationParams(num_beams=5, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
        blip2.generate(inputs, [""], params)

    return _measure(load, caption)


def _run_transformers(directory: Path) -> Measured:
    def load() -> Blip2ForConditionalGeneration:
        return Blip2ForConditionalGeneration.from_pretrained(directory, dtype=torch.bfloat16).eval()

    @torch.inference_mode()
    def caption(model: Blip2ForConditionalGeneration) -> None:
        pixels = BlipImageProcessor.from_pretrained(directory)(_image(), return_tensors="pt").pixel_values
        model.generate(
            pixel_values=pixels.to(torch.bfloat16),
            input_ids=torch.tensor([[IMAGE_TOKEN] * NUM_QUERY_TOKENS + [2]]),
            num_beams=5,
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
        )

    return _measure(load, caption)


def _measure(load: Callable[[], M], caption: Callable[[M], None]) -> Measured:
    with _MemorySampler() as memory:
        start_s = time.perf_counter()
        model = load()
        load_end_s = time.perf_counter()
        caption(model)
        end_s = time.perf_counter()
    return Measured(load_end_s - start_s, end_s - load_end_s, memory.peak_bytes, memory.anonymous_bytes)


class _MemorySampler:
    """Sampler of this process: anonymous memory, and resident pages of safetensors files."""

    def __init__(self) -> None:
        self.peak_bytes = self.anonymous_bytes = 0
        self._baseline = _anonymous_bytes()  # of Python and the libraries
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> "_MemorySampler":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_S):
            anonymous = _anonymous_bytes() - self._baseline
            self.anonymous_bytes = max(self.anonymous_bytes, anonymous)
            self.peak_bytes = max(self.peak_bytes, anonymous + _checkpoint_bytes())


def _anonymous_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in line)
    return int(line.split()[1]) * 1024


def _checkpoint_bytes() -> int:
    """Compute the resident bytes of safetensors files, without the pages that were modified."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, _, value = line.partition(":")
        if " " in name:  # the header of a mapping: addresses, permissions, file
            inside = line.endswith(".safetensors")
        elif inside and name in ("Rss", "Anonymous"):
            total += (1 if name == "Rss" else -1) * int(value.split()[0]) * 1024
    return total


def _image() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB")


def _report(directory: Path, runs: list[tuple[str, Measured]], repeats: int) -> Iterator[str]:
    weights = sum(path.stat().st_size for path in directory.glob("*.safetensors"))
    yield "# Loading a checkpoint of published size"
    yield ""
    yield (
        f"`python -m benchmarks.loading --repeats {repeats}`: ViT-g/14 + OPT-2.7B, random bfloat16 weights, "
        f"{weights / _GIB:.2f} GiB, on a CPU ({torch.get_num_threads()} threads, torch {torch.__version__}), "
        "not in the file cache. Medians. Memory excludes Python and the libraries: anonymous memory, plus "
        "pages of the checkpoint counted once."
    )
    yield ""
    yield "| | load, s | first caption, s | total, s | peak memory | anonymous part | peak / weights |"
    yield "|---|---|---|---|---|---|---|"
    for side in SIDES:
        measured = [one for name, one in runs if name == side]
        load_s, caption_s, peak, anonymous = (
            statistics.median(getattr(one, field) for one in measured)
            for field in ("load_s", "caption_s", "peak_bytes", "anonymous_bytes")
        )
        yield (
            f"| {side} | {load_s:.1f} | {caption_s:.1f} | {load_s + caption_s:.1f} "
            f"| {peak / _GIB:.2f} GiB | {anonymous / _GIB:.2f} GiB | {peak / weights:.2f} |"
        )
    ratios = [
        ours.load_s / theirs.load_s for (_, ours), (_, theirs) in zip(runs[::2], runs[1::2], strict=True)
    ]
    yield ""
    by_pair = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    yield f"Load time of this project / transformers, pair by pair: {by_pair}."


if __name__ == "__main__":
    main()
