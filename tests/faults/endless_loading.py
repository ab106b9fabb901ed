"""`python -m tests.faults.endless_loading`: the real service, whose model is loaded again and again."""

import sys
from typing import NoReturn


def main() -> int:
    # Not above: the processes that decode images import this file too.
    from service.runtime.listener import open_listener
    from service.runtime.loading import load_backend
    from service.runtime.settings import load_settings
    from service.server import serve

    settings = load_settings()

    def load() -> NoReturn:
        sys.stdout.write("loading\n")
        sys.stdout.flush()
        while True:
            load_backend(settings)

    serve(settings, open_listener(settings.host, settings.port), load)
    return 0


if __name__ == "__main__":
    sys.exit(main())
