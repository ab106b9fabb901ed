"""Image files that cost far more than they weigh: refused or contained, and nobody else waits for them."""

import os
import signal
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import httpx
import pytest
from PIL import Image

from benchmarks.process_memory import descendants
from tests.attacks.harness import MemoryWatch, bystander
from tests.image_files import (
    bmp_of_short_rows,
    encode,
    jpeg_of_scans,
    noise,
    png,
    png_chunk,
    png_of_zeros,
    tiff,
)
from tests.integration.processes import ServiceProcess, poll, service
from tests.isobmff_files import picture_file

pytestmark = pytest.mark.serial

MIB = 2**20
# The budget of large images, two small ones, what a request holds of its file, and allocators' noise.
MAX_GROWTH_BYTES = 800 * MIB
MAX_KEPT_BYTES = 200 * MIB
MAX_ATTACK_S = 60.0  # of two seconds of CPU time, on a busy machine
KINDS = ["AVIF", "HEIC"]
HUGE_TILE = [
    (259, 3, 1, b"\5\0\0\0"),
    (322, 4, 1, struct.pack("<I", 45_008)),
    (323, 4, 1, struct.pack("<I", 45_008)),
]


def gif_of_canvas(width: int, height: int) -> bytes:
    data = bytearray(encode(noise(8, 8).convert("P"), "GIF"))
    data[6:10] = struct.pack("<HH", width, height)
    return bytes(data)


def jpeg2000_claiming(width: int, height: int) -> bytes:
    data = encode(Image.new("RGB", (64, 64)), "JPEG2000", no_jp2=True)
    return data[:8] + struct.pack(">8I", width, height, 0, 0, 512, 512, 0, 0) + data[40:]


# Each: a function that makes the files which are sent at once, and the statuses that may answer them.
ATTACKS: dict[str, tuple[Callable[[], list[bytes]], set[int]]] = {
    "a jpeg of 600 scans": (lambda: [jpeg_of_scans(600, (3000, 3000))] * 4, {422}),
    "jpegs of as many scans as are taken": (
        lambda: [jpeg_of_scans(100, (3000, side)) for side in range(2500, 2504)],
        {200},
    ),
    "a png of one column": (lambda: [png_of_zeros(1, 40_000_000)] * 4, {422}),
    "a tile of 45,008 squared": (lambda: [tiff(bytes(64), 64, 64, tags=HUGE_TILE)] * 4, {422}),
    "two million tile offsets": (
        lambda: [tiff(bytes(16_000_000), 64, 64, tags=[(324, 4, 2_000_000, struct.pack("<I", 8))])] * 4,
        {422},
    ),
    "pngs of 16 bits and four channels": (
        lambda: [png_of_zeros(6300, side, depth=16, color_type=6) for side in range(6300, 6303)],
        {200},
    ),
    "tall pngs with an alpha channel": (
        lambda: [png_of_zeros(2000, side, color_type=6) for side in (19_990, 19_991)],
        {200},
    ),
    "gifs of a huge canvas": (lambda: [gif_of_canvas(65_535, 600), gif_of_canvas(6000, 6000)], {200}),
    "webps of 40 Mpx": (
        lambda: [encode(Image.new("RGBA", (8000, side)), "WEBP", lossless=True) for side in (4990, 4991)],
        {200},
    ),
    "bmps of short rows": (lambda: [bmp_of_short_rows(3000, side) for side in range(2000, 2004)], {200}),
    "avifs and heics that are larger than they say": (
        lambda: [picture_file(kind, [Image.new("RGB", (8000, 4990))], size=(64, 64)) for kind in KINDS],
        {422},
    ),
    "avifs of 40 Mpx": (
        lambda: [
            encode(Image.new("RGB", (8000, side)), "AVIF", speed=10, subsampling="4:4:4")
            for side in (4990, 4991)
        ],
        {200},
    ),
    "a grid of 3,000 tiles": (
        lambda: [picture_file(kind, [Image.new("RGB", (64, 64))] * 3000, num_columns=60) for kind in KINDS],
        {200, 422},
    ),
    "a jpeg 2000 of very many tiles": (
        lambda: [
            encode(Image.new("RGB", (1500, 1500)), "JPEG2000", tile_size=(tile, tile)) for tile in (8, 15)
        ],
        {200, 422},
    ),
    "jpeg 2000s that claim 40 Mpx": (
        lambda: [jpeg2000_claiming(8000, side) for side in range(4990, 4994)],
        {422},
    ),
    "chunks and segments": (
        lambda: [
            png(8, 8, [bytes(24)] * 8, before=png_chunk(b"tEXt", b"") * 500_000),
            b"\xff\xd8" + b"\xff\xe5\0\2" * 2_000_000 + jpeg_of_scans(10)[2:],
            jpeg_of_scans(10)[:-2] + b"\xff\xd0" * 4_000_000,
            b"GIF89a" + struct.pack("<HHBBB", 9, 9, 0, 0, 0) + b"!\xfe" + b"\1x" * 4_000_000,
        ],
        {200, 422},
    ),
}
SLOW = bmp_of_short_rows(8000, 4990)  # 4.5 s of CPU time, in 20 kB


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with service(tmp_path_factory.mktemp("service"), model="tiny") as started:
        yield started


def caption(url: str, data: bytes, timeout_ms: int | None = None) -> httpx.Response:
    headers = {} if timeout_ms is None else {"X-Request-Timeout-Ms": str(timeout_ms)}
    form = {"num_beams": "1", "max_new_tokens": "2"}
    return httpx.post(
        f"{url}/caption", files={"image": data}, data=form, headers=headers, timeout=2 * MAX_ATTACK_S
    )


def captions(url: str, files: Sequence[bytes]) -> list[httpx.Response]:
    """Send all of them at once."""
    with ThreadPoolExecutor(len(files)) as threads:
        return list(threads.map(partial(caption, url), files))


@pytest.mark.parametrize("name", ATTACKS)
def test_attackers_hold_up_nobody_and_memory_is_given_back(running: ServiceProcess, name: str) -> None:
    build_files, statuses = ATTACKS[name]
    files = build_files()
    started = time.monotonic()
    with MemoryWatch(running) as memory, bystander(running):
        answers = captions(running.url, files)
    assert {answer.status_code for answer in answers} <= statuses, [answer.text for answer in answers]
    assert time.monotonic() - started < MAX_ATTACK_S
    assert memory.growth_bytes < MAX_GROWTH_BYTES
    assert memory.after_bytes - memory.before_bytes < MAX_KEPT_BYTES


def test_bodies_full_of_slow_images_leave_room_for_small_ones(running: ServiceProcess) -> None:
    """Three bodies of 58 MB are more than the budget of uploads, and their images take minutes together."""
    files = [("images", SLOW.ljust(1_900_000))] * 31
    form = {"num_beams": "1", "max_new_tokens": "2"}

    def attack(_: int) -> int:
        headers = {"X-Request-Timeout-Ms": "10000"}
        return httpx.post(
            f"{running.url}/caption", files=files, data=form, headers=headers, timeout=MAX_ATTACK_S
        ).status_code

    with bystander(running), ThreadPoolExecutor(3) as threads:
        statuses = list(threads.map(attack, range(3)))
    assert set(statuses) <= {429, 504}
    assert 504 in statuses


def cpu_seconds(running: ServiceProcess) -> dict[int, float]:
    """Return the CPU time of each process that decodes, by its process id."""
    times = {}
    for pid in descendants(running.process.pid):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        times[pid] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return times


def wait_for_busy(running: ServiceProcess, before: dict[int, float]) -> int:
    """Wait for a process that has decoded for a second since `before`, and return its id."""

    def busy() -> list[int]:
        return [pid for pid, seconds in cpu_seconds(running).items() if seconds - before.get(pid, 0) > 1]

    poll(busy, 30, "a process that decodes")
    return busy()[0]


def assert_ended(pids: Iterable[int]) -> None:
    poll(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 5, f"the end of {pids}")


def test_a_deadline_ends_the_decoding(running: ServiceProcess) -> None:
    before = cpu_seconds(running)
    with ThreadPoolExecutor(1) as threads:
        started = time.monotonic()
        answer = threads.submit(caption, running.url, SLOW + b"deadline", timeout_ms=3000)
        pid = wait_for_busy(running, before)
        assert answer.result().json()["code"] == "deadline_exceeded"
        assert time.monotonic() - started < 6
    assert_ended([pid])
    assert caption(running.url, jpeg_of_scans(10, (50, 50))).status_code == 200


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_process_that_dies_harms_its_own_image_alone(running: ServiceProcess, number: int) -> None:
    before = cpu_seconds(running)
    with ThreadPoolExecutor(1) as threads, bystander(running):
        killed = threads.submit(caption, running.url, SLOW + bytes([number]))
        os.kill(wait_for_busy(running, before), number)
        answer = killed.result()
    assert (answer.status_code, answer.json()["code"]) == (422, "invalid_image")
    assert "or ends its decoder; downscale it" in answer.json()["detail"]


def test_processes_that_die_while_idle_harm_no_image(running: ServiceProcess) -> None:
    for pid in cpu_seconds(running):
        os.kill(pid, signal.SIGKILL)
    answers = captions(running.url, [jpeg_of_scans(10, (60, side)) for side in range(60, 72)])
    assert {answer.status_code for answer in answers} == {200}


def test_an_image_that_takes_too_much_names_the_limit(tmp_path: Path) -> None:
    with service(tmp_path, model="tiny", decode_timeout_ms=1000, decode_bytes=64 * MIB) as limited:
        answer = caption(limited.url, encode(Image.new("RGB", (5000, 4000)), "JPEG"))
        assert answer.status_code == 422
        assert "the limit is 67108864 (BLIP2_DECODE_BYTES); downscale it" in answer.json()["detail"]
        answer = caption(limited.url, bmp_of_short_rows(4000, 3000))
        assert answer.status_code == 422, answer.text
        assert "more than 1 s of CPU time (BLIP2_DECODE_TIMEOUT_MS)" in answer.json()["detail"]
        assert caption(limited.url, bmp_of_short_rows(2000, 1000)).status_code == 200


def test_nothing_is_left_of_a_service_that_is_killed(tmp_path: Path) -> None:
    with service(tmp_path, model="tiny") as killed, ThreadPoolExecutor(1) as threads:
        before = cpu_seconds(killed)
        answer = threads.submit(caption, killed.url, SLOW)
        wait_for_busy(killed, before)
        pids = list(cpu_seconds(killed))
        killed.kill()
        assert isinstance(answer.exception(), httpx.HTTPError)
        assert_ended(pids)


def test_a_large_image_does_not_delay_the_end_of_the_service(tmp_path: Path) -> None:
    with service(tmp_path, model="tiny", drain_timeout_ms=500) as ended, ThreadPoolExecutor(1) as threads:
        before = cpu_seconds(ended)
        answer = threads.submit(caption, ended.url, SLOW)
        wait_for_busy(ended, before)
        pids, started = list(cpu_seconds(ended)), time.monotonic()
        ended.terminate()
        assert ended.wait() == 0
        assert time.monotonic() - started < 10
        assert_ended(pids)
        assert answer.exception() is not None or answer.result().status_code == 503
