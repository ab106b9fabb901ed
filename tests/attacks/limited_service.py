"""The service with at most NUM_FILES open files, as under `ulimit -n`."""

import os
import resource
import sys

from service.__main__ import main

if __name__ == "__main__":
    num_files = int(os.environ["NUM_FILES"])
    resource.setrlimit(resource.RLIMIT_NOFILE, (num_files, num_files))
    sys.exit(main())
