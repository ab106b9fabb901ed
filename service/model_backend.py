"""The interface between service and tensors: the `Backend` protocol."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Protocol

from torch import Tensor

from model import (
    DecodeRequest,
    EmbeddingKind,
    Generation,
    GenerationParams,
    MemoryRequirement,
)


class EncoderId(StrEnum):
    """An image encoder: the model's, or that of a retrieval model which does not share it."""

    MAIN = "main"
    MATCHING = "matching"


class StepDecoder(Protocol):
    """The batched decoder, which requests join and leave between steps."""

    def add(self, request: DecodeRequest) -> None: ...

    def step(self) -> Sequence[tuple[DecodeRequest, tuple[Generation, ...]]]: ...

    def cancel(self, request: DecodeRequest) -> None: ...


class Backend(Protocol):
    """A loaded model. The first group may be called from any thread, the second by the engine alone."""

    # Any thread:

    @property
    def name(self) -> str: ...

    @property
    def matching_name(self) -> str:
        """Name of the model that answers /retrieve."""

    @property
    def matching_encoder(self) -> EncoderId:
        """The encoder of images that are matched."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def can_generate(self) -> bool: ...

    @property
    def is_question_conditioned(self) -> bool:
        """Whether the Q-Former reads the question, so that its output is not the image's alone."""

    @property
    def can_match(self) -> bool: ...

    def image_size(self, encoder: EncoderId) -> int:
        """Return the side S of the images that an encoder reads, in pixels."""

    def empty_embedding(self, kind: EmbeddingKind, encoder: EncoderId) -> Tensor:
        """Return a tensor on the device "meta" with the shape and dtype of one image's embedding."""

    @property
    def num_query_tokens(self) -> int:
        """Number of tokens an image is to the language model."""

    @property
    def max_prefix_tokens(self) -> int:
        """Most tokens of image and prompt together."""

    @property
    def max_text_tokens(self) -> int:
        """Most tokens of a text that is matched, to which longer ones are cut; 0 where nothing is."""

    def is_text_cut(self, text: str) -> bool:
        """Whether a text that is matched has more than `max_text_tokens`, so that its end is not read."""

    def is_question_cut(self, question: str) -> bool:
        """Whether the Q-Former reads questions, and not the end of this one."""

    def caption_prompt(self) -> str: ...

    def question_prompt(
        self, question: str, history: Sequence[tuple[str, str]], template: str | None
    ) -> str: ...

    def tokenize_prompt(self, prompt: str, params: GenerationParams) -> tuple[int, ...]:
        """Tokenize a prompt, and check that its generation can ever run.

        Raises model.errors.InvalidPromptError where image, prompt and answer together are too long.
        Raises model.errors.InvalidParamsError where there would never be room for the answer.
        """

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return the text of each token by itself."""

    def kv_bytes(self, requirements: Sequence[MemoryRequirement]) -> int:
        """Compute the most bytes that the keys and values of such sequences take together."""

    @property
    def last_progress(self) -> float:
        """When a layer of the model ended last, on the monotonic clock."""

    # The engine's thread alone:

    def to_device(self, tensor: Tensor) -> Tensor: ...

    def synchronize(self) -> None:
        """Wait until the device has done all it was given, so that durations are right."""

    def free_memory(self) -> None:
        """Release what the allocator caches, after the device ran out of memory.

        Raises model.errors.DeviceLostError where the device then computes nothing at all.
        """

    def encode_images(self, pixels: Tensor, encoder: EncoderId) -> Tensor:
        """Encode [B, S, S, 3] uint8 pixels into the [B, P, V] image_features of an encoder."""

    def encode(self, kind: EmbeddingKind, image_features: Tensor) -> Tensor:
        """Compute the [B, ...] embeddings of a kind from [B, P, V] image_features."""

    def build_decoder(self) -> StepDecoder: ...

    def build_decode_request(
        self, encoded: Tensor, prompt_ids: tuple[int, ...], params: GenerationParams, question: str | None
    ) -> DecodeRequest:
        """Build a request from the [Q, D] query_output, or with a question from the [P, V] image_features."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Compute the normalised [M, E] embeddings of texts."""

    def similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Compute the [N, M] cosines of [N, Q, E] and [M, E]."""

    def match_logits(self, image_features: Tensor, texts: Sequence[str]) -> Tensor:
        """Compute [K, 2] logits of [K, P, V] and K texts; index 1 means that they belong together."""
