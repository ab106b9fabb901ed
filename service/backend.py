"""What the service asks of a model: the seam between scheduling and tensors."""

from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from torch import Tensor

from model import DecodeRequest, Generation, GenerationParams
from service.jobs import Kind, Tower


class StepDecoder(Protocol):
    """The batched decoder: jobs join and leave between steps."""

    def add(self, job: DecodeRequest) -> None: ...

    def step(self) -> Sequence[tuple[DecodeRequest, tuple[Generation, ...]]]: ...

    def cancel(self, job: DecodeRequest) -> None: ...

    def has_room(self, num_prefix_tokens: int, params: GenerationParams) -> bool:
        """Whether a job of so many prompt and image tokens could begin at the next step."""


class Backend(Protocol):
    """A loaded model. The first group may be called from any thread, the second by the engine alone."""

    @property
    def name(self) -> str: ...

    @property
    def matching_name(self) -> str:
        """The name of the model that answers /retrieve."""

    @property
    def matching_tower(self) -> Tower:
        """Which tower encodes the images that are matched."""

    @property
    def fingerprint(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def dtype(self) -> str: ...

    @property
    def can_generate(self) -> bool: ...

    @property
    def shows_questions(self) -> bool:
        """Whether the Q-Former is shown the question, so that its output is not the image's alone."""

    @property
    def can_match(self) -> bool: ...

    def preprocess(self, image: Image.Image, tower: Tower) -> Tensor:
        """Turns an image into the [3, S, S] pixel_values that a tower reads, on the CPU."""

    @property
    def num_query_tokens(self) -> int:
        """How many tokens an image is to the language model."""

    def caption_prompt(self) -> str: ...

    def question_prompt(
        self, question: str, history: Sequence[tuple[str, str]], template: str | None
    ) -> str: ...

    def tokenize_prompt(self, prompt: str, params: GenerationParams) -> tuple[int, ...]:
        """Raises model.errors.InvalidPromptError where image, prompt and answer together are too long.

        Raises model.errors.InvalidParamsError where there would never be room for the answer.
        """

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Gives the text of each token by itself."""

    def to_device(self, tensor: Tensor) -> Tensor: ...

    def synchronize(self) -> None:
        """Waits until the device has done all it was given, so that clocks tell the truth."""

    def free_memory(self) -> None:
        """Gives back what the allocator keeps for later, after the device ran out of memory."""

    def encode_images(self, pixel_values: Tensor, tower: Tower) -> Tensor:
        """Turns [B, 3, S, S] into the [B, P, V] image_features of a tower."""

    def encode_kind(self, kind: Kind, image_features: Tensor) -> Tensor:
        """Turns [B, P, V] image_features into [B, ...] of the kind asked for."""

    def build_decoder(self) -> StepDecoder: ...

    def build_decode_job(
        self, encoded: Tensor, prompt_ids: tuple[int, ...], params: GenerationParams, question: str | None
    ) -> DecodeRequest:
        """encoded: the [Q, D] query_output; with a question for the Q-Former the [P, V] image_features."""

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Gives [M, E], normalised."""

    def similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        """Turns [N, Q, E] and [M, E] into [N, M] cosines."""

    def match_logits(self, image_features: Tensor, texts: Sequence[str]) -> Tensor:
        """Turns [K, P, V] and K texts into [K, 2] logits; index 1 says that they belong together."""
