"""`python -m training <data|scenes|tiny|gate|compare|evaluate>`: checks data, trains and measures."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch
from accelerate import PartialState

from model.errors import ModelError
from training.checkpoint import CheckpointMismatchError
from training.config import ConfigError
from training.data.check import check_data, write_page
from training.data.records import DataError
from training.evaluation.client import EvaluationError, ServerClient
from training.evaluation.evaluate import TASKS, EvaluationPlan, evaluate
from training.evaluation.tables import format_tables
from training.loop import NonFiniteLossError
from training.tiny.comparison import compare_stage1
from training.tiny.config import DEFAULT_CONFIG, load_tiny_config
from training.tiny.gates import (
    GATES,
    NUM_PROBE_SCENES,
    NUM_SCENES,
    VALIDATION_SEED,
    GateMissedError,
    GatePlan,
    format_result,
    measure,
    require,
    save_result,
)
from training.tiny.recipe import TinyRecipe
from training.tiny.report.page import write_report
from training.world.questions import MAX_QUESTIONS
from training.world.scene_files import write_scenes
from training.world.scenes import IMAGE_TEXT_SPLITS

DEFAULT_OUT = Path("runs/tiny")
DEVICE_HELP = "auto, cpu, cuda or cuda:N (default: %(default)s)"

Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"
_REPORTED_ERRORS = (
    *(ConfigError, CheckpointMismatchError, DataError, EvaluationError, ModelError, NonFiniteLossError),
    *(OSError, ValueError),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; print errors that a user can cause to stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it logs every request
    options = _build_parser().parse_args(arguments)
    try:
        options.run(options)
    except GateMissedError as exc:
        print(f"missed: {exc}", file=sys.stderr)  # noqa: T201
        return 1
    except _REPORTED_ERRORS as exc:
        print(f"error: {exc}", file=sys.stderr)  # noqa: T201
        return 1
    PartialState().destroy_process_group()
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    for add_command in (_add_data, _add_scenes, _add_tiny, _add_gate, _add_compare, _add_evaluate):
        add_command(commands)
    return parser


def _add_data(commands: Commands) -> None:
    data = commands.add_parser("data", help="your own images and captions")
    check = data.add_subparsers(required=True, metavar="command").add_parser(
        "check", help="read all of it once; exit status 1 where too much cannot be used"
    )
    check.add_argument("records", type=Path, metavar="FILE", help="one JSON object a line, or COCO's .json")
    check.add_argument("--images", type=Path, help="folder of the images (default: that of FILE)")
    check.add_argument("--out", type=Path, help="the page that is written (default: FILE with .html)")
    check.add_argument("--samples", type=_not_negative, default=24, help="on the page (default: %(default)s)")
    check.add_argument(
        "--max-faulty",
        type=_share,
        default=0.01,
        metavar="SHARE",
        help="share of records that may be unusable (default: %(default)s)",
    )
    check.set_defaults(run=_check_data)


def _add_scenes(commands: Commands) -> None:
    scenes = commands.add_parser("scenes", help="render synthetic scenes with captions and questions")
    scenes.add_argument("--seed", type=_not_negative, default=0)
    scenes.add_argument("--count", type=_positive, required=True)
    scenes.add_argument("--split", choices=IMAGE_TEXT_SPLITS, default="unseen")
    scenes.add_argument(
        "--image-size", type=_positive, default=96, help="side in pixels (default: %(default)s)"
    )
    scenes.add_argument("--out", type=Path, required=True)
    scenes.set_defaults(run=_write_scenes)


def _add_tiny(commands: Commands) -> None:
    tiny = commands.add_parser(
        "tiny", help="train the embedded default from nothing; resumes from its last checkpoint"
    )
    tiny.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    tiny.add_argument("--out", type=Path, default=DEFAULT_OUT)
    tiny.add_argument("--device", default="auto", help=DEVICE_HELP)
    phases = tuple(TinyRecipe.PHASES)
    tiny.add_argument(
        "--only", nargs="+", choices=phases, default=phases, metavar="PHASE", help=", ".join(phases)
    )
    tiny.add_argument(
        "--report", action="store_true", help="train nothing; write report.html about the run in --out"
    )
    tiny.set_defaults(run=_train_tiny)


def _add_gate(commands: Commands) -> None:
    gate = commands.add_parser("gate", help="measure the result of a phase; exit status 1 below its bars")
    gate.add_argument("phase", choices=tuple(GATES), metavar="PHASE", help=", ".join(GATES))
    gate.add_argument(
        "--out", type=Path, default=DEFAULT_OUT, help="directory of the run (default: %(default)s)"
    )
    gate.add_argument(
        "--scenes", type=_positive, default=NUM_SCENES, help="scenes of each split (default: %(default)s)"
    )
    gate.add_argument("--seed", type=_not_negative, default=VALIDATION_SEED)
    gate.add_argument(
        "--probe-scenes",
        type=_positive,
        default=NUM_PROBE_SCENES,
        help="training scenes that linear probes are fitted on (default: %(default)s)",
    )
    gate.add_argument(
        "--queries", type=_positive, help="words of a description (default: as configured in the run)"
    )
    gate.add_argument("--device", default="auto", help=DEVICE_HELP)
    gate.set_defaults(run=_run_gate)


def _add_compare(commands: Commands) -> None:
    compare = commands.add_parser("compare", help="train stage 2 with and without stage 1, and measure both")
    compare.add_argument("--config", type=Path, default=DEFAULT_CONFIG)
    compare.add_argument("--out", type=Path, default=DEFAULT_OUT, help="directory of the run with stage 1")
    compare.add_argument("--seeds", type=_not_negative, nargs="+", default=[0, 1, 2])
    compare.add_argument("--steps", type=_positive, default=800, help="of stage 2 (default: %(default)s)")
    compare.add_argument(
        "--scenes", type=_positive, default=NUM_SCENES, help="scenes of each split (default: %(default)s)"
    )
    compare.add_argument("--device", default="auto", help=DEVICE_HELP)
    compare.set_defaults(run=_compare)


def _add_evaluate(commands: Commands) -> None:
    evaluation = commands.add_parser("evaluate", help="measure a running server on unseen scenes")
    evaluation.add_argument("--url", default="http://127.0.0.1:8000")
    evaluation.add_argument("--seed", type=_not_negative, default=1)
    evaluation.add_argument("--split", choices=IMAGE_TEXT_SPLITS, default="unseen")
    evaluation.add_argument("--scenes", type=_positive, default=1000)
    evaluation.add_argument(
        "--questions", type=_positive, default=5, help=f"questions for each scene, up to {MAX_QUESTIONS}"
    )
    evaluation.add_argument(
        "--reranked", type=_not_negative, default=100, help="queries that are also re-ranked by ITM"
    )
    evaluation.add_argument("--concurrency", type=_positive, default=8)
    evaluation.add_argument(
        "--blind", metavar="CHECKPOINT", help="also measure its language model without the image"
    )
    evaluation.add_argument("--out", type=Path, help="write the figures to this file as JSON")
    evaluation.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    evaluation.set_defaults(run=_evaluate)


def _not_negative(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{value} is less than 0")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def _check_data(options: argparse.Namespace) -> None:
    images = options.images or options.records.parent
    check = check_data(options.records, images, num_samples=options.samples)
    page = options.out or options.records.with_suffix(".html")
    write_page(check, page)
    print(  # noqa: T201
        f"{check.num_records:,} records, {check.num_faulty:,} of them cannot be used; "
        f"{check.num_captions:,} captions, {check.num_questions:,} questions; see {page}"
    )
    check.check(options.max_faulty)


def _write_scenes(options: argparse.Namespace) -> None:
    write_scenes(options.out, options.seed, options.split, options.count, options.image_size)


def _train_tiny(options: argparse.Namespace) -> None:
    if options.report:
        print(write_report(options.out))  # noqa: T201
        return
    recipe = TinyRecipe(load_tiny_config(options.config), options.out, _select_device(options.device))
    recipe.run(options.only)


def _run_gate(options: argparse.Namespace) -> None:
    plan = GatePlan(
        options.out,
        seed=options.seed,
        num_scenes=options.scenes,
        num_probe_scenes=options.probe_scenes,
        num_query_tokens=options.queries,
        device=str(_select_device(options.device)),
    )
    result = measure(options.phase, plan)
    print(format_result(result))  # noqa: T201
    save_result(result, options.out)
    require(result)


def _compare(options: argparse.Namespace) -> None:
    device = _select_device(options.device)
    recipe = TinyRecipe(load_tiny_config(options.config), options.out, device)
    plan = GatePlan(options.out, num_scenes=options.scenes, device=str(device))
    comparison = compare_stage1(recipe, options.seeds, options.steps, plan)
    print(format_tables(comparison.figures))  # noqa: T201


def _select_device(name: str) -> torch.device:
    """Return the device of this process. Raises ConfigError if it does not exist."""
    has_cuda = torch.cuda.is_available()
    processes = PartialState(cpu=name == "cpu" or not has_cuda)
    if name == "auto":
        return torch.device("cuda", processes.local_process_index) if has_cuda else torch.device("cpu")
    device_type, _, index = name.partition(":")
    if device_type not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"--device is {name!r}; choose auto, cpu, cuda or cuda:N")
    if device_type == "cuda" and processes.num_processes > 1:
        raise ConfigError(f"--device is {name!r}, the same for all processes; choose auto")
    if device_type == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device is {name!r}, but torch finds {torch.cuda.device_count()} CUDA devices")
    return torch.device(name)


def _evaluate(options: argparse.Namespace) -> None:
    plan = EvaluationPlan(
        seed=options.seed,
        split=options.split,
        num_scenes=options.scenes,
        questions_per_scene=options.questions,
        num_reranked=options.reranked,
        tasks=tuple(options.tasks),
    )
    with ServerClient(options.url, options.concurrency) as client:
        figures = evaluate(client, plan, image_ablated_checkpoint=options.blind)
    print(format_tables(figures))  # noqa: T201
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
