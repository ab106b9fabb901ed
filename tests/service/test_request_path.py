"""The path of a caption through `service/`, traced, is the one that docs/architecture.md lists."""

import asyncio
import contextlib
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from service.runtime.loading import load_backend
from service.runtime.settings import Settings
from tests.service.fakes import png
from tests.service.running import site

ROOT = Path(__file__).parents[2]
SERVICE = ROOT / "service"
MAX_FILES = 23


class FileTrace:
    """Records the files of `service/` whose functions are called in any thread, while it is on.

    The watchdog runs beside the request and is left out.
    """

    def __init__(self) -> None:
        self.is_on = False
        self.files: set[str] = set()

    def __call__(self, stack_frame: FrameType, event: str, _argument: object) -> None:
        if self.is_on and event == "call" and not _is_watchdog():
            path = Path(stack_frame.f_code.co_filename)
            if stack_frame.f_code.co_name != "<module>" and path.is_relative_to(SERVICE):
                self.files.add(path.relative_to(ROOT).as_posix())


def _is_watchdog() -> bool:
    with contextlib.suppress(RuntimeError):  # of threads without an event loop
        task = asyncio.current_task()
        return task is not None and task.get_name() == "watchdog"
    return False


@pytest.fixture
def trace() -> Iterator[FileTrace]:
    recorded = FileTrace()
    threading.setprofile(recorded)  # for the threads that start from now on
    sys.setprofile(recorded)
    yield recorded
    sys.setprofile(None)
    threading.setprofile(None)


async def test_the_files_a_caption_visits_are_those_of_the_document(
    random_checkpoint: Path, trace: FileTrace
) -> None:
    backend = load_backend(Settings(model=str(random_checkpoint), device="cpu"))
    async with site(backend) as running:
        trace.is_on = True
        response = await running.client.post("/caption", files={"image": png(77)})
        trace.is_on = False
    assert response.status_code == 200
    assert trace.files == documented_files()
    assert len(trace.files) <= MAX_FILES


def documented_files() -> set[str]:
    """Return the files in the table of docs/architecture.md under "The path of a caption"."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    _, _, section = text.partition("\n## The path of a caption\n")
    section, _, _ = section.partition("\n## ")
    return set(re.findall(r"`(service/[\w/]+\.py)`", section))
