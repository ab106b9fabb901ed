"""The interface between service and tensors: the `Backend` protocol, and BLIP-2 models behind it."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from model import (
    Blip2,
    Decoder,
    DecodeRequest,
    DecoderLimits,
    EmbeddingKind,
    Generation,
    GenerationParams,
    LanguageModel,
    MemoryRequirement,
    check_fits,
)
from model.devices import check_computes
from model.matching import Matcher


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

    def empty_embedding(self, kind: EmbeddingKind, encoder: EncoderId) -> Tensor:
        """Return a tensor on the device "meta" with the shape and dtype of one image's embedding."""

    def image_size(self, encoder: EncoderId) -> int:
        """Return the side S of the images that an encoder reads, in pixels."""

    @property
    def num_query_tokens(self) -> int:
        """Number of tokens an image is to the language model."""

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


class Blip2Backend:
    """A `Backend` over a BLIP-2 model, and over a second one that matches, unless the first does.

    Where their image encoders are equal, one is held, and one pass of it serves both.
    """

    def __init__(
        self, blip2: Blip2, matching: Blip2 | None = None, limits: DecoderLimits | None = None
    ) -> None:
        self.generating_model = blip2
        self.matching_model = matching or blip2
        self._limits = limits or DecoderLimits()
        self.fingerprint = blip2.fingerprint
        if self.matching_model is not blip2:
            self.fingerprint = _sha256(f"{blip2.fingerprint} {self.matching_model.fingerprint}")
        is_shared = blip2.share_vision_model(self.matching_model)
        self.matching_encoder = EncoderId.MAIN if is_shared else EncoderId.MATCHING

    def pack(self, qformer_dtype: torch.dtype) -> None:
        """Lay out the weights for a CPU, see `Blip2.pack`; to be called before the first request."""
        self.generating_model.pack(qformer_dtype)
        self.matching_model.pack(qformer_dtype)
        if qformer_dtype != torch.float32:  # its embeddings differ, and must not be taken for float32's
            self.fingerprint = _sha256(f"{self.fingerprint} {qformer_dtype}")

    @property
    def name(self) -> str:
        return self.generating_model.name

    @property
    def matching_name(self) -> str:
        return self.matching_model.name

    @property
    def device(self) -> str:
        return str(self.generating_model.device)

    @property
    def dtype(self) -> str:
        return str(self.generating_model.dtype).removeprefix("torch.")

    @property
    def can_generate(self) -> bool:
        return self.generating_model.language_model is not None

    @property
    def is_question_conditioned(self) -> bool:
        return self.generating_model.question_embedder is not None

    @property
    def can_match(self) -> bool:
        return self.matching_model.matcher is not None

    def empty_embedding(self, kind: EmbeddingKind, encoder: EncoderId) -> Tensor:
        is_matching = kind is EmbeddingKind.IMAGE_EMBEDS
        return (self.matching_model if is_matching else self._model_of(encoder)).empty_embedding(kind)

    def image_size(self, encoder: EncoderId) -> int:
        return self._model_of(encoder).image_size

    @property
    def num_query_tokens(self) -> int:
        return self.generating_model.query_tokens.shape[1]

    def caption_prompt(self) -> str:
        return self.generating_model.prompts.caption_prompt()

    def question_prompt(self, question: str, history: Sequence[tuple[str, str]], template: str | None) -> str:
        prompts = (
            self.generating_model.prompts
            if template is None
            else replace(self.generating_model.prompts, question=template)
        )
        return prompts.question_prompt(question, history)

    def tokenize_prompt(self, prompt: str, params: GenerationParams) -> tuple[int, ...]:
        prompt_ids = self._language_model.tokenize(prompt)
        check_fits(
            self._language_model,
            self._limits,
            num_prompt_tokens=len(prompt_ids),
            num_soft_tokens=self.num_query_tokens,
            params=params,
        )
        return prompt_ids

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return self._language_model.token_texts(token_ids)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self.generating_model.device)

    def synchronize(self) -> None:
        if self.generating_model.device.type == "cuda":
            torch.cuda.synchronize(self.generating_model.device)

    def free_memory(self) -> None:
        if self.generating_model.device.type == "cuda":
            torch.cuda.empty_cache()
        check_computes(self.generating_model.device)

    def encode_images(self, pixels: Tensor, encoder: EncoderId) -> Tensor:
        model = self._model_of(encoder)
        return model.encode_images(model.preprocess.normalise(pixels))

    def encode(self, kind: EmbeddingKind, image_features: Tensor) -> Tensor:
        is_matching = kind is EmbeddingKind.IMAGE_EMBEDS
        return (self.matching_model if is_matching else self.generating_model).encode(kind, image_features)

    def build_decoder(self) -> StepDecoder:
        return Decoder(self._language_model, self._limits)

    def build_decode_request(
        self, encoded: Tensor, prompt_ids: tuple[int, ...], params: GenerationParams, question: str | None
    ) -> DecodeRequest:
        return DecodeRequest(self.generating_model.project(encoded, question), prompt_ids, params)

    def kv_bytes(self, requirements: Sequence[MemoryRequirement]) -> int:
        return self._language_model.kv_bytes(requirements)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._matcher.text_embeds(*self._matcher.tokenize(texts))

    def similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        return self._matcher.itc_scores(image_embeds, text_embeds)

    def match_logits(self, image_features: Tensor, texts: Sequence[str]) -> Tensor:
        return self._matcher.match_logits(image_features, *self._matcher.tokenize(texts))

    def _model_of(self, encoder: EncoderId) -> Blip2:
        return self.generating_model if encoder is EncoderId.MAIN else self.matching_model

    @property
    def _language_model(self) -> LanguageModel:
        return self.generating_model.require_language_model()

    @property
    def _matcher(self) -> Matcher:
        return self.matching_model.require_matcher()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
