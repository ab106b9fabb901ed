"""A device that fails, runs out of memory, is lost or hangs: responses, probes, exit codes, and delays."""

import asyncio
import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.clients import ask, ask_together, client_of, faulty_service, has, is_red, request, texts_of
from tests.faults.faulty_device import HANG, HOLD, LOSE, MEMORY_ROWS, RAISE
from tests.integration.processes import ServiceProcess, poll_async, service

pytestmark = pytest.mark.serial

NUM_TOGETHER = 16
LONG = {"num_beams": 16, "min_new_tokens": 60, "max_new_tokens": 60}
STALL_TIMEOUT_S = 2.0


@pytest.fixture(scope="module")
def sound(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    """Start a service on a sound device, as the reference."""
    with service(tmp_path_factory.mktemp("sound"), model=random_checkpoint, dtype="float32") as started:
        yield started


async def test_a_request_that_raises_in_a_full_batch_fails_alone(
    random_checkpoint: Path, sound: ServiceProcess, tmp_path: Path
) -> None:
    with faulty_service(tmp_path, model=random_checkpoint, dtype="float32") as faulty:
        payloads = [request(seed) for seed in range(NUM_TOGETHER)]
        payloads[5]["length_penalty"] = RAISE
        answers = await ask_together(faulty.url, payloads)
        assert answers[5].status_code == 500
        assert answers[5].json()["code"] == "inference_failed"
        assert "injected" not in answers[5].text
        del payloads[5], answers[5]
        assert [answer.status_code for answer in answers] == [200] * (NUM_TOGETHER - 1)
        assert texts_of(answers) == texts_of(await ask_together(sound.url, payloads))
        assert faulty.process.poll() is None


async def test_every_warning_and_traceback_carries_the_ids_of_its_requests(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    with faulty_service(tmp_path, model=random_checkpoint) as faulty:
        async with client_of(faulty.url) as client:

            async def ask_as(request_id: str, length_penalty: float) -> int:
                body = request(1, length_penalty=length_penalty)
                answer = await client.post("/caption", json=body, headers={"X-Request-ID": request_id})
                return answer.status_code

            assert await ask_as("harmless", 1.0) == 200
            assert await ask_as("poison", RAISE) == 500
            (tmp_path / MEMORY_ROWS).write_text("0")
            assert await ask_as("large", 1.0) == 500
            (tmp_path / MEMORY_ROWS).unlink()
            await ask_as("fatal", LOSE)
        faulty.wait()
        lines = [json.loads(text) for text in faulty.errors.splitlines() if text.startswith("{")]
    worse = [each for each in lines if each["level"] in ("WARNING", "ERROR", "CRITICAL")]
    assert {each["message"]: each["request_id"] for each in worse if "poison" in str(each)} == {
        "a step of the engine failed": "poison"
    }
    assert [each["request_id"] for each in worse if "traceback" in each] == ["poison", "large", "fatal"]
    assert all("request_id" in each for each in worse)


async def test_beyond_four_rows_of_memory_all_are_answered_in_smaller_batches(
    random_checkpoint: Path, sound: ServiceProcess, tmp_path: Path
) -> None:
    with faulty_service(tmp_path, model=random_checkpoint, dtype="float32") as small:
        (tmp_path / MEMORY_ROWS).write_text("4")
        payloads = [request(seed) for seed in range(NUM_TOGETHER)]
        answers = await ask_together(small.url, payloads)
        assert [answer.status_code for answer in answers] == [200] * NUM_TOGETHER
        assert texts_of(answers) == texts_of(await ask_together(sound.url, payloads))
        num_failed = small.total("blip2_out_of_memory_total")
        assert num_failed > 0
        again = await ask_together(small.url, [request(seed) for seed in range(100, 108)])
        assert [answer.status_code for answer in again] == [200] * 8
        # Larger batches are tried again from time to time.
        assert small.total("blip2_out_of_memory_total") <= num_failed + 2
        wide = (await ask_together(small.url, [request(1, num_beams=5)]))[0]
        assert (wide.status_code, wide.json()["code"]) == (500, "out_of_device_memory")
        assert "lower num_beams" in wide.json()["detail"]


async def test_a_lost_device_ends_the_process_after_all_callers_are_told(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    with faulty_service(tmp_path, model=random_checkpoint) as faulty:
        await lose(faulty, LOSE, 1.0)
        assert "the engine's thread has died" in faulty.errors


async def test_a_hung_device_turns_livez_red_in_time_and_ends_the_process(
    random_checkpoint: Path, tmp_path: Path
) -> None:
    stall_timeout_ms = int(STALL_TIMEOUT_S * 1000)
    with faulty_service(tmp_path, model=random_checkpoint, stall_timeout_ms=stall_timeout_ms) as faulty:
        await lose(faulty, HANG, STALL_TIMEOUT_S + 1.0)
        assert "the engine has made no progress" in faulty.errors
        assert "faulty_device.py" in faulty.errors  # the stack of the hanging thread


async def test_a_process_that_was_paused_amid_a_turn_goes_on(random_checkpoint: Path, tmp_path: Path) -> None:
    with faulty_service(tmp_path, model=random_checkpoint, stall_timeout_ms=2_000) as paused:
        async with client_of(paused.url) as client:
            (tmp_path / HOLD).touch()
            caught = asyncio.create_task(ask(client, request(1)))
            await poll_async(lambda: has(client, "blip2_running 1.0"), 60)
            paused.process.send_signal(signal.SIGSTOP)
            await asyncio.sleep(4)  # longer than the stall timeout
            paused.process.send_signal(signal.SIGCONT)
            for _ in range(20):  # the pause is no stall, whoever asks first
                assert not await is_red(client)
            (tmp_path / HOLD).unlink()
            assert (await caught).status_code == 200
            assert (await ask(client, request(2))).status_code == 200
            assert not await is_red(client)


async def lose(faulty: ServiceProcess, fault: float, red_within_s: float) -> None:
    """Make the device fail during requests; check responses, probes and exit code."""
    async with client_of(faulty.url) as client:
        running = [asyncio.create_task(ask(client, request(seed, **LONG))) for seed in range(8)]
        await poll_async(lambda: has(client, "blip2_running 8.0"), 60)
        start_s = time.monotonic()
        fatal = asyncio.create_task(ask(client, request(99, length_penalty=fault)))
        await poll_async(lambda: is_red(client), 60)
        # The image of the fatal request is encoded first.
        assert time.monotonic() - start_s < red_within_s + 1.0
        assert (await client.get("/readyz")).status_code == 503
        refused = await ask(client, request(100))
        assert (refused.status_code, refused.json()["code"]) == (503, "not_ready")
        assert int(refused.headers["retry-after"]) > 0
        answers = await asyncio.gather(*running, fatal)
    # Each of them may be what lost the device, so no proxy may send it to another replica.
    assert [(answer.status_code, answer.json()["code"]) for answer in answers] == [(500, "engine_lost")] * 9
    assert faulty.wait() == 1
    assert faulty.errors.splitlines()[-1].startswith("blip2: the engine")
