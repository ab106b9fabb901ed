"""The report of a run: one self-contained HTML file."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from training.evaluation.tables import group_rows
from training.tiny.comparison import load_comparison
from training.tiny.gates import GateResult
from training.tiny.gates.results import Prediction, Ranking, ScenePredictions
from training.tiny.report.charts import draw_curves
from training.tiny.report.records import PhaseRecord, image_size_of, load_phases
from training.tiny.report.rendered_scenes import RenderedScene, SceneRenderer

REPORT_FILE = "report.html"
_NUM_RANKINGS = 3  # of each direction and split


@dataclass(frozen=True, slots=True)
class SceneCard:
    """A scene with the predictions about it."""

    image: RenderedScene
    split: str
    predictions: tuple[Prediction, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One candidate of a ranking; `is_correct` if it is the query's pair."""

    scene: RenderedScene
    score: float
    is_correct: bool


@dataclass(frozen=True, slots=True)
class RankingCard:
    """A query, which is the text or the image of `query`, with its best candidates; rank 0 is correct."""

    is_text_query: bool
    query: RenderedScene
    split: str
    rank: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Examples:
    """The examples of one phase's gate: samples and the worst mistakes."""

    phase: str
    samples: tuple[SceneCard, ...]
    mistakes: tuple[SceneCard, ...]
    rankings: tuple[RankingCard, ...]
    misrankings: tuple[RankingCard, ...]


def write_report(out: Path) -> Path:
    """Write `<out>/report.html` about the current state of the run, and return its path."""
    phases = load_phases(out)
    comparison = load_comparison(out)
    renderer = SceneRenderer(image_size_of(phases))
    template = _build_environment().get_template("template.html.j2")
    page = template.render(
        out=out,
        phases=phases,
        charts={phase.name: draw_curves(phase.history, phase.name) for phase in phases},
        tables={phase.name: group_rows(phase.result.measured.figures) for phase in phases if phase.result},
        comparison=comparison,
        comparison_tables=group_rows(comparison.figures) if comparison else [],
        examples=list(_collect_examples(phases, renderer)),
        runs=[(phase.name, phase.run) for phase in phases if phase.run],
    )
    path = out / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    return path


def _build_environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = lambda name: name.replace("_", " ")
    environment.filters["detokenize"] = lambda text: text.replace(" ,", ",").replace(" ?", "?")
    return environment


def _collect_examples(phases: Sequence[PhaseRecord], renderer: SceneRenderer) -> Iterator[Examples]:
    for phase in phases:
        if phase.result is None:
            continue
        result, measured = phase.result, phase.result.measured
        yield Examples(
            phase=phase.name,
            samples=tuple(_scene_card(sample, result, renderer) for sample in measured.samples),
            mistakes=tuple(_scene_card(sample, result, renderer) for sample in measured.mistakes),
            rankings=tuple(
                _ranking_card(each, result, renderer)
                for each in measured.rankings
                if each.query < _NUM_RANKINGS
            ),
            misrankings=tuple(_ranking_card(each, result, renderer) for each in measured.misrankings),
        )


def _scene_card(sample: ScenePredictions, result: GateResult, renderer: SceneRenderer) -> SceneCard:
    image = renderer.scene(result.seed, sample.split, sample.index)
    return SceneCard(image, sample.split, sample.predictions)


def _ranking_card(ranking: Ranking, result: GateResult, renderer: SceneRenderer) -> RankingCard:
    def render(index: int) -> RenderedScene:
        return renderer.gallery_scene(result.seed, ranking.split, result.num_scenes, index)

    return RankingCard(
        is_text_query=ranking.direction == "text to image",
        query=render(ranking.query),
        split=ranking.split,
        rank=ranking.rank,
        candidates=tuple(
            Candidate(render(index), score, index == ranking.query) for index, score in ranking.best
        ),
    )
