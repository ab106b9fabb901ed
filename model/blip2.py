"""The whole model: pixels in, answers out.

pixel_values → vision_model → image_features → ln_vision → (query_tokens, qformer) → query_output
→ language_projection → language_model_inputs → language_model → text
"""

import itertools
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cached_property

import torch
from torch import Tensor, nn

from model.checkpoints import IN_FLOAT32, LoadOptions, load_blip2
from model.components import Blip2Components
from model.errors import NonFiniteError, TaskUnavailableError
from model.generation import DecodeRequest, Generation, GenerationParams, run_requests
from model.language import LanguageModel
from model.matching import Matcher
from model.packing import copy_weights, pack_linears
from model.qformer import QFormer, QFormerLayer


class EmbeddingKind(StrEnum):
    """A representation of an image that is worth caching."""

    QUERY_OUTPUT = "query_output"  # [Q, D], of the Q-Former in front of the language model
    IMAGE_EMBEDS = "image_embeds"  # [Q, E], normalised, of the matcher's Q-Former
    IMAGE_FEATURES = "image_features"  # [P, V], before ln_vision; the others are computed from them


class Blip2(nn.Module):
    """BLIP-2 composed of its components (paper, section 3).

    The frozen components, vision and language model, each run in their own type; those between them
    (ln_vision, Q-Former, projection, matcher) in float32. Tensors are cast where they meet.

    name: what it was loaded as. compute_fingerprint: for `fingerprint`. language_model and
    language_projection are None in a retrieval-only model, matcher where no retrieval model was named,
    question_embedder where the Q-Former attends to images alone.
    """

    def __init__(
        self,
        components: Blip2Components,
        *,
        name: str = "",
        compute_fingerprint: Callable[[], str] = str,
    ) -> None:
        super().__init__()
        self.name = name
        self._compute_fingerprint = compute_fingerprint
        self.vision_model = components.vision_model
        self.preprocess = components.preprocess
        self.ln_vision = components.ln_vision
        self.query_tokens = components.query_tokens
        self.qformer = components.qformer
        self.language_projection = components.language_projection
        self.language_model = components.language_model
        self.question_embedder = components.question_embedder
        self.matcher = components.matcher
        self.prompts = components.prompts

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        options: LoadOptions = IN_FLOAT32,
        *,
        revision: str | None = None,
    ) -> "Blip2":
        """Load a checkpoint, ready for inference.

        name_or_path: "tiny", the embedded default, or "tiny-t5", the same with a T5; the directory of an
        adapter or of a model in the Hub's format; a .pth file of LAVIS; or an id on the Hub, "owner/name",
        of which `revision` selects a branch, tag or commit. Raises CheckpointError where it cannot be
        loaded; a T5 cannot be in float16.
        """
        checkpoint = load_blip2(name_or_path, options, revision=revision)
        compute_fingerprint = checkpoint.fingerprint_function()
        return cls(checkpoint.components, name=name_or_path, compute_fingerprint=compute_fingerprint).eval()

    def share_vision_model(self, other: "Blip2") -> bool:
        """Make both models use one image encoder where theirs are equal, so that it is held and run once.

        Each keeps its own `ln_vision`, which is trained with the Q-Former. Returns whether image features of
        one serve the other: their encoders are equal, and so are their pixels.
        """
        if self.vision_model is not other.vision_model:
            if not self.vision_model.is_equal(other.vision_model):
                return False
            other.vision_model = self.vision_model
        return self.preprocess.has_equal_output(other.preprocess)

    def pack(self, qformer_dtype: torch.dtype = torch.float32) -> int:
        """Prepare the model for inference on a CPU; return the number of layers changed.

        The weights of linear layers are packed, see `model.packing`. Results are equal up to rounding, and
        what is on another device stays as it is. qformer_dtype: of the Q-Formers' products; bfloat16 halves
        their time.
        """
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            self.vision_model.use_cpu_attention()
        qformers = [module for module in self.modules() if isinstance(module, QFormer)]
        count = sum(pack_linears(qformer, qformer_dtype) for qformer in qformers) + pack_linears(self)
        if count:
            copy_weights(self)
        return count

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over weights, configuration and types; "" for a model that was not loaded.

        The first time, it may read the weight files again, at about a gigabyte a second.
        """
        return self._compute_fingerprint()

    @property
    def layers(self) -> list[nn.Module]:
        """One module for each layer of each component, called whenever that layer runs."""
        stacks = (
            stack
            for name, stack in self.named_modules()
            # Not the lists within a layer, which T5 has.
            if isinstance(stack, nn.ModuleList) and not any(part.isdigit() for part in name.split("."))
        )
        layers = itertools.chain.from_iterable(stacks)
        return [layer.attention if isinstance(layer, QFormerLayer) else layer for layer in layers]

    @property
    def image_size(self) -> int:
        return self.vision_model.image_size

    @property
    def device(self) -> torch.device:
        return self.query_tokens.device

    @property
    def dtype(self) -> torch.dtype:
        return self.vision_model.dtype

    @property
    def components(self) -> Blip2Components:
        """The present components, to save them."""
        return Blip2Components(
            vision_model=self.vision_model,
            preprocess=self.preprocess,
            ln_vision=self.ln_vision,
            query_tokens=self.query_tokens,
            qformer=self.qformer,
            language_projection=self.language_projection,
            language_model=self.language_model,
            question_embedder=self.question_embedder,
            matcher=self.matcher,
            prompts=self.prompts,
        )

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Encode [B, 3, S, S] normalised images into [B, P, V] image features, before `ln_vision`."""
        return self.vision_model(pixel_values.to(self.device))

    def encode_queries(self, image_features: Tensor, questions: Sequence[str] | None = None) -> Tensor:
        """Attend with the queries to [B, P, V] image features; return [B, Q, D] query outputs, float32.

        questions: B texts for a question-conditioned Q-Former; any other ignores them.
        """
        normed = self.ln_vision(image_features.float())
        query_tokens = self.query_tokens.expand(len(image_features), -1, -1)
        if self.question_embedder is None:
            return self.qformer.encode_queries(query_tokens, normed).query_output
        text_embeds, mask = self.question_embedder(questions or [""] * len(image_features))
        states = self.qformer.encode_pairs(query_tokens, text_embeds, mask, normed)
        return states[:, : query_tokens.shape[1]]

    def encode_questions(self, image_features: Tensor, questions: Sequence[str]) -> list[Tensor]:
        """Compute the query outputs of all images for each question; one pass where they do not differ."""
        if self.question_embedder is None:
            return [self.encode_queries(image_features)] * len(questions)
        count = len(image_features)
        return [self.encode_queries(image_features, [question] * count) for question in questions]

    def encode(self, kind: EmbeddingKind, image_features: Tensor) -> Tensor:
        """Compute one kind of embedding of [B, P, V] image features, [B, ...].

        Raises TaskUnavailableError where IMAGE_EMBEDS need a matcher and the checkpoint has none.
        """
        match kind:
            case EmbeddingKind.QUERY_OUTPUT:
                return self.encode_queries(image_features)
            case EmbeddingKind.IMAGE_EMBEDS:
                return self.require_matcher().embed_images(image_features)
            case EmbeddingKind.IMAGE_FEATURES:
                return image_features

    def empty_embedding(self, kind: EmbeddingKind) -> Tensor:
        """Return a tensor on the device "meta", of the shape and dtype of one image's embedding of a kind.

        Raises TaskUnavailableError where IMAGE_EMBEDS need a matcher and the checkpoint has none.
        """
        match kind:
            case EmbeddingKind.QUERY_OUTPUT:
                return torch.empty(self.query_tokens.shape[1:], device="meta")
            case EmbeddingKind.IMAGE_EMBEDS:
                matcher = self.require_matcher()
                joint_size = matcher.config.joint_size
                return torch.empty(matcher.query_tokens.shape[1], joint_size, device="meta")
            case EmbeddingKind.IMAGE_FEATURES:
                vision = self.vision_model
                return torch.empty(
                    vision.num_image_tokens, vision.hidden_size, dtype=vision.dtype, device="meta"
                )

    def project_queries(self, query_output: Tensor) -> Tensor:
        """Project [B, Q, D] query outputs to [B, Q, L] soft tokens for the language model, float32.

        Raises TaskUnavailableError in a retrieval-only model.
        """
        if self.language_projection is None:
            raise _no_language_model(self.name)
        return self.language_projection(query_output)

    def project(self, embedding: Tensor, question: str | None = None) -> Tensor:
        """Project the embedding of one image to its [Q, L] soft tokens.

        embedding: [Q, D] query output; with a question, for a question-conditioned Q-Former, [P, V] image
        features. Raises TaskUnavailableError in a retrieval-only model.
        """
        batch = embedding[None]
        query_output = batch if question is None else self.encode_queries(batch, [question])
        return self.project_queries(query_output)[0]

    def require_language_model(self) -> LanguageModel:
        """Return the language model. Raises TaskUnavailableError in a retrieval-only model."""
        if self.language_model is None:
            raise _no_language_model(self.name)
        return self.language_model

    def require_matcher(self) -> Matcher:
        """Return the matcher. Raises TaskUnavailableError where the checkpoint has none."""
        if self.matcher is None:
            raise TaskUnavailableError(
                f"the checkpoint {self.name!r} has no ITC and ITM heads; load one with them"
            )
        return self.matcher

    @torch.inference_mode()
    def generate(
        self, language_model_inputs: Tensor, prompts: Sequence[str], params: GenerationParams
    ) -> list[tuple[Generation, ...]]:
        """Answer B images, [B, Q, L] soft tokens, each with its own prompt; the best answer first.

        Raises TaskUnavailableError in a retrieval-only model, InvalidPromptError where a prompt is too long,
        InvalidParamsError where a parameter is out of its bounds, and NonFiniteError.
        """
        language_model = self.require_language_model()
        requests = [
            DecodeRequest(soft_tokens, language_model.tokenize(prompt), params)
            for soft_tokens, prompt in zip(language_model_inputs, prompts, strict=True)
        ]
        answers = run_requests(language_model, requests)
        for index, generations in enumerate(answers):
            if not all(generation.is_finite for generation in generations):
                raise NonFiniteError(f"image {index}")
        return answers


def _no_language_model(name: str) -> TaskUnavailableError:
    return TaskUnavailableError(
        f"the checkpoint {name!r} compares images with texts but has no language model to answer with; "
        "load a generation checkpoint"
    )
