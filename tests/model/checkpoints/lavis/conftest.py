"""A folder of LAVIS files."""

from pathlib import Path

import pytest

from tests.model.checkpoints.lavis.lavis_files import Folder


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)
