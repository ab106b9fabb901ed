"""What a measurement was made on."""

import os
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

_PACKAGES = ("torch", "transformers", "fastapi", "uvicorn", "uvloop", "litserve")


def describe_machine() -> str:
    """Names the CPU, and the allocator of this process and those it starts."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "a CPU")
    allocator = Path(os.environ["LD_PRELOAD"]).name if "LD_PRELOAD" in os.environ else "glibc's"
    return f"{name}, {os.cpu_count()} cores, allocator {allocator}"


def describe_versions() -> str:
    """Names the packages that servers are made of."""
    found = []
    for name in _PACKAGES:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join(found)
