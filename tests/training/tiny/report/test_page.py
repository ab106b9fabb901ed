"""The report of a small hand-made run: complete, valid HTML, self-contained."""

import json
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import pytest

from training.__main__ import main
from training.config import ConfigError
from training.provenance import hash_weight_files
from training.tiny.gates import GATES, Bar, GateResult, save_result
from training.tiny.gates.results import Measurement, Prediction, Ranking, ScenePredictions
from training.tiny.report.page import write_report
from training.world.scenes import sample_scene

VOID = frozenset(("meta", "img", "br"))
FOREIGN = frozenset(("path", "use", "rect", "g", "defs"))  # in SVG these may close themselves


class Page(HTMLParser):
    """The elements and the text of a page; raises AssertionError for a tag closed wrongly or never."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open_tags: list[str] = []
        self.feed(html)
        self.close()
        assert not self.open_tags
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open_tags.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in VOID | FOREIGN, tag
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open_tags.pop() == tag, tag

    def handle_data(self, data: str) -> None:
        self.text += f"{data} "

    def values(self, *names: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.elements for name in names if name in attrs]


def predict(question: str, text: str, truth: str, *, score: float = -0.1) -> Prediction:
    return Prediction(question, "color" if question else "caption", text, truth, text == truth, score)


def generated() -> Measurement:
    right = predict("what color is the star ?", "red", "red")
    wrong = predict("is there a blue cross ?", "<b>yes</b>", "no")
    caption = predict("", "a red star , a blue cross", "a red star , a blue cross")
    return Measurement(
        figures={"questions, unseen": {"overall": 0.5}, "questions, held-out": {"overall": 0.25}},
        bars=(Bar("unseen: questions", 0.5, 0.9), Bar("held-out: questions", 0.25, 0.2)),
        samples=(ScenePredictions("unseen", 0, (caption, right, wrong)),),
        mistakes=(ScenePredictions("held-out", 3, (wrong,)),),
    )


def ranked() -> Measurement:
    rankings = (
        Ranking("unseen", "text to image", 0, 0, ((0, 4.5), (2, 1.25))),
        Ranking("unseen", "image to text", 1, 3, ((3, 2.0), (0, 1.0))),
    )
    return Measurement(
        {"image to text": {"R@1": 0.75}}, (Bar("R@1", 1.0, 0.9),), (), (), rankings, rankings[1:]
    )


def write_history(out: Path, phase: str) -> None:
    (out / phase).mkdir(parents=True, exist_ok=True)
    rows = [{"step": 20 * k, "loss": 3 / k, "loss_itc": 2 / k} for k in range(1, 30)]
    json_rows = [json.dumps(row) for row in rows]
    (out / phase / "metrics.jsonl").write_text("\n".join([*json_rows, '{"step": 600, "lo']))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with two finished phases, a gate of one of them, and a gate of a third on other weights."""
    for phase in ("stage1", "stage2"):
        write_history(tmp_path, phase)
        result = tmp_path / "model" / phase
        result.mkdir(parents=True)
        (result / "config.json").write_text("{}")
        (result / "adapter.safetensors").write_bytes(phase.encode())
    origin = {
        "config": {"seed": 7, "world": {"image_size": 32}},
        "git_revision": "abc1234",
        "torch": "2.13.0",
    }
    (tmp_path / "stage2" / "run.json").write_text(json.dumps(origin))
    weights_hash = hash_weight_files(tmp_path / "model" / "stage2")
    save_result(GateResult("stage2", 2, 5, weights_hash, generated()), tmp_path)
    save_result(GateResult("retrieval", 2, 5, "of others", ranked()), tmp_path)
    return tmp_path


@pytest.fixture
def page(run: Path) -> Page:
    return Page(write_report(run).read_text(encoding="utf-8"))


def test_the_page_needs_nothing_from_elsewhere(run: Path, page: Page) -> None:
    html = (run / "report.html").read_text(encoding="utf-8")
    assert "http" not in html
    assert "@import" not in html
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.elements}
    targets = page.values("src", "href", "xlink:href")
    assert targets
    assert all(target.startswith(("data:image/jpeg;base64,", "#")) for target in targets)


def test_every_reference_inside_the_page_has_its_one_target(run: Path, page: Page) -> None:
    counts = Counter(page.values("id"))
    assert max(counts.values()) == 1
    html = (run / "report.html").read_text(encoding="utf-8")
    references = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)|aria-labelledby="([^"]+)"', html)
    assert {name for names in references for name in names if name} <= counts.keys()


def test_every_image_and_chart_has_words_in_its_place(page: Page) -> None:
    images = [attrs for tag, attrs in page.elements if tag == "img"]
    charts = [attrs for tag, attrs in page.elements if tag == "svg"]
    assert all(attrs["alt"] for attrs in images)
    assert any("on a" in (attrs["alt"] or "") for attrs in images)
    assert [attrs["role"] for attrs in charts] == ["img"] * 4  # two phases, each with a loss and a part of it
    assert all(attrs["aria-label"] for attrs in charts)


def test_the_summary_says_which_bars_are_missed_and_which_gates_were_not_run(page: Page) -> None:
    assert "✗ 1 of 2 bars missed" in page.text
    assert "✓ 1 bar met" in page.text
    assert page.text.count("not begun") == len(GATES) - 2
    for phase in GATES.keys() - {"stage2", "retrieval"}:
        assert f"python -m training gate {phase} --out" in page.text
    assert "unseen: questions 0.500 0.900 ✗ missed" in page.text
    assert "held-out: questions 0.250 0.200 ✓ met" in page.text


def test_predictions_are_marked_escaped_and_shown_with_the_truth(page: Page) -> None:
    assert "✓ right: what color is the star? red" in page.text
    assert "✗ wrong: is there a blue cross? <b>yes</b> true: no" in page.text
    assert not any(tag == "b" for tag, _ in page.elements)
    assert "a red star, a blue cross" in page.text


def test_rankings_show_scores_the_right_one_and_where_it_came(page: Page) -> None:
    assert "4.50 right" in page.text
    assert "the right one came first" in page.text
    assert "the right one came in at place 4" in page.text


def test_how_to_reproduce_names_seed_revision_and_versions(page: Page) -> None:
    assert "stage2 7 abc1234 2.13.0" in page.text
    assert '"image_size": 32' in page.text


def test_a_gate_that_was_run_on_other_weights_says_so(run: Path) -> None:
    warning = "measured on other weights than those of now"
    assert warning not in Page(write_report(run).read_text(encoding="utf-8")).text
    (run / "model" / "stage2" / "adapter.safetensors").write_bytes(b"trained once more")
    assert warning in Page(write_report(run).read_text(encoding="utf-8")).text


def test_a_run_that_has_only_begun_is_reported(tmp_path: Path) -> None:
    write_history(tmp_path, "vision_model")
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert "vision_model at step 580" in page.text  # the half-written line behind it is left out
    assert "None yet" in page.text


def test_the_command_writes_the_page_and_trains_nothing(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path for path in run.rglob("*") if path.is_file()}
    assert main(["tiny", "--report", "--out", str(run)]) == 0
    assert {path for path in run.rglob("*") if path.is_file()} - before == {run / "report.html"}
    assert capsys.readouterr().out.strip() == str(run / "report.html")


def test_a_directory_without_a_run_is_refused_with_the_command_that_begins_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds no phase of a run; begin one: python -m training tiny"):
        write_report(tmp_path)


def test_a_scene_of_a_gate_is_drawn_as_it_was_measured(run: Path, page: Page) -> None:
    shown = {attrs["alt"] for tag, attrs in page.elements if tag == "img"}
    for split, index in (("unseen", 0), ("held-out", 3)):
        scene = sample_scene(2, split, index)  # type: ignore[arg-type]
        assert any(alt is not None and alt.endswith(f"on a {scene.background} background") for alt in shown)
