"""The documents on settings and metrics agree with the code."""

import re
from pathlib import Path

from service.runtime.metrics import Metrics
from service.runtime.settings import Settings

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


def test_every_setting_and_its_default_is_in_the_table_and_no_other() -> None:
    rows = re.findall(
        r"^\| `BLIP2_([A-Z0-9_]+)` \| `([^`]*)` \|", (DOCS / "settings.md").read_text(), re.MULTILINE
    )
    defaults = {name.upper(): str(field.default) for name, field in Settings.model_fields.items()}
    assert dict(rows) == {name: "unset" if value == "None" else value for name, value in defaults.items()}


def test_the_table_of_metrics_names_those_that_are_exported_and_no_others() -> None:
    table = re.findall(r"^\| (`blip2_.*?) \|", (DOCS / "serving.md").read_text(), re.MULTILINE)
    documented = {name for row in table for name in re.findall(r"`(blip2_\w+)", row)}
    exported = {
        f"{metric.name}_total" if metric.type == "counter" else metric.name
        for metric in Metrics().registry.collect()
        if metric.name.startswith("blip2_")
    }
    assert documented == exported


def test_the_files_that_the_architecture_names_exist() -> None:
    text = (DOCS / "architecture.md").read_text()
    named = set(re.findall(r"`((?:model|service|training|tests)/[\w./]+?)/?`", text))
    assert len(named) > 30
    assert {name for name in named if not (ROOT / name).exists()} == set()
