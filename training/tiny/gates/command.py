"""The command `gate`: measures the result of a phase and compares the figures with its bars."""

from collections.abc import Callable, Mapping

from model.errors import CheckpointError
from training.evaluation.tables import format_tables, markdown_row
from training.provenance import hash_weight_files
from training.tiny.gates.language import measure_language_model
from training.tiny.gates.plan import GatePlan
from training.tiny.gates.results import Bar, GateResult, Measurement
from training.tiny.gates.retrieval import measure_retrieval, measure_stage1
from training.tiny.gates.stage2 import measure_stage2
from training.tiny.gates.vision import measure_vision_model

Gate = Callable[[str, GatePlan], Measurement]  # of a phase by its name

GATES: Mapping[str, Gate] = {
    "vision_model": measure_vision_model,
    "language_model": measure_language_model,
    "stage1": measure_stage1,
    "retrieval": measure_retrieval,
    "stage2": measure_stage2,
    "language_model_t5": measure_language_model,
    "stage2_t5": measure_stage2,
}


class GateMissedError(Exception):
    """A figure of a finished phase is below its bar; the message names each with figure and minimum."""


def measure(phase: str, plan: GatePlan, gates: Mapping[str, Gate] = GATES) -> GateResult:
    """Measure the result of a phase. Raises CheckpointError if there is none."""
    directory = plan.result(phase)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} does not exist; finish the phase first: "
            f"python -m training tiny --out {plan.out} --only {phase}"
        )
    weights_hash = hash_weight_files(directory)
    return GateResult(phase, plan.seed, plan.num_scenes, weights_hash, gates[phase](phase, plan))


def require(result: GateResult) -> None:
    """Raise GateMissedError if a bar is missed."""
    if result.missed:
        bars = "; ".join(
            f"{bar.name} is {bar.value:.3f}, at least {bar.minimum:.3f}" for bar in result.missed
        )
        raise GateMissedError(
            f"{result.phase} misses {len(result.missed)} of {len(result.measured.bars)} bars: {bars}"
        )


def format_result(result: GateResult) -> str:
    """Format figures and bars as Markdown tables."""
    tables = [format_tables(result.measured.figures)]
    if result.measured.bars:
        tables.append(_format_bars(result.measured.bars))
    return "\n\n".join(tables)


def _format_bars(bars: tuple[Bar, ...]) -> str:
    rows = [["bar", "figure", "at least", ""], ["---"] * 4]
    rows += [
        [bar.name, f"{bar.value:.3f}", f"{bar.minimum:.3f}", "met" if bar.met else "MISSED"] for bar in bars
    ]
    return "\n".join(markdown_row(row) for row in rows)
