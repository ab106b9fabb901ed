"""Finds a checkpoint by its name: embedded, in a directory or file, or on the Hub."""

import re
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

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
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_READ_FILES = ("*.json", "*.safetensors", "*.txt", "*.model")


def is_hub_id(name_or_path: str) -> bool:
    """Whether it names a model on the Hub: 'owner/name', and nothing on the disk."""
    path = EMBEDDED.get(name_or_path, Path(name_or_path))
    return not path.exists() and _HUB_ID.fullmatch(name_or_path) is not None


def locate(name_or_path: str, *, revision: str | None = None) -> Path:
    """Gives the directory or file of a checkpoint; one of the Hub is downloaded, unless it was before.

    revision: a branch, tag or commit of the Hub; None: its main branch. The Hub's own variables hold:
    HF_TOKEN for what is gated, HF_HUB_OFFLINE=1 for what was downloaded before, HF_HOME for where that lies.
    Raises CheckpointError where there is no such checkpoint, or it cannot be downloaded.
    """
    path = EMBEDDED.get(name_or_path, Path(name_or_path))
    is_on_hub = is_hub_id(name_or_path)
    if revision is not None and not is_on_hub:
        raise CheckpointError(
            f"the revision {revision!r} is given for {name_or_path!r}, which is not on the Hub; leave it out"
        )
    if is_on_hub:
        return _download(name_or_path, revision)
    if (not path.is_dir() and path.suffix != ".pth") or not path.exists():
        raise CheckpointError(f"there is no checkpoint {name_or_path!r}; give {ACCEPTED}")
    return path


def _download(hub_id: str, revision: str | None) -> Path:
    try:
        directory = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_READ_FILES)))
    except Exception as error:  # the errors of the client, of HTTP below it and of the disk share no base
        where = hub_id if revision is None else f"{hub_id} at the revision {revision!r}"
        raise CheckpointError(f"cannot fetch {where}: {_explain(error)}") from error
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{hub_id} has no safetensors; pickles (*.bin) are not read, for they may run code: load it with "
            "transformers, save it with save_pretrained, and give that directory"
        )
    return directory


def _explain(error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return "it is gated; accept its terms on the Hub, and set HF_TOKEN to a token that may read it"
    if isinstance(error, RevisionNotFoundError):
        return "the Hub has no such revision of it; give a branch, a tag or a whole commit"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no such model, or HF_TOKEN may not read it; give {ACCEPTED}"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "it was not downloaded before, and the Hub cannot be reached or HF_HUB_OFFLINE is set; "
            "download it where there is a network, with 'hf download', into the same HF_HOME"
        )
    message = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__} {message}; what was downloaded is kept, try again"
