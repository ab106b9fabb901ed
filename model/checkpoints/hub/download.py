"""Downloads models of the Hub, and verifies the hashes of their files."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from model.errors import CheckpointError

_PATTERNS = ("*.json", "*.safetensors", "*.txt", "*.model")


@dataclass(frozen=True, slots=True)
class VerifiedDownload:
    """A model on the disk. num_files: those whose hash equals that on the Hub."""

    directory: Path
    commit: str
    num_files: int


def download(hub_id: str, revision: str | None, *, accepted: str) -> Path:
    """Download a model, unless it was before, and return its directory.

    accepted: the names that are accepted, for error messages. Raises CheckpointError.
    """
    try:
        directory = Path(snapshot_download(hub_id, revision=revision, allow_patterns=list(_PATTERNS)))
    except Exception as error:  # the errors of the client, of HTTP below it and of the disk share no base
        name = hub_id if revision is None else f"{hub_id} at the revision {revision!r}"
        raise CheckpointError(f"cannot fetch {name}: {_explain(error, accepted)}") from error
    if not any(directory.glob("*.safetensors")):
        raise CheckpointError(
            f"{hub_id} has no safetensors; pickles (*.bin) are not read, for they may run code: load it with "
            "transformers, save it with save_pretrained, and give that directory"
        )
    return directory


def verify_download(hub_id: str, directory: Path) -> VerifiedDownload:
    """Compare the hash of each downloaded file with the Hub's.

    directory: the snapshot of a commit, named after it. Raises CheckpointError where files differ. Those are
    deleted, so that the next download fetches them again.
    """
    commit = directory.name
    try:
        result = HfApi().verify_repo_checksums(hub_id, revision=commit)
    except Exception as error:  # the errors of the client and of HTTP below it share no base
        raise CheckpointError(f"cannot verify {hub_id}: {type(error).__name__} {error}") from error
    damaged = [each["path"] for each in result.mismatches]
    for path in damaged:
        (directory / path).resolve().unlink(missing_ok=True)  # two files may share it
        (directory / path).unlink(missing_ok=True)
    if damaged:
        raise CheckpointError(
            f"{', '.join(damaged)} of {hub_id} were not what the Hub has, and are deleted; fetch it again"
        )
    return VerifiedDownload(directory, commit, result.checked_count)


def _explain(error: Exception, accepted: str) -> str:
    if isinstance(error, GatedRepoError):
        return "it is gated; accept its terms on the Hub, and set HF_TOKEN to a token that may read it"
    if isinstance(error, RevisionNotFoundError):
        return "the Hub has no such revision of it; give a branch, a tag or a whole commit"
    if isinstance(error, RepositoryNotFoundError):
        return f"the Hub has no such model, or HF_TOKEN may not read it; give {accepted}"
    if isinstance(error, LocalEntryNotFoundError):
        return (
            "it was not downloaded before, and the Hub cannot be reached or HF_HUB_OFFLINE is set; "
            "download it where there is a network, with 'hf download', into the same HF_HOME"
        )
    message = str(error).splitlines()[0] if str(error) else ""
    return f"{type(error).__name__} {message}; what was downloaded is kept, try again"
