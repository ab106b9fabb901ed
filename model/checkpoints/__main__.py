"""`python -m model.checkpoints inspect|convert|verify|fetch`: looks at checkpoints, turns and brings them."""

import argparse
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import get_args

import torch
from PIL import Image, UnidentifiedImageError
from transformers.utils import logging

from model.blip2 import Blip2
from model.checkpoints import LoadOptions, load_blip2, locate
from model.checkpoints.convert import Format, convert
from model.checkpoints.hub.fetch import fetch
from model.checkpoints.inspect import inspect
from model.checkpoints.json_records import read_json
from model.checkpoints.verify import verify
from model.errors import ModelError

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_TEXTS = ("a photo of", "Question: what is this? Answer:")


def main(argv: Sequence[str] | None = None) -> int:
    """Gives the exit status: 0, 1 where `verify` finds a difference, 2 for an error, told in one line."""
    arguments = _parse(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        status: int = arguments.run(arguments)
    except (ModelError, OSError, UnidentifiedImageError) as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 2
    return status


def _inspect(arguments: argparse.Namespace) -> int:
    summary = inspect(locate(arguments.checkpoint, revision=arguments.revision))
    print(f"{arguments.checkpoint}: {summary.kind}\n")
    print(f"{'part':24}{'tensors':>8}{'parameters':>16}  dtype")
    for part in summary.parts:
        print(f"{part.name:24}{part.num_tensors:8}{part.num_parameters:16,}  {', '.join(part.dtypes)}")
    print(f"{'in all':24}{'':8}{sum(part.num_parameters for part in summary.parts):16,}")
    if not summary.missing:
        print("\nnothing is missing")
    for task, lacking in summary.missing.items():
        print(f"\nno {task}: without {', '.join(lacking)}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    source = locate(arguments.checkpoint, revision=arguments.revision)
    frozen = [part for part in inspect(source).parts if part.name in ("image encoder", "language model")]
    dtypes = {_DTYPES.get(dtype, torch.float32) for part in frozen for dtype in part.dtypes}
    dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.float32  # the one that loses nothing
    parts = load_blip2(str(source), LoadOptions(dtype=dtype, runs=False)).parts
    left_out = convert(parts, arguments.target, arguments.to)
    print(f"wrote {arguments.target}")
    for line in left_out:
        print(f"left out, for the format has no place for it: {line}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    images = []
    for path in arguments.images:
        with Image.open(path) as image:
            images.append(image.convert("RGB"))
    source = locate(arguments.checkpoint, revision=arguments.revision)
    blip2 = Blip2.from_pretrained(str(source))
    differences = verify(blip2, images, arguments.text or _TEXTS, hub_directory=_hub_directory(source))
    print(f"{'part':44}{'largest difference':>20}{'allowed':>10}")
    for found in differences:
        verdict = "" if found.is_within else "  TOO LARGE"
        print(f"{found.part:44}{found.largest:20.2e}{found.tolerance:10.0e}{verdict}")
    return 0 if all(found.is_within for found in differences) else 1


def _fetch(arguments: argparse.Namespace) -> int:
    fetched = fetch(arguments.checkpoint, revision=arguments.revision)
    print(f"{arguments.checkpoint}, commit {fetched.commit}, in {fetched.directory}")
    print(f"{fetched.num_files} files are what the Hub has")
    return 0


def _hub_directory(source: Path) -> Path | None:
    is_hub = source.is_dir() and read_json(source / "config.json").get("model_type") == "blip-2"
    return source if is_hub else None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m model.checkpoints")
    commands = parser.add_subparsers(dest="command", required=True)

    checkpoint = argparse.ArgumentParser(add_help=False)
    checkpoint.add_argument(
        "checkpoint", help="a directory, a .pth file, an id of the Hub, or an embedded model's name"
    )
    checkpoint.add_argument("--revision", help="branch, tag or commit of a model of the Hub")

    looking = commands.add_parser(
        "inspect", parents=[checkpoint], help="what a checkpoint holds, part by part; reads headers only"
    )
    looking.set_defaults(run=_inspect)

    converting = commands.add_parser(
        "convert", parents=[checkpoint], help="writes a checkpoint in another format"
    )
    converting.add_argument("target", type=Path, help="a new directory, or a new .pth file")
    converting.add_argument("--to", choices=get_args(Format), required=True)
    converting.set_defaults(run=_convert)

    comparing = commands.add_parser(
        "verify", parents=[checkpoint], help="compares a checkpoint with transformers on images"
    )
    comparing.add_argument("images", type=Path, nargs="+")
    comparing.add_argument("--text", action="append", help="a prompt or caption; may be given several times")
    comparing.set_defaults(run=_verify)

    fetching = commands.add_parser(
        "fetch", parents=[checkpoint], help="downloads a model of the Hub and verifies the hash of each file"
    )
    fetching.set_defaults(run=_fetch)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
