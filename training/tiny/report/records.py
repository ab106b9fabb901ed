"""The state of a run's phases, loaded from its directory; unfinished phases included."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training.config import ConfigError
from training.provenance import hash_weight_files
from training.tiny.gates import GATES, GateResult, load_result

DEFAULT_IMAGE_SIZE = 96


@dataclass(frozen=True, slots=True)
class RunRecord:
    """The provenance of a phase: the content of its `run.json`."""

    config: dict[str, Any]
    git_revision: str
    torch: str


@dataclass(frozen=True, slots=True)
class PhaseRecord:
    """One phase. history: a row of figures for each logged step. result: None until its gate is run.

    is_outdated: the weights have changed since the gate was run. run: None until the phase is begun.
    """

    name: str
    is_finished: bool
    history: tuple[dict[str, float], ...]
    result: GateResult | None
    is_outdated: bool
    run: RunRecord | None

    @property
    def gate_command(self) -> str:
        return f"python -m training gate {self.name}"

    @property
    def last_step(self) -> int:
        return int(self.history[-1]["step"]) if self.history else 0


def load_phases(out: Path) -> list[PhaseRecord]:
    """Load all phases of the run in `out`, including those not begun.

    Raises ConfigError if `out` holds no phase of a run, or a file in it cannot be read.
    """
    phases = [_load_phase(out, name) for name in GATES]
    if not any(phase.history or phase.is_finished or phase.result for phase in phases):
        raise ConfigError(f"{out} holds no phase of a run; begin one: python -m training tiny --out {out}")
    return phases


def image_size_of(phases: list[PhaseRecord]) -> int:
    """Return the image side of a run in pixels."""
    sizes = [phase.run.config["world"]["image_size"] for phase in phases if phase.run]
    return int(sizes[0]) if sizes else DEFAULT_IMAGE_SIZE


def _load_phase(out: Path, name: str) -> PhaseRecord:
    directory = out / "model" / name
    result = load_result(out, name)
    is_finished = (directory / "config.json").exists()
    return PhaseRecord(
        name=name,
        is_finished=is_finished,
        history=_load_history(out / name / "metrics.jsonl"),
        result=result,
        is_outdated=result is not None
        and is_finished
        and result.weights_hash != hash_weight_files(directory),
        run=_load_run(out / name / "run.json"),
    )


def _load_history(path: Path) -> tuple[dict[str, float], ...]:
    rows = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return tuple(json.loads(row) for row in rows if row.endswith("}"))  # a kill can cut the last row


def _load_run(path: Path) -> RunRecord | None:
    if not path.exists():
        return None
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        return RunRecord(run["config"], run["git_revision"] or "unknown", run["torch"])
    except (KeyError, ValueError) as exc:
        raise ConfigError(f"{path} is damaged ({exc!r}); copy it again, or delete it") from exc
