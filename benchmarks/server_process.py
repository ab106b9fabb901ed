"""A server in a process group of its own: started, waited for, paused while others are measured, stopped.

Linux only: what a group uses is read from /proc.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

READY_TIMEOUT_S = 300.0
_IDLE_TIMEOUT_S = 300.0
_STOP_TIMEOUT_S = 45.0
_POLL_S = 0.2
_IDLE_SAMPLE_S = 1.0
_IDLE_SHARE = 0.25  # of one core: LitServe's worker polls its queue a thousand times a second
_LOG_TAIL = 3000  # characters
_PGRP, _UTIME, _STIME = 2, 11, 12  # fields of /proc/PID/stat behind the name


class ServerError(Exception):
    """A server ended, or did not come to where it should; the message holds the end of its log."""


class ServerProcess:
    """What the command started. Its output goes to a file, whose end is shown where something fails.

    url: where it answers. ready_path: what answers 200 once it can serve.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        environment: Mapping[str, str],
        folder: Path,
        port: int,
        ready_path: str,
    ) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        self._ready_url = self.url + ready_path
        self._log = folder / f"{name.replace(' ', '_').replace(',', '')}-{port}.log"
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=dict(environment), stdout=log, stderr=log, start_new_session=True
            )

    def wait_ready(self) -> None:
        """Returns once it can serve. Raises ServerError where it ends, or takes too long."""
        with httpx.Client(trust_env=False, timeout=5) as client:
            self._poll(lambda: _answers(client, self._ready_url), READY_TIMEOUT_S, "ready")

    def wait_idle(self) -> None:
        """Returns once it uses next to no CPU time, as it does when nothing is left in its queues."""

        def is_idle() -> bool:
            before = self._cpu_s()
            time.sleep(_IDLE_SAMPLE_S)
            return self._cpu_s() - before < _IDLE_SHARE * _IDLE_SAMPLE_S

        self._poll(is_idle, _IDLE_TIMEOUT_S, "idle")

    def pause(self) -> None:
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._signal(signal.SIGCONT)

    def stop(self) -> int:
        """Asks it to end, then makes it and all it started end; gives the exit code of the process itself."""
        self.resume()
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return -signal.SIGKILL
        finally:
            self.kill()

    def kill(self) -> None:
        self._signal(signal.SIGKILL)
        self.process.wait()

    def tail(self) -> str:
        """Gives the end of its log."""
        return self._log.read_text(errors="replace")[-_LOG_TAIL:]

    def _poll(self, condition: Callable[[], bool], timeout_s: float, what: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if (code := self.process.poll()) is not None:
                raise ServerError(f"{self.name} ended with {code}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} was not {what} within {timeout_s:g} s:\n{self.tail()}")
            time.sleep(_POLL_S)

    def _signal(self, number: signal.Signals) -> None:
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def _cpu_s(self) -> float:
        ticks = sum(int(stat[_UTIME]) + int(stat[_STIME]) for stat in _stats_of_group(self.process.pid))
        return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def stopped_afterwards(server: ServerProcess) -> Iterator[ServerProcess]:
    """Whatever happens, no process of it is left."""
    try:
        yield server
    except BaseException as exc:
        if not isinstance(exc, ServerError | KeyboardInterrupt):
            print(f"--- the end of the log of {server.name}:\n{server.tail()}", file=sys.stderr)
        server.kill()
        raise
    server.stop()


@contextmanager
def turn_of(server: ServerProcess) -> Iterator[ServerProcess]:
    """Has a paused server run, and pauses it again once it is done with all it was sent."""
    server.resume()
    try:
        server.wait_idle()
        yield server
        server.wait_idle()
    finally:
        server.pause()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _answers(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _stats_of_group(group: int) -> Iterator[list[str]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has ended meanwhile
            continue
        if int(fields[_PGRP]) == group:
            yield fields
