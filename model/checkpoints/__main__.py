"""`python -m model.checkpoints inspect|convert|verify|fetch`: commands for checkpoints."""

import argparse
import os
import sys
from collections.abc import Sequence
from functools import reduce
from pathlib import Path
from typing import get_args

import torch
from transformers.utils import logging

from model.blip2 import Blip2
from model.checkpoints import LoadOptions, load_blip2, resolve
from model.checkpoints.convert import Format, convert
from model.checkpoints.hub.peft import is_peft_adapter
from model.checkpoints.inspect import inspect
from model.checkpoints.json_records import read_json
from model.checkpoints.resolve import fetch
from model.checkpoints.verify import verify
from model.errors import ModelError
from model.images.decoding import open_image

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_TEXTS = ("a photo of", "Question: what is this? Answer:")


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status: 0; 1 where `verify` finds a difference; 2 for an error, printed in one line.

    It is 141 where the reader of the output is gone, as for a process that SIGPIPE ends.
    """
    arguments = _parse(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        status: int = arguments.run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the exit flushes once more
        return 141
    except (ModelError, OSError) as error:
        print(f"{arguments.command}: {error}", file=sys.stderr)
        return 2
    return status


def _inspect(arguments: argparse.Namespace) -> int:
    summary = inspect(resolve(arguments.checkpoint, revision=arguments.revision))
    print(f"{arguments.checkpoint}: {summary.kind}\n")
    print(f"{'part':24}{'tensors':>8}{'parameters':>16}  dtype")
    for each in summary.components:
        print(f"{each.name:24}{each.num_tensors:8}{each.num_parameters:16,}  {', '.join(each.dtypes)}")
    print(f"{'in all':24}{'':8}{sum(each.num_parameters for each in summary.components):16,}")
    if not summary.missing:
        print("\nnothing is missing")
    for task, lacking in summary.missing.items():
        print(f"\nno {task}: without {', '.join(lacking)}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    source = resolve(arguments.checkpoint, revision=arguments.revision)
    components = inspect(source).components
    frozen = [each for each in components if each.name in ("image encoder", "language model")]
    dtypes = {_DTYPES.get(dtype, torch.float32) for each in frozen for dtype in each.dtypes}
    dtype = reduce(torch.promote_types, dtypes) if dtypes else torch.float32  # the one that loses nothing
    checkpoint = load_blip2(str(source), LoadOptions(dtype=dtype, runs=False))
    left_out = convert(checkpoint.components, arguments.target, arguments.to)
    print(f"wrote {arguments.target}")
    for line in left_out:
        print(f"left out, for the format has no place for it: {line}")
    return 0


def _verify(arguments: argparse.Namespace) -> int:
    images = []
    for path in arguments.images:
        with open_image(path.read_bytes()) as (image, _):
            images.append(image.convert("RGB"))
    source = resolve(arguments.checkpoint, revision=arguments.revision)
    blip2 = Blip2.from_pretrained(str(source))
    differences = verify(blip2, images, arguments.text or _TEXTS, hub_directory=_hub_directory(source))
    print(f"{'part':44}{'largest difference':>20}{'allowed':>10}")
    for difference in differences:
        verdict = "" if difference.is_within else "  TOO LARGE"
        print(f"{difference.component:44}{difference.largest:20.2e}{difference.tolerance:10.0e}{verdict}")
    return 0 if all(difference.is_within for difference in differences) else 1


def _fetch(arguments: argparse.Namespace) -> int:
    downloaded = fetch(arguments.checkpoint, revision=arguments.revision)
    print(f"{arguments.checkpoint}, commit {downloaded.commit}, in {downloaded.directory}")
    print(f"{downloaded.num_files} files are what the Hub has")
    return 0


def _hub_directory(source: Path) -> Path | None:
    if not source.is_dir() or is_peft_adapter(source):
        return None
    is_hub = read_json(source / "config.json").get("model_type") == "blip-2"
    return source if is_hub else None


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m model.checkpoints")
    commands = parser.add_subparsers(dest="command", required=True)

    checkpoint = argparse.ArgumentParser(add_help=False)
    checkpoint.add_argument(
        "checkpoint", help="a directory, a .pth file, an id of the Hub, or an embedded model's name"
    )
    checkpoint.add_argument("--revision", help="branch, tag or commit of a model of the Hub")

    inspecting = commands.add_parser(
        "inspect", parents=[checkpoint], help="lists the components of a checkpoint; reads headers only"
    )
    inspecting.set_defaults(run=_inspect)

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
    comparing.add_argument("--text", action="append", help="a prompt or caption; may be repeated")
    comparing.set_defaults(run=_verify)

    fetching = commands.add_parser(
        "fetch", parents=[checkpoint], help="downloads a model of the Hub and verifies the hash of each file"
    )
    fetching.set_defaults(run=_fetch)
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
