"""The provenance of a run: its configuration, code revision and seeds, and hashes of weights."""

import hashlib
import json
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from training.config import ConfigError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def record_run(directory: Path, config: "DataclassInstance") -> None:
    """Write `run.json`: the resolved configuration with its seeds, the git revision and torch's version.

    Raises ConfigError naming the key if an earlier run in this directory had another configuration.
    """
    path, resolved = directory / "run.json", asdict(config)
    if path.exists():
        earlier = _flatten(json.loads(path.read_text(encoding="utf-8"))["config"])
        for key, value in _flatten(resolved).items():
            if earlier.get(key) != value:
                raise ConfigError(
                    f"{directory} was begun with {key}={earlier.get(key)}, it is {value} now; "
                    "restore the former value, or delete the directory"
                )
        return
    directory.mkdir(parents=True, exist_ok=True)
    run = {"config": resolved, "git_revision": _git_revision(), "torch": torch.__version__}
    path.write_text(json.dumps(run, indent=2) + "\n", encoding="utf-8")


def hash_module(module: nn.Module) -> str:
    """Compute the SHA-256 over the names and bytes of all tensors of a module."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def hash_weight_files(directory: Path) -> str:
    """Compute the SHA-256 over the safetensors files of a directory; "" if there are none."""
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        return ""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _git_revision() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
