"""The report of a run: one HTML file that needs nothing else."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from training.tiny.comparison import read_comparison
from training.tiny.gates import Findings
from training.tiny.gates.findings import Ranking, SceneSample, Statement
from training.tiny.report.charts import draw_curves
from training.tiny.report.pictures import Album, Picture
from training.tiny.report.records import PhaseRecord, image_size_of, read_phases
from training.tiny.report.tables import group_rows

REPORT_FILE = "report.html"
_NUM_SHEETS = 3  # rankings of each direction and split


@dataclass(frozen=True, slots=True)
class ShownScene:
    """A scene with what was said of it."""

    picture: Picture
    split: str
    statements: tuple[Statement, ...]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One thing that a query found; `is_right` where it belongs to the query."""

    picture: Picture
    score: float
    is_right: bool


@dataclass(frozen=True, slots=True)
class Sheet:
    """A query, whose text or image is that of `query`, with what it found; rank 0 is right."""

    asks_text: bool
    query: Picture
    split: str
    rank: int
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True, slots=True)
class Examples:
    """What a gate showed of one phase: as it comes, and at its worst."""

    phase: str
    samples: tuple[ShownScene, ...]
    mistakes: tuple[ShownScene, ...]
    sheets: tuple[Sheet, ...]
    wrong_sheets: tuple[Sheet, ...]


def write_report(out: Path) -> Path:
    """Writes `<out>/report.html` of what the run has come to so far, and returns its path."""
    phases = read_phases(out)
    comparison = read_comparison(out)
    album = Album(image_size_of(phases))
    template = _environment().get_template("template.html.j2")
    page = template.render(
        out=out,
        phases=phases,
        charts={phase.name: draw_curves(phase.history, phase.name) for phase in phases},
        tables={
            phase.name: group_rows(phase.findings.measured.figures) for phase in phases if phase.findings
        },
        comparison=comparison,
        comparison_tables=group_rows(comparison.figures) if comparison else [],
        examples=list(_collect_examples(phases, album)),
        origins=[(phase.name, phase.origin) for phase in phases if phase.origin],
    )
    path = out / REPORT_FILE
    path.write_text(page, encoding="utf-8")
    return path


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["words"] = lambda name: name.replace("_", " ")
    environment.filters["tidy"] = lambda text: text.replace(" ,", ",").replace(" ?", "?")
    return environment


def _collect_examples(phases: Sequence[PhaseRecord], album: Album) -> Iterator[Examples]:
    for phase in phases:
        if phase.findings is None:
            continue
        findings, measured = phase.findings, phase.findings.measured
        yield Examples(
            phase=phase.name,
            samples=tuple(_show_scene(sample, findings, album) for sample in measured.samples),
            mistakes=tuple(_show_scene(sample, findings, album) for sample in measured.mistakes),
            sheets=tuple(
                _show_ranking(each, findings, album) for each in measured.rankings if each.query < _NUM_SHEETS
            ),
            wrong_sheets=tuple(_show_ranking(each, findings, album) for each in measured.misrankings),
        )


def _show_scene(sample: SceneSample, findings: Findings, album: Album) -> ShownScene:
    picture = album.scene(findings.seed, sample.split, sample.index)
    return ShownScene(picture, sample.split, sample.statements)


def _show_ranking(ranking: Ranking, findings: Findings, album: Album) -> Sheet:
    def picture(index: int) -> Picture:
        return album.gallery_scene(findings.seed, ranking.split, findings.num_scenes, index)

    return Sheet(
        asks_text=ranking.direction == "text to image",
        query=picture(ranking.query),
        split=ranking.split,
        rank=ranking.rank,
        candidates=tuple(
            Candidate(picture(index), score, index == ranking.query) for index, score in ranking.best
        ),
    )
