"""Resident memory of a process and its descendants. Linux only: it is read from /proc."""

from pathlib import Path


def resident_bytes(pid: int) -> int:
    """Return the resident memory of a process and its descendants; each shared page counts once."""
    return sum(own_bytes(each) for each in [pid, *descendants(pid)])


def descendants(pid: int) -> list[int]:
    """Return the process ids of all descendants."""
    children = [
        int(child) for path in Path(f"/proc/{pid}/task").glob("*/children") for child in _read(path).split()
    ]
    return [found for child in children for found in (child, *descendants(child))]


def own_bytes(pid: int) -> int:
    """Return the resident memory of a process without its descendants; of a shared page, its share."""
    lines = _read(Path(f"/proc/{pid}/smaps_rollup")).splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # it has ended meanwhile
        return ""
