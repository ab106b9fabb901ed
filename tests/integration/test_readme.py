"""The three commands of README, run unchanged against `tiny`, print the responses shown."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.integration.processes import service

ROOT = Path(__file__).parents[2]
SHOWN = re.findall(
    r"^```\n(curl .*?)\n```\n```json\n(.*?)\n```$",
    (ROOT / "README.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)


def assert_equal_up_to_rounding(shown: Any, given: Any) -> None:
    if isinstance(shown, dict):
        for key, value in shown.items():
            assert_equal_up_to_rounding(value, given[key])
    elif isinstance(shown, list):
        assert len(shown) == len(given)
        for one, other in zip(shown, given, strict=True):
            assert_equal_up_to_rounding(one, other)
    elif isinstance(shown, float):
        assert given == pytest.approx(shown, rel=0.1, abs=0.05)
    else:
        assert given == shown


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl; apt-get install curl")
def test_the_three_commands_print_the_answers_shown(tmp_path: Path) -> None:
    assert len(SHOWN) == 3
    with service(tmp_path, model="tiny") as server:
        for command, shown in SHOWN:
            local = command.replace("http://127.0.0.1:8000", server.url)
            printed = subprocess.run(["bash", "-c", local], cwd=ROOT, capture_output=True, check=True).stdout
            assert_equal_up_to_rounding(json.loads(shown), json.loads(printed))
