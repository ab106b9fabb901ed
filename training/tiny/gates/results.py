"""The result of a gate: figures, the bars they must reach, and examples; stored as `gate.json`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from training.config import ConfigError
from training.evaluation.metrics import Figures
from training.world.scenes import Split

GATE_FILE = "gate.json"
Direction = Literal["image to text", "text to image"]


@dataclass(frozen=True, slots=True)
class Bar:
    """A figure and its required minimum."""

    name: str
    value: float
    minimum: float

    @property
    def met(self) -> bool:
        return self.value >= self.minimum


@dataclass(frozen=True, slots=True)
class Prediction:
    """A generated text about a scene: the answer to `question` or, if that is empty, a caption.

    truth: the only right answer, or the full listing. score: as in `Generation`.
    """

    question: str
    question_type: Annotated[str, Field(alias="family")]
    text: Annotated[str, Field(alias="said")]
    truth: str
    is_correct: Annotated[bool, Field(alias="right")]
    score: float


@dataclass(frozen=True, slots=True)
class ScenePredictions:
    """Predictions about scene `index` of a split."""

    split: Split
    index: int
    predictions: Annotated[tuple[Prediction, ...], Field(alias="statements")]


@dataclass(frozen=True, slots=True)
class Ranking:
    """The ranking of one retrieval query: `best` holds the first candidates with their scores, best first.

    Image and caption of a scene have the same index, so the correct candidate is `query`; its rank is `rank`
    (0: first).
    """

    split: Split
    direction: Direction
    query: int
    rank: int
    best: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Figures, bars and examples. Samples are the first of their split, mistakes the worst of all."""

    figures: dict[str, Figures]
    bars: tuple[Bar, ...]
    samples: tuple[ScenePredictions, ...] = ()
    mistakes: tuple[ScenePredictions, ...] = ()
    rankings: tuple[Ranking, ...] = ()
    misrankings: tuple[Ranking, ...] = ()


@dataclass(frozen=True, slots=True)
class GateResult:
    """The measurement of a phase on `num_scenes` scenes of each split, sampled with `seed`.

    weights_hash: of the measured weights.
    """

    phase: str
    seed: int
    num_scenes: int
    weights_hash: Annotated[str, Field(alias="weights")]
    measured: Measurement

    @property
    def missed(self) -> tuple[Bar, ...]:
        return tuple(bar for bar in self.measured.bars if not bar.met)


_GATE_RESULT = TypeAdapter(GateResult)


def save_result(result: GateResult, out: Path) -> Path:
    """Save `<out>/<phase>/gate.json` and return its path."""
    path = out / result.phase / GATE_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(_GATE_RESULT.dump_json(result, indent=2, by_alias=True) + b"\n")
    return path


def load_result(out: Path, phase: str) -> GateResult | None:
    """Load the gate result of a phase; None if its gate has not been run.

    Raises ConfigError if the file is damaged or of another release.
    """
    path = out / phase / GATE_FILE
    if not path.exists():
        return None
    try:
        return _GATE_RESULT.validate_json(path.read_bytes())
    except ValidationError as exc:
        location = exc.errors()[0]["loc"]
        raise ConfigError(f"{path} cannot be read ({location}); run the gate {phase} again") from exc
