"""The entry point, `python -m service`; its settings are in `runtime.settings`."""

import os
import sys

from service.runtime.listener import ListenError, open_listener
from service.runtime.settings import SettingsError, load_settings

# oneDNN caches a plan for each shape of product it meets, half a megabyte each: 1,024 by default.
_MAX_PLANS = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128", "LRU_CACHE_CAPACITY": "128"}


def main() -> int:
    """Serve until a signal; return the exit code."""
    os.environ.update({name: value for name, value in _MAX_PLANS.items() if name not in os.environ})
    try:
        settings = load_settings()
        listener = open_listener(settings.host, settings.port)
    except (SettingsError, ListenError) as exc:
        return _report(exc)
    # torch takes seconds to import: what can be wrong before is told before.
    from service.runtime.lifecycle import FatalError
    from service.server import serve

    try:
        serve(settings, listener)
    except FatalError as exc:
        return _report(exc)
    return 0


def _report(reason: Exception) -> int:
    sys.stderr.write(f"blip2: {reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
