"""A signal while the model is being loaded: the process ends at once, with 0 and without a traceback."""

import json
import signal
from pathlib import Path

import pytest

from tests.integration.processes import START_TIMEOUT_S, ServiceProcess, poll


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=lambda sent: sent.name)
def test_a_signal_while_loading_ends_the_process_quietly(
    random_checkpoint: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    loading = ServiceProcess(tmp_path, module="tests.faults.endless_loading", model=random_checkpoint)
    try:
        poll(lambda: "loading" in loading.output, START_TIMEOUT_S, "the loader")
        loading.process.send_signal(sent)
        assert loading.wait() == 0
        messages = [json.loads(line)["message"] for line in loading.errors.splitlines()]
        assert messages == ["draining, 0 requests in flight"]
    finally:
        loading.kill()
