"""The time in the request queue is observed for every request that was queued, however it ended."""

import asyncio

from tests.service.fakes import FakeBackend, png
from tests.service.running import Site, metric, site, until_async

COUNT = "blip2_queue_seconds_count"


async def queue_seconds(running: Site) -> float:
    return await metric(running, "blip2_queue_seconds_sum")


async def test_a_request_that_expires_in_the_queue_counts_with_its_whole_wait() -> None:
    backend = FakeBackend()
    async with site(backend) as running:
        backend.encode_gate.clear()
        first = asyncio.create_task(running.client.post("/caption", files={"image": png(1)}))
        await until_async(lambda: _is_running(running))
        expired = await running.client.post(
            "/caption", files={"image": png(2)}, headers={"X-Request-Timeout-Ms": "300"}
        )
        assert expired.status_code == 504
        assert await metric(running, COUNT) == 1
        assert 0.1 < await queue_seconds(running) < 10
        backend.encode_gate.set()
        answer = await first
        assert answer.status_code == 200, answer.text
        assert await metric(running, COUNT) == 2


async def test_a_request_whose_client_leaves_counts_too() -> None:
    backend = FakeBackend()
    async with site(backend) as running:
        backend.encode_gate.clear()
        first = asyncio.create_task(running.client.post("/caption", files={"image": png(1)}))
        await until_async(lambda: _is_running(running))
        leaving = asyncio.create_task(running.client.post("/caption", files={"image": png(2)}))
        service = running.lifecycle.readiness.service
        assert service is not None
        await until_async(lambda: service.queue.oldest_wait_s() > 0)  # its image is decoded
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)

        async def is_counted() -> bool:
            return await metric(running, COUNT) == 1

        await until_async(is_counted)
        backend.encode_gate.set()
        answer = await first
        assert answer.status_code == 200, answer.text


async def test_an_answer_reports_the_wait_for_rows_as_queue() -> None:
    backend = FakeBackend()
    async with site(backend) as running:
        backend.decode_gate.clear()
        num_added = backend.num_added
        questions = [f"what {index}" for index in range(8)]
        body = {"question": questions, "num_beams": "16"}
        wide = asyncio.create_task(running.client.post("/vqa", files={"image": png(1)}, data=body))
        await until_async(lambda: backend.num_added == num_added + 8)  # all rows are taken
        started = asyncio.get_running_loop().time()
        caption = asyncio.create_task(running.client.post("/caption", files={"image": png(2)}))
        await until_async(lambda: asyncio.get_running_loop().time() - started > 0.3)
        backend.decode_gate.set()
        timings = (await caption).json()["timings_ms"]
        assert timings["queue"] > 200
        assert timings["decode"] < 200
        assert (await wide).status_code == 200


async def _is_running(running: Site) -> bool:
    return await metric(running, "blip2_running") == 1
