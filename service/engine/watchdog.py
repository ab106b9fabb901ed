"""Watches the engine from the event loop: whether it makes progress, and when it is lost for good."""

import asyncio
import sys
import threading
import time
import traceback
from typing import Final

from service.engine.engine import Engine

_LOOK_S: Final = 0.25
_PAUSE_S: Final = 1.0  # a look that comes so much too late tells that the whole process was paused


class EngineWatch:
    """stall_timeout_s: how long the engine may make no progress while it has something to do."""

    def __init__(self, engine: Engine, stall_timeout_s: float) -> None:
        self._engine = engine
        self._stall_timeout_s = stall_timeout_s

    @property
    def problem(self) -> str | None:
        """Says what is wrong with the engine; None while it makes progress, or has nothing to do."""
        if not self._engine.alive:
            return "the engine's thread has died; this process must be restarted"
        age_s = self._engine.heartbeat_age_s()
        if age_s > self._stall_timeout_s:
            return (
                f"the engine has made no progress for {age_s:.1f} s, the limit is "
                f"{self._stall_timeout_s:g} s; this process must be restarted (BLIP2_STALL_TIMEOUT_MS)"
            )
        return None

    async def until_lost(self) -> str:
        """Comes back when the engine is lost, with what is wrong.

        After a pause of the whole process, in which nothing could go on, the engine has its time anew.
        """
        interval_s, excused_until = min(_LOOK_S, self._stall_timeout_s / 4), 0.0
        while True:
            asleep = time.monotonic()
            await asyncio.sleep(interval_s)
            awake = time.monotonic()
            if awake - asleep > interval_s + _PAUSE_S:
                excused_until = awake + self._stall_timeout_s
            problem = self.problem
            if problem and (awake >= excused_until or not self._engine.alive):
                return problem


def stacks() -> dict[str, str]:
    """Gives where each thread is, by its name."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    return {
        names.get(ident, str(ident)): "".join(traceback.format_stack(frame))
        for ident, frame in sys._current_frames().items()
    }
