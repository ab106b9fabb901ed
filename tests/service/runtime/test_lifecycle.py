"""The life of the service, over a fake model: loading, ready, draining, or without its engine."""

import asyncio
import threading
from functools import partial

import pytest

from model import CheckpointError
from service.api.app import create_app
from service.runtime.lifecycle import EngineLostError, FatalError
from service.runtime.settings import Settings
from tests.service.fakes import DEADLY_WORD, NAN_WORD, TIMEOUT_S, FakeBackend, png_base64
from tests.service.running import answers, assert_problem, metric, site, until_async

IMAGE = png_base64(100)


async def test_the_probes_tell_of_loading_and_never_wait() -> None:
    backend = FakeBackend()
    backend.encode_gate.clear()
    async with site(backend, wait=False) as running:
        assert (await running.client.get("/livez")).json() == {"status": "ok"}
        for path in ("/readyz", "/startupz", "/health"):
            response = await running.client.get(path)
            assert_problem(response, 503, "not_ready")
            assert response.headers["retry-after"] == "5"
        assert_problem(await running.client.post("/caption", json={"image": IMAGE}), 503, "not_ready")
        assert await metric(running, 'blip2_shed_total{reason="not_ready"}') >= 1
        backend.encode_gate.set()
        await until_async(partial(answers, running, "/readyz", 200))
        assert (await running.client.get("/startupz")).status_code == 200


async def test_while_the_device_hangs_callers_are_told_livez_is_red_and_the_process_must_end() -> None:
    backend, failures = FakeBackend(), list[FatalError]()
    async with site(backend, Settings(stall_timeout_ms=100), on_failure=failures.append) as running:
        backend.encode_gate.clear()
        hung = asyncio.create_task(running.client.post("/caption", json={"image": png_base64(55)}))
        await until_async(partial(answers, running, "/livez", 503))
        problem = assert_problem(await running.client.get("/livez"), 503, "not_ready")
        assert "BLIP2_STALL_TIMEOUT_MS" in problem["detail"]
        assert (await running.client.get("/readyz")).status_code == 503
        assert_problem(await hung, 500, "engine_lost")
        assert_problem(await running.client.post("/caption", json={"image": IMAGE}), 503, "not_ready")
        await until_async(lambda: failures)
        backend.encode_gate.set()
        assert isinstance(failures[0], EngineLostError)
        assert (await running.client.get("/livez")).status_code == 503  # what was told stays so


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is meant to die
async def test_where_the_engine_dies_its_requests_get_500_the_probes_turn_red_and_the_process_must_end() -> (
    None
):
    failures: list[FatalError] = []
    async with site(on_failure=failures.append) as running:
        response = await running.client.post("/caption", json={"image": IMAGE, "prompt": DEADLY_WORD})
        assert_problem(response, 500, "engine_lost")
        await until_async(lambda: running.lifecycle.readiness.engine_problem)
        assert "restarted" in assert_problem(await running.client.get("/livez"), 503, "not_ready")["detail"]
        assert (await running.client.get("/readyz")).status_code == 503
        assert_problem(await running.client.post("/caption", json={"image": IMAGE}), 503, "not_ready")
        await until_async(lambda: failures)
        assert isinstance(failures[0], EngineLostError)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")  # it is meant to die
async def test_an_engine_that_dies_in_its_self_test_ends_the_process() -> None:
    class Deadly(FakeBackend):
        def caption_prompt(self) -> str:
            return DEADLY_WORD

    failures: list[FatalError] = []
    async with site(Deadly(), wait=False, on_failure=failures.append):
        await until_async(lambda: failures)
    assert "self-test failed" in str(failures[0])


async def test_draining_refuses_new_work_and_finishes_what_runs() -> None:
    backend = FakeBackend()
    async with site(backend) as running:
        backend.decode_gate.clear()
        request = asyncio.create_task(running.client.post("/caption", json={"image": png_base64(55)}))
        await until_async(lambda: [55] in backend.vision_batches)
        draining = asyncio.create_task(running.lifecycle.drain())
        await until_async(lambda: running.lifecycle.readiness.is_draining)
        refused = await running.client.post("/caption", json={"image": IMAGE})
        assert_problem(refused, 503, "draining")
        assert refused.headers["connection"] == "close"
        assert refused.headers["retry-after"]
        assert_problem(await running.client.get("/readyz"), 503, "draining")
        assert (await running.client.get("/livez")).status_code == 200
        assert not draining.done()
        backend.decode_gate.set()
        assert (await request).status_code == 200
        await asyncio.wait_for(draining, TIMEOUT_S)


async def test_what_is_not_done_when_draining_ends_gets_its_own_error() -> None:
    backend = FakeBackend()
    async with site(backend, Settings(drain_timeout_ms=50)) as running:
        backend.decode_gate.clear()
        request = asyncio.create_task(running.client.post("/caption", json={"image": png_base64(55)}))
        await until_async(lambda: [55] in backend.vision_batches)
        draining = asyncio.create_task(running.lifecycle.drain())
        release = threading.Timer(0.2, backend.decode_gate.set)  # the device comes back too late
        release.start()
        assert_problem(await request, 503, "not_ready")
        await asyncio.wait_for(draining, TIMEOUT_S)
        release.join()


async def test_draining_while_the_model_is_warmed_up_is_no_failure() -> None:
    backend, failures = FakeBackend(), list[FatalError]()
    backend.encode_gate.clear()
    async with site(
        backend, Settings(drain_timeout_ms=50), wait=False, on_failure=failures.append
    ) as running:
        await until_async(lambda: running.lifecycle.readiness.backend)
        draining = asyncio.create_task(running.lifecycle.drain())
        await until_async(lambda: running.lifecycle.readiness.is_draining)
        backend.encode_gate.set()
        await asyncio.wait_for(draining, TIMEOUT_S)
    assert failures == []


async def test_a_model_that_gives_no_numbers_never_becomes_ready() -> None:
    class Broken(FakeBackend):
        def caption_prompt(self) -> str:
            return NAN_WORD

    async with site(Broken(), wait=False) as running:

        async def has_failed() -> bool:
            return "self-test failed" in (await running.client.get("/readyz")).json()["detail"]

        await until_async(has_failed)
        assert_problem(await running.client.get("/startupz"), 503, "not_ready")
        assert_problem(await running.client.post("/caption", json={"image": IMAGE}), 503, "not_ready")


async def test_a_model_that_cannot_be_loaded_is_told_in_one_line() -> None:
    failures: list[FatalError] = []

    def load() -> FakeBackend:
        raise CheckpointError("no such directory: /nowhere; set BLIP2_MODEL")

    app = create_app(Settings(), load, on_failure=failures.append)
    async with app.router.lifespan_context(app):
        await until_async(lambda: failures)
    assert str(failures[0]) == "no such directory: /nowhere; set BLIP2_MODEL"
