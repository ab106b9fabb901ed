"""Watches the engine from the event loop: whether it makes progress, and when it is lost for good."""

import asyncio
import sys
import threading
import time
import traceback
from typing import Final

from service.engine.engine import Engine

_INTERVAL_S: Final = 0.25
_PAUSE_S: Final = 1.0  # a check that comes so much too late shows that the whole process was paused


class Watchdog:
    """stall_timeout_s: how long the engine may make no progress while it has something to do."""

    def __init__(self, engine: Engine, stall_timeout_s: float) -> None:
        self._engine = engine
        self._stall_timeout_s = stall_timeout_s

    @property
    def problem(self) -> str | None:
        """Why the engine is lost or stalled; None while it makes progress or has nothing to do."""
        if not self._engine.is_alive:
            return "the engine's thread has died; this process must be restarted"
        age_s = self._engine.heartbeat_age_s()
        if age_s > self._stall_timeout_s:
            return (
                f"the engine has made no progress for {age_s:.1f} s, the limit is "
                f"{self._stall_timeout_s:g} s; this process must be restarted (BLIP2_STALL_TIMEOUT_MS)"
            )
        return None

    async def wait_until_lost(self) -> str:
        """Return the reason once the engine is lost.

        After a pause of the whole process, in which nothing could run, the stall time-out starts anew.
        """
        interval_s, excused_until = min(_INTERVAL_S, self._stall_timeout_s / 4), 0.0
        while True:
            asleep = time.monotonic()
            await asyncio.sleep(interval_s)
            awake = time.monotonic()
            if awake - asleep > interval_s + _PAUSE_S:
                excused_until = awake + self._stall_timeout_s
            problem = self.problem
            if problem and (awake >= excused_until or not self._engine.is_alive):
                return problem


def thread_stacks() -> dict[str, str]:
    """Return the stack of each thread, by the thread's name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    }
