"""The whole model: pixels in, answers out.

pixel_values → vision_model → image_features → ln_vision → (query_tokens, qformer) → query_output
→ language_projection → language_model_inputs → language_model → text
"""

from collections.abc import Callable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from model.checkpoints import IN_FLOAT32, LoadOptions, load_blip2
from model.components import Blip2Parts
from model.errors import TaskUnavailableError
from model.generation import DecodeJob, Generation, GenerationParams, run_jobs
from model.language import LanguageModel
from model.packing import pack_linears
from model.qformer import QFormer


class Blip2(nn.Module):
    """BLIP-2 composed of its parts (paper, section 3).

    The frozen parts, vision and language model, run each in its own type; what stands between them
    (ln_vision, Q-Former, projection, matcher) in float32. The casts happen where they meet.

    name: what it was loaded as. identify: gives the fingerprint. language_model and language_projection are
    None in a retrieval-only model, matcher where no retrieval model was named, question_reader where the
    Q-Former reads images alone.
    """

    def __init__(self, parts: Blip2Parts, *, name: str = "", identify: Callable[[], str] = str) -> None:
        super().__init__()
        self.name = name
        self._identify = identify
        self.vision_model = parts.vision_model
        self.preprocess = parts.preprocess
        self.ln_vision = parts.ln_vision
        self.query_tokens = parts.query_tokens
        self.qformer = parts.qformer
        self.language_projection = parts.language_projection
        self.language_model = parts.language_model
        self.question_reader = parts.question_reader
        self.matcher = parts.matcher
        self.prompts = parts.prompts

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str,
        options: LoadOptions = IN_FLOAT32,
        *,
        revision: str | None = None,
    ) -> "Blip2":
        """Loads a checkpoint, ready to answer.

        name_or_path: "tiny", the embedded default, or "tiny-t5", the same with a T5; the directory of an
        adapter or of a model in the Hub's format; a .pth file of LAVIS; or an id on the Hub, "owner/name",
        of which `revision` picks a branch, tag or commit. Raises CheckpointError where it cannot be loaded,
        which goes for a T5 in float16 too.
        """
        loaded = load_blip2(name_or_path, options, revision=revision)
        return cls(loaded.parts, name=name_or_path, identify=loaded.identify()).eval()

    def share_vision_model(self, other: "Blip2") -> bool:
        """Has both models use one image encoder where theirs are equal, so that one is held and run once.

        Each keeps its own `ln_vision`, which is trained with the Q-Former. Gives whether image features of
        the one serve the other: their encoders are equal, and so are the pixels that they are given.
        """
        if self.vision_model is not other.vision_model:
            if not self.vision_model.computes_as(other.vision_model):
                return False
            other.vision_model = self.vision_model
        return self.preprocess.makes_same_pixels(other.preprocess)

    def pack(self, qformer_dtype: torch.dtype = torch.float32) -> int:
        """Readies a model that only computes from now on for its CPU; gives the number of layers changed.

        The weights of linear layers are laid out for a CPU's products, see `model.packing`. What the model
        gives is the same up to rounding, and what lies on another device stays as it is. qformer_dtype: of
        the Q-Formers' products; bfloat16 halves their time.
        """
        if self.device.type == "cpu" and self.dtype == torch.bfloat16:
            self.vision_model.attend_by_products()
        qformers = [module for module in self.modules() if isinstance(module, QFormer)]
        return sum(pack_linears(qformer, qformer_dtype) for qformer in qformers) + pack_linears(self)

    @cached_property
    def fingerprint(self) -> str:
        """A sha256 over weights, configuration and types; "" for a model that was not loaded.

        The first time, it may read the weight files once more, at a gigabyte a second or so.
        """
        return self._identify()

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
    def parts(self) -> Blip2Parts:
        """The parts as they are now, to save them."""
        return Blip2Parts(
            vision_model=self.vision_model,
            preprocess=self.preprocess,
            ln_vision=self.ln_vision,
            query_tokens=self.query_tokens,
            qformer=self.qformer,
            language_projection=self.language_projection,
            language_model=self.language_model,
            question_reader=self.question_reader,
            matcher=self.matcher,
            prompts=self.prompts,
        )

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Turns [B, 3, S, S] normalised images into [B, P, V] image features, before `ln_vision`."""
        return self.vision_model(pixel_values.to(self.device))

    def encode_queries(self, image_features: Tensor, questions: Sequence[str] | None = None) -> Tensor:
        """Reads [B, P, V] image features with the queries; gives [B, Q, D] query outputs, float32.

        questions: B texts that a question-conditioned Q-Former is shown; no other one looks at them.
        """
        normed = self.ln_vision(image_features.float())
        query_tokens = self.query_tokens.expand(len(image_features), -1, -1)
        if self.question_reader is None:
            return self.qformer.encode_queries(query_tokens, normed).query_output
        text_embeds, mask = self.question_reader(questions or [""] * len(image_features))
        states = self.qformer.encode_pairs(query_tokens, text_embeds, mask, normed)
        return states[:, : query_tokens.shape[1]]

    def encode_for_each(self, image_features: Tensor, questions: Sequence[str]) -> list[Tensor]:
        """Gives what `encode_queries` does for each question, in one pass if it can be."""
        if self.question_reader is None:
            return [self.encode_queries(image_features)] * len(questions)
        count = len(image_features)
        return [self.encode_queries(image_features, [question] * count) for question in questions]

    def project_queries(self, query_output: Tensor) -> Tensor:
        """Turns [B, Q, D] query outputs into [B, Q, L] soft tokens for the language model, float32.

        Raises TaskUnavailableError in a retrieval-only model.
        """
        if self.language_projection is None:
            raise _no_language_model(self.name)
        return self.language_projection(query_output)

    def require_language_model(self) -> LanguageModel:
        """Gives the language model. Raises TaskUnavailableError in a retrieval-only model."""
        if self.language_model is None:
            raise _no_language_model(self.name)
        return self.language_model

    @torch.inference_mode()
    def generate(
        self, language_model_inputs: Tensor, prompts: Sequence[str], params: GenerationParams
    ) -> list[tuple[Generation, ...]]:
        """Answers B images, [B, Q, L] soft tokens, each with its own prompt; the best answer first.

        Raises TaskUnavailableError in a retrieval-only model, InvalidPromptError where a prompt is too long
        and InvalidParamsError where a parameter is out of its bounds.
        """
        language_model = self.require_language_model()
        jobs = [
            DecodeJob(soft_tokens, language_model.tokenize(prompt), params)
            for soft_tokens, prompt in zip(language_model_inputs, prompts, strict=True)
        ]
        return run_jobs(language_model, jobs)


def _no_language_model(name: str) -> TaskUnavailableError:
    return TaskUnavailableError(
        f"the checkpoint {name!r} compares images with texts but has no language model to answer with; "
        "load a generation checkpoint"
    )
