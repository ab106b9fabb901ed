"""Loads the checkpoint that the settings name, and answers for it as a `Backend`."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from model import Blip2, Decoder, DecodeRequest, DecoderLimits, GenerationParams, check_fits
from model.checkpoints import LoadOptions, resolve_retrieval_model
from model.devices import find_device
from model.errors import DeviceUnavailableError
from model.language import LanguageModel
from model.matching import Matcher
from model.packing import can_pack
from service.backend import StepDecoder
from service.jobs import Kind, Tower
from service.settings import Settings, SettingsError


def load_backend(settings: Settings) -> "Blip2Backend":
    """Loads model and weights; takes as long as that takes.

    Raises CheckpointError where they cannot be loaded, SettingsError where the device is not there or the
    second checkpoint cannot match.
    """
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    try:
        device = find_device(settings.device)
    except DeviceUnavailableError as error:
        raise SettingsError(f"BLIP2_DEVICE: {error}") from error
    if settings.spread and device.type != "cuda":
        raise SettingsError(
            f"BLIP2_SPREAD lays the language model over GPUs, and the device is {str(device)!r}; unset it"
        )
    if settings.qformer_dtype != "float32" and device.type != "cpu":
        raise SettingsError(
            f"BLIP2_QFORMER_DTYPE is {settings.qformer_dtype!r}, which is for a CPU, and the device is "
            f"{str(device)!r}; unset it"
        )
    qformer_dtype = getattr(torch, settings.qformer_dtype)
    if qformer_dtype != torch.float32 and not can_pack(qformer_dtype):
        raise SettingsError("BLIP2_QFORMER_DTYPE is 'bfloat16', which this CPU does not compute in; unset it")
    options = LoadOptions(
        device=device,
        dtype=None if settings.dtype == "auto" else getattr(torch, settings.dtype),
        image_size=settings.image_size,
        quantize=settings.quantize,
        spread=settings.spread,
    )
    blip2, matching = Blip2.from_pretrained(settings.model, options, revision=settings.revision), None
    if settings.retrieval_model is not None:
        matching = _load_matching(settings.retrieval_model, settings.retrieval_revision, options)
    backend = Blip2Backend(blip2, matching, DecoderLimits(settings.max_rows, settings.kv_bytes))
    backend.pack(qformer_dtype)
    return backend


def _load_matching(name: str, revision: str | None, options: LoadOptions) -> Blip2:
    path = resolve_retrieval_model(name, revision=revision)
    matching = Blip2.from_pretrained(str(path), options)
    if matching.matcher is None:
        raise SettingsError(
            f"BLIP2_RETRIEVAL_MODEL is {name!r}, which has no ITC and ITM heads; "
            "set it to a retrieval checkpoint"
        )
    matching.name = name
    return matching


class Blip2Backend:
    """A `Backend` over a BLIP-2 model, and over a second one that matches, unless the first does.

    Where their image encoders are equal, one is held, and one pass of it serves both.
    """

    def __init__(
        self, blip2: Blip2, matching: Blip2 | None = None, limits: DecoderLimits | None = None
    ) -> None:
        self._blip2 = blip2
        self._limits = limits or DecoderLimits()
        self._matching = matching or blip2
        self.fingerprint = self._blip2.fingerprint
        if self._matching is not self._blip2:
            both = f"{self._blip2.fingerprint} {self._matching.fingerprint}"
            self.fingerprint = hashlib.sha256(both.encode()).hexdigest()
        self.matching_tower = Tower.MAIN if self._blip2.share_vision_model(self._matching) else Tower.MATCHING

    def pack(self, qformer_dtype: torch.dtype) -> None:
        """Readies what lies on a CPU, see `Blip2.pack`; before the first job."""
        self._blip2.pack(qformer_dtype)
        self._matching.pack(qformer_dtype)
        if qformer_dtype != torch.float32:  # what is cached is not the same
            self.fingerprint = hashlib.sha256(f"{self.fingerprint} {qformer_dtype}".encode()).hexdigest()

    @property
    def name(self) -> str:
        return self._blip2.name

    @property
    def matching_name(self) -> str:
        return self._matching.name

    @property
    def device(self) -> str:
        return str(self._blip2.device)

    @property
    def dtype(self) -> str:
        return str(self._blip2.dtype).removeprefix("torch.")

    @property
    def can_generate(self) -> bool:
        return self._blip2.language_model is not None

    @property
    def shows_questions(self) -> bool:
        return self._blip2.question_embedder is not None

    @property
    def can_match(self) -> bool:
        return self._matching.matcher is not None

    def preprocess(self, image: Image.Image, tower: Tower) -> Tensor:
        return self._of(tower).preprocess(image)

    @property
    def num_query_tokens(self) -> int:
        return self._blip2.query_tokens.shape[1]

    def caption_prompt(self) -> str:
        return self._blip2.prompts.caption_prompt()

    def question_prompt(self, question: str, history: Sequence[tuple[str, str]], template: str | None) -> str:
        prompts = self._blip2.prompts if template is None else replace(self._blip2.prompts, question=template)
        return prompts.question_prompt(question, history)

    def tokenize_prompt(self, prompt: str, params: GenerationParams) -> tuple[int, ...]:
        prompt_ids = self._language_model.tokenize(prompt)
        check_fits(
            self._language_model,
            self._limits,
            num_prompt_tokens=len(prompt_ids),
            num_soft_tokens=self._blip2.query_tokens.shape[1],
            params=params,
        )
        return prompt_ids

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return self._language_model.token_texts(token_ids)

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor.to(self._blip2.device)

    def synchronize(self) -> None:
        if self._blip2.device.type == "cuda":
            torch.cuda.synchronize(self._blip2.device)

    def free_memory(self) -> None:
        if self._blip2.device.type == "cuda":
            torch.cuda.empty_cache()

    def encode_images(self, pixel_values: Tensor, tower: Tower) -> Tensor:
        return self._of(tower).encode_images(pixel_values)

    def encode_kind(self, kind: Kind, image_features: Tensor) -> Tensor:
        if kind is Kind.QUERY_OUTPUT:
            return self._blip2.encode_queries(image_features)
        return self._matcher.image_embeds(self._matcher.encode_image_queries(image_features).query_output)

    def build_decoder(self) -> StepDecoder:
        return Decoder(self._language_model, self._limits)

    def build_decode_job(
        self, encoded: Tensor, prompt_ids: tuple[int, ...], params: GenerationParams, question: str | None
    ) -> DecodeRequest:
        query_output = encoded
        if question is not None:
            query_output = self._blip2.encode_queries(encoded[None], [question])[0]
        language_model_inputs = self._blip2.project_queries(query_output[None])[0]  # [Q, L]
        return DecodeRequest(language_model_inputs, prompt_ids, params)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        return self._matcher.text_embeds(*self._matcher.tokenize(texts))

    def similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        return self._matcher.itc_scores(image_embeds, text_embeds)

    def match_logits(self, image_features: Tensor, texts: Sequence[str]) -> Tensor:
        return self._matcher.match_logits(image_features, *self._matcher.tokenize(texts))

    def _of(self, tower: Tower) -> Blip2:
        return self._blip2 if tower is Tower.MAIN else self._matching

    @property
    def _language_model(self) -> LanguageModel:
        assert self._blip2.language_model is not None, "asked to generate without a language model"
        return self._blip2.language_model

    @property
    def _matcher(self) -> Matcher:
        assert self._matching.matcher is not None, "asked to match without a matcher"
        return self._matching.matcher
