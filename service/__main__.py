"""Serves: `python -m service`. All that can be set is in `settings`."""

import sys

from service.listener import ListenError, open_listener
from service.settings import SettingsError, load_settings


def main() -> int:
    """Serves until told to stop; gives the exit code."""
    try:
        settings = load_settings()
        listener = open_listener(settings.host, settings.port)
    except (SettingsError, ListenError) as exc:
        return _give_up(exc)
    # torch takes seconds to import: what can be wrong before is told before.
    from service.lifecycle import FatalError
    from service.server import serve

    try:
        serve(settings, listener)
    except FatalError as exc:
        return _give_up(exc)
    return 0


def _give_up(reason: Exception) -> int:
    sys.stderr.write(f"blip2: {reason}\n")
    return 1


if __name__ == "__main__":
    sys.exit(main())
