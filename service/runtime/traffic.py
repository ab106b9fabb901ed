"""The number of requests in flight, which draining waits for."""

import asyncio
import contextlib


class Traffic:
    """Counts the requests in flight. For the event loop."""

    def __init__(self) -> None:
        self.num_requests = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def enter(self) -> None:
        self.num_requests += 1
        self._idle.clear()

    def leave(self) -> None:
        self.num_requests -= 1
        if self.num_requests == 0:
            self._idle.set()

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until none is in flight; return False where that takes longer."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._idle.wait(), timeout_s)
        return self.num_requests == 0
