"""What a run was made with, kept beside its checkpoint; going on with anything else is refused."""

import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from training.config import ConfigError, TinyConfig


def record_run(directory: Path, config: TinyConfig) -> None:
    """Writes `run.json`: the resolved configuration with its seeds, the git revision, torch's version.

    Raises ConfigError, naming the key, where an earlier run in this directory was configured otherwise.
    """
    path, resolved = directory / "run.json", asdict(config)
    if path.exists():
        earlier = _flat(json.loads(path.read_text(encoding="utf-8"))["config"])
        for key, value in _flat(resolved).items():
            if earlier.get(key) != value:
                raise ConfigError(
                    f"{directory} was begun with {key}={earlier.get(key)}, it is {value} now; "
                    "go on with the former, or delete the directory"
                )
        return
    directory.mkdir(parents=True, exist_ok=True)
    run = {"config": resolved, "git_revision": _git_revision(), "torch": torch.__version__}
    path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
