"""BLIP-2 models behind the `Backend` protocol."""

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from model import (
    Blip2,
    Decoder,
    DecodeRequest,
    DecoderLimits,
    EmbeddingKind,
    GenerationParams,
    LanguageModel,
    MemoryRequirement,
    check_fits,
)
from model.devices import check_computes
from model.matching import Matcher
from service.model_backend import EncoderId, StepDecoder


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
        self.fingerprint = blip2.fingerprint  # reads the weight files in order; packing reads them in pieces
        if self.matching_model is not blip2:
            self.fingerprint = _sha256(f"{blip2.fingerprint} {self.matching_model.fingerprint}")
        is_shared = blip2.share_vision_model(self.matching_model)
        self.matching_encoder = EncoderId.MAIN if is_shared else EncoderId.MATCHING
        self.last_progress = 0.0
        for layer in {*self.generating_model.layers, *self.matching_model.layers}:
            layer.register_forward_hook(self._note_progress)

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

    def image_size(self, encoder: EncoderId) -> int:
        return self._model_of(encoder).image_size

    def empty_embedding(self, kind: EmbeddingKind, encoder: EncoderId) -> Tensor:
        is_matching = kind is EmbeddingKind.IMAGE_EMBEDS
        return (self.matching_model if is_matching else self._model_of(encoder)).empty_embedding(kind)

    @property
    def num_query_tokens(self) -> int:
        return self.generating_model.query_tokens.shape[1]

    @property
    def max_prefix_tokens(self) -> int:
        return min(self._language_model.max_positions, self._limits.max_prefix_tokens)

    @property
    def max_text_tokens(self) -> int:
        return 0 if self.matching_model.matcher is None else self.matching_model.matcher.max_text_tokens

    def is_text_cut(self, text: str) -> bool:
        return self._matcher.is_cut(text)

    def is_question_cut(self, question: str) -> bool:
        embedder = self.generating_model.question_embedder
        return embedder is not None and embedder.is_cut(question)

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

    def _note_progress(self, *_: object) -> None:
        self.last_progress = time.monotonic()

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
