"""Checkpoints that a test may damage."""

import shutil
from pathlib import Path

import pytest


@pytest.fixture
def checkpoint(random_checkpoint: Path, tmp_path: Path) -> Path:
    """Copy the random checkpoint's stage2 directory, with all directories that it names."""
    shutil.copytree(random_checkpoint.parent, tmp_path / "checkpoint")
    return tmp_path / "checkpoint" / "stage2"
