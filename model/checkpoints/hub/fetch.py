"""Downloads a model of the Hub ahead of time, and proves that what lies on the disk is what the Hub has."""

from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi

from model.checkpoints.resolve import is_hub_id, locate
from model.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Fetched:
    """Where a model lies, of which commit, and how many of its files have the hash that the Hub tells."""

    directory: Path
    commit: str
    num_files: int


def fetch(hub_id: str, *, revision: str | None = None) -> Fetched:
    """Downloads the files of a model that are not there yet, then compares the hash of each with the Hub's.

    revision: a branch, tag or commit; None: the main branch. Raises CheckpointError for what is no id of the
    Hub, what cannot be downloaded, and where files differ; those are deleted, so that the next call brings
    them anew.
    """
    if not is_hub_id(hub_id):
        raise CheckpointError(f"{hub_id!r} is no id of the Hub, 'owner/name': there is nothing to download")
    directory = locate(hub_id, revision=revision)
    commit = directory.name
    try:
        found = HfApi().verify_repo_checksums(hub_id, revision=commit)
    except Exception as error:  # the errors of the client and of HTTP below it share no base
        raise CheckpointError(f"cannot verify {hub_id}: {type(error).__name__} {error}") from error
    damaged = [each["path"] for each in found.mismatches]
    for path in damaged:
        (directory / path).resolve().unlink(missing_ok=True)  # two files may share it
        (directory / path).unlink(missing_ok=True)
    if damaged:
        raise CheckpointError(
            f"{', '.join(damaged)} of {hub_id} were not what the Hub has, and are deleted; fetch it again"
        )
    return Fetched(directory, commit, found.checked_count)
