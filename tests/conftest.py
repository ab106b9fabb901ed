"""Fixtures that several test folders use."""

import os
from pathlib import Path

import pytest

from tests.builders import save_random_checkpoint


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a small random checkpoint with its frozen parts and stage1; return the stage2 directory."""
    return save_random_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def public_directory() -> Path:
    """Return the directory of published configurations and tokenizers, that of TEST_PUBLIC."""
    if not (named := os.environ.get("TEST_PUBLIC")):
        pytest.skip("TEST_PUBLIC names no directory of published files: TEST_PUBLIC=DIR pytest -m public")
    directory = Path(named)
    assert (directory / "blip2-opt-2.7b" / "tokenizer.json").is_file(), f"TEST_PUBLIC={named} holds none"
    return directory
