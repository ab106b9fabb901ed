"""Runs the gate of a phase: measures, and says which bars are met."""

from collections.abc import Callable, Mapping

from model.errors import CheckpointError
from training.tiny.gates.findings import Bar, Findings, Measured, hash_weights
from training.tiny.gates.language import measure_language_model
from training.tiny.gates.plan import Plan
from training.tiny.gates.retrieval import measure_retrieval, measure_stage1
from training.tiny.gates.stage2 import measure_stage2
from training.tiny.gates.vision import measure_vision_model
from training.tiny.report import format_report, markdown_row

Gate = Callable[[str, Plan], Measured]  # of a phase by its name

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
    """A finished phase is below a bar; the message names each with figure and minimum."""


def measure(phase: str, plan: Plan, gates: Mapping[str, Gate] = GATES) -> Findings:
    """Measures the finished result of a phase. Raises CheckpointError where there is none."""
    directory = plan.result(phase)
    if not directory.is_dir():
        raise CheckpointError(
            f"{directory} does not exist; finish the phase first: "
            f"python -m training tiny --out {plan.out} --only {phase}"
        )
    weights = hash_weights(directory)
    return Findings(phase, plan.seed, plan.num_scenes, weights, gates[phase](phase, plan))


def require(findings: Findings) -> None:
    """Raises GateMissedError where a bar is missed."""
    if findings.missed:
        bars = "; ".join(
            f"{bar.name} is {bar.value:.3f}, at least {bar.minimum:.3f}" for bar in findings.missed
        )
        raise GateMissedError(
            f"{findings.phase} misses {len(findings.missed)} of {len(findings.measured.bars)} bars: {bars}"
        )


def format_findings(findings: Findings) -> str:
    """Figures and bars as Markdown tables."""
    tables = [format_report(findings.measured.figures)]
    if findings.measured.bars:
        tables.append(_format_bars(findings.measured.bars))
    return "\n\n".join(tables)


def _format_bars(bars: tuple[Bar, ...]) -> str:
    rows = [["bar", "figure", "at least", ""], ["---"] * 4]
    rows += [
        [bar.name, f"{bar.value:.3f}", f"{bar.minimum:.3f}", "met" if bar.met else "MISSED"] for bar in bars
    ]
    return "\n".join(markdown_row(row) for row in rows)
