"""Resolves the name of a checkpoint: embedded, a directory or file, or an id on the Hub."""

import re
from collections.abc import Mapping
from pathlib import Path

from model.checkpoints.foreign_tensors import PEFT_CONFIG
from model.checkpoints.hub.download import VerifiedDownload, download, verify_download
from model.errors import CheckpointError

PRETRAINED = Path(__file__).parent.parent / "pretrained"
EMBEDDED: Mapping[str, Path] = {
    "tiny": PRETRAINED / "tiny" / "stage2",
    "tiny-t5": PRETRAINED / "tiny" / "stage2_t5",
}
ACCEPTED = (
    f"one of {sorted(EMBEDDED)}, a directory with an adapter or a model in the Hub's format, the .pth file "
    "of a model of LAVIS, or the id of a model on the Hub, 'owner/name'"
)
_MARKS = ("config.json", PEFT_CONFIG)
_MAX_NAMED = 8
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def is_hub_id(name_or_path: str) -> bool:
    """Return whether it is the id of a model on the Hub: 'owner/name', and nothing on the disk."""
    path = EMBEDDED.get(name_or_path, Path(name_or_path))
    return not path.exists() and _HUB_ID.fullmatch(name_or_path) is not None


def resolve(name_or_path: str, *, revision: str | None = None) -> Path:
    """Return the directory or file of a checkpoint; download a model of the Hub, unless it was before.

    revision: a branch, tag or commit of the Hub; None: its main branch. The Hub's own variables apply:
    HF_TOKEN for gated models, HF_HUB_OFFLINE=1 to use only earlier downloads, HF_HOME for their directory.
    Raises CheckpointError where there is no such checkpoint, or it cannot be downloaded.
    """
    path = EMBEDDED.get(name_or_path, Path(name_or_path))
    is_on_hub = is_hub_id(name_or_path)
    if revision is not None and not is_on_hub:
        raise CheckpointError(
            f"the revision {revision!r} is given for {name_or_path!r}, which is not on the Hub; leave it out"
        )
    if is_on_hub:
        return download(name_or_path, revision, accepted=ACCEPTED)
    if (not path.is_dir() and path.suffix != ".pth") or not path.exists():
        raise CheckpointError(f"there is no checkpoint {name_or_path!r}; give {ACCEPTED}")
    _check_not_above(path)
    return path


def _check_not_above(path: Path) -> None:
    """Raise CheckpointError for a directory that is no checkpoint itself, and holds some."""
    if path.is_file() or any((path / name).is_file() for name in _MARKS):
        return
    inner = {each.parent for name in _MARKS for each in path.glob(f"*/{name}")}
    if found := sorted(map(str, inner.union(path.glob("*.pth")))):
        raise CheckpointError(
            f"{path} is no checkpoint itself, and holds {', '.join(found[:_MAX_NAMED])} "
            f"({len(found)} in all); give one of these"
        )


def fetch(hub_id: str, *, revision: str | None = None) -> VerifiedDownload:
    """Download the files of a model that are absent, then compare the hash of each with the Hub's.

    revision: a branch, tag or commit; None: the main branch. Raises CheckpointError where `hub_id` is no id
    of the Hub, where it cannot be downloaded, and where files differ, which are then deleted.
    """
    if not is_hub_id(hub_id):
        raise CheckpointError(f"{hub_id!r} is no id of the Hub, 'owner/name': there is nothing to download")
    return verify_download(hub_id, resolve(hub_id, revision=revision))
