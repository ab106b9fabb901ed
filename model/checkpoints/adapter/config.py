"""The config.json of an adapter: its kind, its sizes and the frozen models it was trained on."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from model.checkpoints.json_records import build_record, read_json
from model.config import QFormerConfig
from model.errors import CheckpointError
from model.prompts import PromptTemplates

FORMAT = "blip2-adapter"
VERSION = 1
_MIN_TEXT_TOKENS = 3


@dataclass(frozen=True, slots=True)
class FrozenModelRef:
    """A reference to a frozen model, which is not in the adapter.

    path: of its directory, relative to the adapter's; with a revision, a commit, its id on the Hub.
    sha256: of its weights, as `TensorFiles.sha256` returns it.
    """

    path: str
    sha256: str
    revision: str | None = None


@dataclass(frozen=True, slots=True)
class ImageConfig:
    """size: S. mean, std: of the three channels. Raises ValueError where they cannot normalise pixels."""

    size: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size is {self.size}; it must be at least 1")
        is_finite = all(map(math.isfinite, (*self.mean, *self.std)))
        if not (len(self.mean) == len(self.std) == 3 and is_finite and min(self.std) > 0):
            raise ValueError(
                f"mean is {self.mean} and std {self.std}; both must be three finite numbers, std above 0"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """The fields of an adapter's config.json.

    kind: "generation" (stage 2: language_projection) or "retrieval" (stage 1: the whole Matcher).
    prompts: None for those in which the language model answers best.
    retrieval_model: the directory of a retrieval adapter on the same encoder, relative to this one.
    question_conditioned: whether the Q-Former of a generation adapter attends to the question. The adapter
    then has a text branch, text embeddings and a tokenizer; `max_text_tokens` bounds the question.
    has_text_head: false for a retrieval adapter of a checkpoint without one, as the Hub's.
    feature_layer: of the vision model, counted from the end; see `model.vision.VisionEncoder`.
    """

    kind: Literal["generation", "retrieval"]
    vision_model: FrozenModelRef
    qformer: QFormerConfig
    image: ImageConfig
    language_model: FrozenModelRef | None = None
    prompts: PromptTemplates | None = None
    max_text_tokens: int = 32
    retrieval_model: str | None = None
    feature_layer: int = -1
    has_text_head: bool = True
    question_conditioned: bool = False

    @classmethod
    def read(cls, directory: Path) -> "AdapterConfig":
        """Read config.json. Raises CheckpointError naming the key that is unknown, missing or wrong."""
        path = directory / "config.json"
        fields: dict[str, Any] = read_json(path)
        if (version := fields.pop("version", None)) != VERSION:
            raise CheckpointError(
                f"{path} is of version {version}, this release reads {VERSION}; "
                "update the release or save the adapter again"
            )
        fields.pop("format", None)
        config = build_record(cls, fields, where=str(path))
        config.check(path)
        return config

    def write(self, path: Path) -> None:
        fields = {key: value for key, value in dataclasses.asdict(self).items() if value is not None}
        text = json.dumps({"format": FORMAT, "version": VERSION, **fields}, indent=2)
        path.write_text(text + "\n", encoding="utf-8")

    def check(self, path: Path) -> None:
        """Raise CheckpointError where fields contradict each other."""
        if self.max_text_tokens < _MIN_TEXT_TOKENS:
            raise CheckpointError(
                f"{path}: max_text_tokens is {self.max_text_tokens}, the least is {_MIN_TEXT_TOKENS}: a "
                "token between [CLS] and [SEP]; correct it"
            )
        has_text_branch = self.kind == "retrieval" or self.question_conditioned
        if has_text_branch and self.max_text_tokens > self.qformer.max_position_embeddings:
            raise CheckpointError(
                f"{path}: max_text_tokens is {self.max_text_tokens}, the Q-Former has "
                f"{self.qformer.max_position_embeddings} positions; lower the former"
            )
        if self.kind == "generation" and self.language_model is None:
            raise CheckpointError(f"{path}: a generation adapter must name its 'language_model'")
