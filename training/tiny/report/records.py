"""What the directory of a run holds, phase by phase, whether or not all of it is there yet."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import ConfigError
from training.tiny.gates import GATES, Findings, read_findings
from training.tiny.gates.findings import hash_weights

DEFAULT_IMAGE_SIZE = 96


@dataclass(frozen=True, slots=True)
class Origin:
    """What a phase was begun with, as its `run.json` has it."""

    config: dict[str, Any]
    git_revision: str
    torch: str


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """One phase. history: a row of figures for each logged step. findings: None until its gate is run.

    is_outdated: the weights have changed since the gate was run.
    """

    name: str
    is_finished: bool
    history: tuple[dict[str, float], ...]
    findings: Findings | None
    is_outdated: bool
    origin: Origin | None

    @property
    def gate_command(self) -> str:
        return f"python -m training gate {self.name}"

    @property
    def last_step(self) -> int:
        return int(self.history[-1]["step"]) if self.history else 0


def read_phases(out: Path) -> list[PhaseRecord]:
    """All phases of the run in `out`, those that were not begun included.

    Raises ConfigError where `out` holds nothing of a run, or a file in it cannot be read.
    """
    phases = [_read_phase(out, name) for name in GATES]
    if not any(phase.history or phase.is_finished or phase.findings for phase in phases):
        raise ConfigError(f"{out} holds no phase of a run; begin one: python -m training tiny --out {out}")
    return phases


def image_size_of(phases: list[PhaseRecord]) -> int:
    """The side of the images of a run, in pixels."""
    sizes = [phase.origin.config["world"]["image_size"] for phase in phases if phase.origin]
    return int(sizes[0]) if sizes else DEFAULT_IMAGE_SIZE


def _read_phase(out: Path, name: str) -> PhaseRecord:
    result = out / "model" / name
    findings = read_findings(out, name)
    is_finished = (result / "config.json").exists()
    return PhaseRecord(
        name=name,
        is_finished=is_finished,
        history=_read_history(out / name / "metrics.jsonl"),
        findings=findings,
        is_outdated=findings is not None and is_finished and findings.weights != hash_weights(result),
        origin=_read_origin(out / name / "run.json"),
    )


def _read_history(path: Path) -> tuple[dict[str, float], ...]:
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return tuple(json.loads(line) for line in lines if line.endswith("}"))  # the last may be half written


def _read_origin(path: Path) -> Origin | None:
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return Origin(run["config"], run["git_revision"] or "unknown", run["torch"])
    except (KeyError, ValueError) as exc:
        raise ConfigError(f"{path} is damaged ({exc!r}); copy it again, or delete it") from exc
