"""The entry point, `python -m service`; its settings are in `runtime.settings`.

The processes that decode images import this file too: what is large is imported inside of functions.
"""

import argparse
import os
import signal
import sys
from types import FrameType
from typing import Final, NoReturn

# oneDNN caches a plan for each shape of product it meets, half a megabyte each: 1,024 by default.
_MAX_PLANS: Final = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}

_DESCRIPTION: Final = """The BLIP-2 service. It takes no arguments: its settings are environment variables
such as BLIP2_MODEL, BLIP2_HOST and BLIP2_PORT; docs/settings.md lists them."""


def main() -> int:
    """Serve until a signal; return the exit code."""
    argparse.ArgumentParser(prog="blip2-serve", description=_DESCRIPTION).parse_args()
    for sent in (signal.SIGINT, signal.SIGTERM):
        signal.signal(sent, _exit_at_once)  # until the server handles them
    os.environ.update({name: value for name, value in _MAX_PLANS.items() if name not in os.environ})
    from service.runtime.listener import ListenError, open_listener
    from service.runtime.settings import SettingsError, load_settings

    try:
        settings = load_settings()
        listener = open_listener(settings.host, settings.port)
        probe_listener = (
            None if settings.probe_port is None else open_listener(settings.host, settings.probe_port)
        )
    except (SettingsError, ListenError) as exc:
        return _report(exc)
    # torch takes seconds to import: errors that can be known before are reported before.
    from service.runtime.lifecycle import FatalError
    from service.server import serve

    try:
        serve(settings, listener, probe_listener=probe_listener)
    except FatalError as exc:
        return _report(exc)
    return 0


def _exit_at_once(_sig: int, _stack_frame: FrameType | None) -> NoReturn:
    os._exit(0)  # nothing has been accepted yet; an exception here would surface in the middle of an import


def _report(reason: Exception) -> int:
    sys.stderr.write(f"blip2: {reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
