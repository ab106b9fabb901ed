"""Watches the engine from the event loop, until it is lost for good; returns free memory meanwhile."""

import asyncio
import sys
import threading
import time
import traceback
from typing import Final

from model.devices import return_free_memory
from service.engine.engine import Engine
from service.runtime.readiness import Readiness

_RETURN_MEMORY_S: Final = 15.0
_INTERVAL_S: Final = 0.25
_PAUSE_S: Final = 1.0  # a check that comes so much too late shows that the whole process was paused


async def wait_until_lost(engine: Engine, readiness: Readiness, stall_timeout_s: float) -> str:
    """Return the reason once the engine is dead, or stalled for longer than the time-out.

    Only this loop declares a stall: after a pause of the whole process, in which nothing could run, the
    time-out starts anew, and a probe that is answered first must not take the pause for a stall.
    """
    interval_s, ignored_until = min(_INTERVAL_S, stall_timeout_s / 4), 0.0
    while True:
        before = time.monotonic()
        await asyncio.sleep(interval_s)
        now = time.monotonic()
        if now - before > interval_s + _PAUSE_S:
            ignored_until = now + stall_timeout_s
        age_s = engine.heartbeat_age_s()
        if age_s > stall_timeout_s and now >= ignored_until:
            readiness.stall_reason = (
                f"the engine has made no progress for {age_s:.1f} s, the limit is {stall_timeout_s:g} s; "
                "this process must be restarted (BLIP2_STALL_TIMEOUT_MS)"
            )
        if problem := readiness.engine_problem:
            return problem


async def return_memory_regularly() -> None:
    """Return free memory to the operating system, until cancelled."""
    while True:
        await asyncio.sleep(_RETURN_MEMORY_S)
        await asyncio.to_thread(return_free_memory)


def thread_stacks() -> dict[str, str]:
    """Return the stack of each thread, by the thread's name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): "".join(traceback.format_stack(stack_frame))
        for ident, stack_frame in sys._current_frames().items()
    }
