"""`python -m model caption|ask|match IMAGES…`: bulk work on the command line, without a server."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from model.blip2 import Blip2
from model.bulk import BulkTask, build_answering, build_captioning, build_matching, find_images, run_bulk
from model.checkpoints import LoadOptions, Quantization
from model.devices import find_device
from model.errors import ModelError
from model.generation import GenerationParams


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0; 1 where a record holds an error; 2 for an error, printed in one line."""
    arguments = _parse(argv)
    try:
        images = find_images(arguments.images)
        options = LoadOptions(
            device=find_device(arguments.device),
            dtype=None if arguments.dtype == "auto" else getattr(torch, arguments.dtype),
            quantize=arguments.quantize,
        )
        blip2 = Blip2.from_pretrained(arguments.model, options, revision=arguments.revision)
        blip2.pack()
        task = _build_task(arguments, blip2)
        written, failed = run_bulk(blip2, images, task, arguments.out, batch_size=arguments.batch_size)
    except (ModelError, OSError) as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"stopped; run the same command again to continue {arguments.out}", file=sys.stderr)
        return 130
    print(
        f"{arguments.out}: {written} images written, {len(images) - written} were there, {failed} failed",
        file=sys.stderr,
    )
    return 1 if failed else 0


def _build_task(arguments: argparse.Namespace, blip2: Blip2) -> BulkTask:
    if arguments.command == "match":
        return build_matching(blip2, arguments.text)
    if arguments.command == "ask":
        params = GenerationParams(num_beams=arguments.beams, max_new_tokens=10, length_penalty=-1.0)
        return build_answering(blip2, arguments.question, params)
    params = GenerationParams(num_beams=arguments.beams, max_new_tokens=30)
    return build_captioning(blip2, arguments.prompt, params)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m model")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("images", type=Path, nargs="+", help="files, or directories of them")
    shared.add_argument("--model", default="tiny", help="as BLIP2_MODEL (default: tiny)")
    shared.add_argument(
        "--out", type=Path, required=True, help="JSON lines; images that have one are skipped"
    )
    shared.add_argument("--revision", help="branch, tag or commit of a model of the Hub")
    shared.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps (default: auto)")
    shared.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto")
    shared.add_argument("--quantize", choices=get_args(Quantization), default="none")
    shared.add_argument("--batch-size", type=_positive, default=8, help="images at once (default: 8)")
    commands = parser.add_subparsers(dest="command", required=True)

    captioning = commands.add_parser("caption", parents=[shared], help="a caption of each image")
    captioning.add_argument("--prompt", help="its beginning (default: the checkpoint's)")
    captioning.add_argument("--beams", type=int, default=5)

    asking = commands.add_parser("ask", parents=[shared], help="answers to questions about each image")
    asking.add_argument("--question", action="append", required=True, help="may be repeated")
    asking.add_argument("--beams", type=int, default=5)

    matching = commands.add_parser("match", parents=[shared], help="how well texts fit each image")
    matching.add_argument("--text", action="append", required=True, help="may be repeated")
    return parser.parse_args(argv)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"it is {value}, and must be at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
