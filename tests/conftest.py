"""Fixtures that more than one test folder needs."""

from pathlib import Path

import pytest

from tests.builders import save_random_checkpoint


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stage2 directory of a small random checkpoint, with its frozen parts and stage1 beside it."""
    return save_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))
