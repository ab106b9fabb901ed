"""The layout of the packages: no folder and no file too large to take in at once."""

import subprocess
from collections import Counter
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).parents[2]
MAX_FILES = 14  # side by side in one folder, `__init__` aside
MAX_LINES = 300
MEDIAN_LINES = (60, 130)
PACKAGES = ["model", "service", "training"]


def code_files(package: str) -> list[Path]:
    command = ["git", "ls-files", f"{package}/*.py"]
    names = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    return [path for name in names if (path := ROOT / name).exists() and path.name != "__init__.py"]


@pytest.mark.parametrize("package", PACKAGES)
def test_no_folder_holds_more_than_fourteen_files(package: str) -> None:
    folders = Counter(path.parent for path in code_files(package))
    assert {folder: count for folder, count in folders.items() if count > MAX_FILES} == {}


@pytest.mark.parametrize("package", [*PACKAGES, "benchmarks"])
def test_no_file_is_longer_than_three_hundred_lines(package: str) -> None:
    lengths = {path: len(path.read_text().splitlines()) for path in code_files(package)}
    assert {path: length for path, length in lengths.items() if length > MAX_LINES} == {}


@pytest.mark.parametrize("package", PACKAGES)
def test_the_median_file_is_neither_a_fragment_nor_a_volume(package: str) -> None:
    lengths = [len(path.read_text().splitlines()) for path in code_files(package)]
    least, most = MEDIAN_LINES
    assert least <= median(lengths) <= most
