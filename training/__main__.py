"""`python -m training <scenes|tiny|gate|compare|evaluate>`: makes and measures the default model."""

import argparse
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState

from model.errors import ModelError
from training.checkpoint import CheckpointMismatchError
from training.config import CONFIG_DIR, ConfigError, load_tiny_config
from training.evaluation.evaluate import TASKS, EvaluationError, Plan, ServerClient, evaluate
from training.loop import NonFiniteLossError
from training.tiny.comparison import compare_stage1
from training.tiny.gates import (
    GATES,
    NUM_PROBE_SCENES,
    NUM_SCENES,
    VALIDATION_SEED,
    GateMissedError,
    format_findings,
    measure,
    require,
    write_findings,
)
from training.tiny.gates import Plan as GatePlan
from training.tiny.recipe import TinyTraining
from training.tiny.report import format_report
from training.tiny.report.page import write_report
from training.world.questions import MAX_QUESTIONS
from training.world.scene_files import write_scenes
from training.world.scenes import PICTURED_SPLITS

_TOLD = (
    *(ConfigError, CheckpointMismatchError, EvaluationError, ModelError, NonFiniteLossError),
    *(OSError, ValueError),
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; what a user can cause is one line on stderr."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request
    options = _build_parser().parse_args(arguments)
    try:
        options.run(options)
    except GateMissedError as exc:
        print(f"missed: {exc}", file=sys.stderr)  # noqa: T201
        return 1
    except _TOLD as exc:
        print(f"error: {exc}", file=sys.stderr)  # noqa: T201
        return 1
    PartialState().destroy_process_group()
    return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")

    scenes = commands.add_parser("scenes", help="draw synthetic scenes with captions and questions")
    scenes.add_argument("--seed", type=_not_negative, default=0)
    scenes.add_argument("--count", type=_positive, required=True)
    scenes.add_argument("--split", choices=PICTURED_SPLITS, default="unseen")
    scenes.add_argument(
        "--image-size", type=_positive, default=96, help="side in pixels (default: %(default)s)"
    )
    scenes.add_argument("--out", type=Path, required=True)
    scenes.set_defaults(run=_draw_scenes)

    tiny = commands.add_parser(
        "tiny", help="train the embedded default from nothing; resumes where it stopped"
    )
    tiny.add_argument("--config", type=Path, default=CONFIG_DIR / "tiny.yaml")
    tiny.add_argument("--out", type=Path, default=Path("runs/tiny"))
    tiny.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    phases = tuple(TinyTraining.PHASES)
    tiny.add_argument(
        "--only", nargs="+", choices=phases, default=phases, metavar="PHASE", help=", ".join(phases)
    )
    tiny.add_argument(
        "--report", action="store_true", help="train nothing: write report.html of what --out holds"
    )
    tiny.set_defaults(run=_train_tiny)

    _add_gate(commands)
    _add_compare(commands)

    evaluation = commands.add_parser("evaluate", help="measure a running server on scenes it has not seen")
    evaluation.add_argument("--url", default="http://127.0.0.1:8000")
    evaluation.add_argument("--seed", type=_not_negative, default=1)
    evaluation.add_argument("--split", choices=PICTURED_SPLITS, default="unseen")
    evaluation.add_argument("--scenes", type=_positive, default=1000)
    evaluation.add_argument(
        "--questions", type=_positive, default=5, help=f"questions for each scene, up to {MAX_QUESTIONS}"
    )
    evaluation.add_argument(
        "--reranked", type=_not_negative, default=100, help="queries that are also re-ranked by ITM"
    )
    evaluation.add_argument("--concurrency", type=_positive, default=8)
    evaluation.add_argument(
        "--blind", metavar="CHECKPOINT", help="also ask its language model without an image"
    )
    evaluation.add_argument("--out", type=Path, help="write the figures here as JSON")
    evaluation.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK")
    evaluation.set_defaults(run=_evaluate)
    return parser


def _add_gate(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    gate = commands.add_parser("gate", help="measure the result of a phase; exit status 1 below its bars")
    gate.add_argument("phase", choices=tuple(GATES), metavar="PHASE", help=", ".join(GATES))
    gate.add_argument("--out", type=Path, default=Path("runs/tiny"), help="of the run (default: %(default)s)")
    gate.add_argument(
        "--scenes", type=_positive, default=NUM_SCENES, help="of each split (default: %(default)s)"
    )
    gate.add_argument("--seed", type=_not_negative, default=VALIDATION_SEED)
    gate.add_argument(
        "--probe-scenes",
        type=_positive,
        default=NUM_PROBE_SCENES,
        help="training scenes that linear probes are fitted on (default: %(default)s)",
    )
    gate.add_argument(
        "--queries", type=_positive, help="words of a description (default: as the run was configured)"
    )
    gate.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    gate.set_defaults(run=_run_gate)


def _add_compare(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    compare = commands.add_parser("compare", help="train stage 2 with and without stage 1, and measure both")
    compare.add_argument("--config", type=Path, default=CONFIG_DIR / "tiny.yaml")
    compare.add_argument("--out", type=Path, default=Path("runs/tiny"), help="of the run whose stage 1 it is")
    compare.add_argument("--seeds", type=_not_negative, nargs="+", default=[0, 1, 2])
    compare.add_argument("--steps", type=_positive, default=800, help="of stage 2 (default: %(default)s)")
    compare.add_argument(
        "--scenes", type=_positive, default=NUM_SCENES, help="of each split (default: %(default)s)"
    )
    compare.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: %(default)s)")
    compare.set_defaults(run=_compare)


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


def _draw_scenes(options: argparse.Namespace) -> None:
    write_scenes(options.out, options.seed, options.split, options.count, options.image_size)


def _train_tiny(options: argparse.Namespace) -> None:
    if options.report:
        print(write_report(options.out))  # noqa: T201
        return
    TinyTraining(load_tiny_config(options.config), options.out, _pick_device(options.device)).run(
        options.only
    )


def _run_gate(options: argparse.Namespace) -> None:
    plan = GatePlan(
        options.out,
        seed=options.seed,
        num_scenes=options.scenes,
        num_probe_scenes=options.probe_scenes,
        num_query_tokens=options.queries,
        device=str(_pick_device(options.device)),
    )
    findings = measure(options.phase, plan)
    print(format_findings(findings))  # noqa: T201
    write_findings(findings, options.out)
    require(findings)


def _compare(options: argparse.Namespace) -> None:
    device = _pick_device(options.device)
    training = TinyTraining(load_tiny_config(options.config), options.out, device)
    plan = GatePlan(options.out, num_scenes=options.scenes, device=str(device))
    print(format_report(compare_stage1(training, options.seeds, options.steps, plan).figures))  # noqa: T201


def _pick_device(wanted: str) -> torch.device:
    has_cuda = torch.cuda.is_available()
    processes = PartialState(cpu=wanted == "cpu" or not has_cuda)
    if wanted == "auto":
        return torch.device("cuda", processes.local_process_index) if has_cuda else torch.device("cpu")
    kind, _, index = wanted.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdigit()):
        raise ConfigError(f"--device is {wanted!r}; choose auto, cpu, cuda or cuda:N")
    if kind == "cuda" and processes.num_processes > 1:
        raise ConfigError(f"--device is {wanted!r}, the same for all processes; leave it to auto")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"--device is {wanted!r}, and torch sees {torch.cuda.device_count()} CUDA devices")
    return torch.device(wanted)


def _evaluate(options: argparse.Namespace) -> None:
    plan = Plan(
        seed=options.seed,
        split=options.split,
        num_scenes=options.scenes,
        questions_per_scene=options.questions,
        num_reranked=options.reranked,
        tasks=tuple(options.tasks),
    )
    with ServerClient(options.url, options.concurrency) as client:
        figures = evaluate(client, plan, blind_checkpoint=options.blind)
    print(format_report(figures))  # noqa: T201
    if options.out:
        options.out.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
