"""A control group of Linux that limits the memory of a process and its children, as a container does."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_V1, _V2 = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
_HOW = "run the tests as root on Linux, with /sys/fs/cgroup writable"


class MemoryCgroup:
    """A control group of version 1 or 2. num_kills: of its processes, so far, for lack of memory."""

    def __init__(self, directory: Path, limit_bytes: int) -> None:
        self._directory = directory
        self._is_v1 = (directory / "memory.limit_in_bytes").exists()
        limit = "memory.limit_in_bytes" if self._is_v1 else "memory.max"
        (directory / limit).write_text(str(limit_bytes))

    def add(self, pid: int) -> None:
        """Move a process into the group; its children will be in it too."""
        (self._directory / "cgroup.procs").write_text(str(pid))

    @property
    def num_kills(self) -> int:
        name = "memory.oom_control" if self._is_v1 else "memory.events"
        fields = dict(line.split() for line in (self._directory / name).read_text().splitlines())
        return int(fields["oom_kill"])


@contextmanager
def memory_cgroup(limit_bytes: int) -> Iterator[MemoryCgroup]:
    """Make a group for the block; skip the test where none can be made. Its processes must end within it."""
    root = _V1 if _V1.is_dir() else _V2
    directory = root / f"blip2-test-{os.getpid()}"
    try:
        directory.mkdir()
    except OSError as exc:
        pytest.skip(f"no control group can be made ({exc}); {_HOW}")
    try:
        if not {"memory.limit_in_bytes", "memory.max"} & {path.name for path in directory.iterdir()}:
            pytest.skip(f"the control group has no limit of memory; {_HOW}")
        yield MemoryCgroup(directory, limit_bytes)
    finally:
        directory.rmdir()
