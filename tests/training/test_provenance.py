import json
from dataclasses import replace
from pathlib import Path

import pytest

from training.config import ConfigError
from training.provenance import record_run
from training.tiny.config import load_tiny_config

CONFIG = load_tiny_config()


def test_the_resolved_configuration_is_kept_and_the_same_one_may_go_on(tmp_path: Path) -> None:
    record_run(tmp_path / "stage2", CONFIG)
    record_run(tmp_path / "stage2", CONFIG)
    run = json.loads((tmp_path / "stage2" / "run.json").read_text())
    assert run["config"]["stage2"]["steps"] == CONFIG.stage2.steps
    assert set(run) == {"config", "git_revision", "torch"}


def test_another_configuration_may_not_go_on(tmp_path: Path) -> None:
    record_run(tmp_path, CONFIG)
    changed = replace(CONFIG, stage2=replace(CONFIG.stage2, learning_rate=0.5))
    with pytest.raises(ConfigError, match=r"begun with stage2\.learning_rate=0\.001, it is 0\.5 now"):
        record_run(tmp_path, changed)
