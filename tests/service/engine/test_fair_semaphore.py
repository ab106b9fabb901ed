"""A semaphore whose callers take turns."""

import asyncio

from service.engine.fair_queueing import FairSemaphore


class Visits:
    """Records in which order named visits hold the semaphore, until all end."""

    def __init__(self, num_slots: int) -> None:
        self._semaphore = FairSemaphore(num_slots)
        self._end = asyncio.Event()
        self.holding: list[str] = []

    async def visit(self, name: str) -> None:
        async with self._semaphore.hold(caller=name[0]):
            self.holding.append(name)
            await self._end.wait()

    async def start(self, *names: str) -> list[asyncio.Task[None]]:
        tasks = [asyncio.create_task(self.visit(name)) for name in names]
        await settle()
        return tasks

    def end_all(self) -> None:
        self._end.set()


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


async def test_callers_take_turns_and_the_visits_of_each_stay_in_order() -> None:
    visits = Visits(num_slots=1)
    tasks = await visits.start("a0", "a1", "a2", "a3", "b0", "c0", "b1")
    assert visits.holding == ["a0"]
    visits.end_all()
    await asyncio.gather(*tasks)
    assert visits.holding == ["a0", "a1", "b0", "c0", "a2", "b1", "a3"]


async def test_as_many_hold_it_at_once_as_there_are_slots() -> None:
    visits = Visits(num_slots=2)
    tasks = await visits.start("a0", "a1", "b0")
    assert visits.holding == ["a0", "a1"]
    visits.end_all()
    await asyncio.gather(*tasks)
    assert len(visits.holding) == 3


async def test_a_visit_that_is_cancelled_gives_its_slot_back_and_one_that_waits_loses_its_place() -> None:
    visits = Visits(num_slots=1)
    holding, waiting, last = await visits.start("a0", "b0", "c0")
    waiting.cancel()
    await settle()
    holding.cancel()
    await settle()
    assert visits.holding == ["a0", "c0"]
    (late,) = await visits.start("d0")
    last.cancel()
    late.cancel()  # in the turn of the loop in which it was served
    await asyncio.gather(holding, waiting, last, late, return_exceptions=True)
    (again,) = await visits.start("e0")
    assert visits.holding[-1] == "e0"
    visits.end_all()
    await again
