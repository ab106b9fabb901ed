"""What a gate found: figures, the bars they must clear, and examples; kept as `gate.json`."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import TypeAdapter, ValidationError

from training.config import ConfigError
from training.evaluation.metrics import Figures
from training.world.scenes import Split

GATE_FILE = "gate.json"
Direction = Literal["image to text", "text to image"]


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and the least it may be."""

    name: str
    value: float
    minimum: float

    @property
    def met(self) -> bool:
        return self.value >= self.minimum


@dataclass(frozen=True, slots=True)
class Statement:
    """What a model said of a scene: the answer to `question`, or where that is empty, a caption.

    truth: the only right answer, or a caption that names everything. score: as `Generation` has it.
    """

    question: str
    family: str
    said: str
    truth: str
    right: bool
    score: float


@dataclass(frozen=True, slots=True)
class SceneSample:
    """Statements about scene `index` of a split."""

    split: Split
    index: int
    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Ranking:
    """What one query of the gallery found: `best` has the first candidates with their scores, best first.

    Image and caption of a scene have the same number, so the right candidate is `query`; it came in at
    `rank` (0: first).
    """

    split: Split
    direction: Direction
    query: int
    rank: int
    best: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Measured:
    """What measuring gives. Examples are the first of their split, mistakes the worst of all."""

    figures: dict[str, Figures]
    bars: tuple[Bar, ...]
    samples: tuple[SceneSample, ...] = ()
    mistakes: tuple[SceneSample, ...] = ()
    rankings: tuple[Ranking, ...] = ()
    misrankings: tuple[Ranking, ...] = ()


@dataclass(frozen=True, slots=True)
class Findings:
    """What was measured of a phase, on `num_scenes` scenes of each split drawn with `seed`.

    weights: the hash of the weights it was measured on.
    """

    phase: str
    seed: int
    num_scenes: int
    weights: str
    measured: Measured

    @property
    def missed(self) -> tuple[Bar, ...]:
        return tuple(bar for bar in self.measured.bars if not bar.met)


_FINDINGS = TypeAdapter(Findings)


def write_findings(findings: Findings, out: Path) -> Path:
    """Writes `<out>/<phase>/gate.json` and returns its path."""
    path = out / findings.phase / GATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_FINDINGS.dump_json(findings, indent=2) + b"\n")
    return path


def read_findings(out: Path, phase: str) -> Findings | None:
    """What was found of a phase, or None where its gate has not been run.

    Raises ConfigError where the file is of another release or damaged.
    """
    path = out / phase / GATE_FILE
    if not path.exists():
        return None
    try:
        return _FINDINGS.validate_json(path.read_bytes())
    except ValidationError as exc:
        where = exc.errors()[0]["loc"]
        raise ConfigError(f"{path} cannot be read ({where}); run the gate {phase} again") from exc


def hash_weights(directory: Path) -> str:
    """SHA-256 of the weight files of a result, "" where there are none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        return ""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()
