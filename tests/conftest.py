"""Fixtures that several test folders use."""

from pathlib import Path

import pytest

from tests.builders import save_random_checkpoint


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small random checkpoint with its frozen parts and stage1; return the stage2 directory."""
    return save_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))
