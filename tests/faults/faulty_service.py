"""`python -m tests.faults.faulty_service`: the service of `faulty_device`.

The processes that decode images import this file too, and need none of it.
"""

import sys

if __name__ == "__main__":
    from tests.faults.faulty_device import serve_faulty

    sys.exit(serve_faulty())
