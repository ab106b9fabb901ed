"""A server in its own process group: start, wait until ready or idle, pause, resume, stop.

Linux only: the CPU time of a group is read from /proc.
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
_IDLE_SHARE = 0.25  # of one core: LitServe's worker polls its queue a thousand times per second
_LOG_TAIL = 3000  # characters
_PGRP, _UTIME, _STIME = 2, 11, 12  # fields of /proc/PID/stat behind the name


class ServerError(Exception):
    """A server that ended or timed out; the message contains the end of its log."""


class ServerProcess:
    """A running command and its process group; its output is written to a log file.

    url: its address. ready_path: the route that returns 200 once the server is ready.
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
        """Wait until the server is ready. Raise ServerError if it ends or times out."""
        with httpx.Client(trust_env=False, timeout=5) as client:
            self._poll(lambda: _is_ready(client, self._ready_url), READY_TIMEOUT_S, "ready")

    def wait_idle(self) -> None:
        """Wait until the CPU usage is close to zero, so that no queue holds a request.

        Raise ServerError if the server ends or times out.
        """

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
        """Send SIGTERM, then kill what is left of the group; return the exit code of the main process."""
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

    def log_end(self) -> str:
        """Return the last characters of the log."""
        return self._log.read_text(errors="replace")[-_LOG_TAIL:]

    def _poll(self, condition: Callable[[], bool], timeout_s: float, state: str) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if (code := self.process.poll()) is not None:
                raise ServerError(f"{self.name} ended with {code}:\n{self.log_end()}")
            if time.monotonic() > deadline:
                raise ServerError(f"{self.name} was not {state} within {timeout_s:g} s:\n{self.log_end()}")
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
def stopped_on_exit(server: ServerProcess) -> Iterator[ServerProcess]:
    """Stop the server on exit; on an error, kill it and print the end of its log."""
    try:
        yield server
    except BaseException as exc:
        if not isinstance(exc, ServerError | KeyboardInterrupt):
            print(f"--- the end of the log of {server.name}:\n{server.log_end()}", file=sys.stderr)
        server.kill()
        raise
    server.stop()


@contextmanager
def resumed(server: ServerProcess) -> Iterator[ServerProcess]:
    """Resume a paused server; pause it again once it is idle."""
    server.resume()
    try:
        server.wait_idle()
        yield server
        server.wait_idle()
    finally:
        server.pause()


def free_port() -> int:
    """Return a TCP port that is free at the moment."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
    return port


def _is_ready(client: httpx.Client, url: str) -> bool:
    try:
        return client.get(url).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def _stats_of_group(group: int) -> Iterator[list[str]]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # the process has ended meanwhile
            continue
        if int(fields[_PGRP]) == group:
            yield fields
