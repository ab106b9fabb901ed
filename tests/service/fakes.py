"""A model that computes nothing hard, so that a test can hold it, poison it, and foresee its answers.

An image of one colour has the value red / 255; all that is made of it repeats that value.
"""

import base64
import io
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from model import DecodeRequest, EmbeddingKind, Generation, GenerationParams, MemoryRequirement
from model.errors import InvalidPromptError
from service.model_backend import EncoderId

POISON_RED = 13  # an image of this red makes every batch it is in fail
POISON_WORD = "poison"  # so does a prompt with this word, in the decoder
DEADLY_WORD = "deadly"  # and this one loses the device
NAN_WORD = "nan"  # this one gives a score that is not a number
MAX_PROMPT_WORDS = 50
TIMEOUT_S = 20.0


def png(red: int = 100, size: tuple[int, int] = (4, 4)) -> bytes:
    """Return the bytes of a PNG of one colour."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (red, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def png_base64(red: int = 100) -> str:
    return base64.b64encode(png(red)).decode()


def pixels(red: int) -> Tensor:
    return torch.full((2, 2, 3), red, dtype=torch.uint8)


def _number(text: str) -> float:
    try:
        return float(text) / 255
    except ValueError:
        return 0.5


def out_of_memory() -> Exception:
    return torch.OutOfMemoryError("CUDA out of memory (said by a fake)")


class FakeDecoder:
    """Ends each job after as many steps as its prompt has words; the text tells image and prompt."""

    def __init__(self, backend: "FakeBackend") -> None:
        self._backend = backend
        self._steps: dict[DecodeRequest, int] = {}

    def add(self, job: DecodeRequest) -> None:
        self._steps[job] = 0
        self._backend.num_added += 1

    def cancel(self, job: DecodeRequest) -> None:
        del self._steps[job]
        self._backend.num_cancelled += 1

    def step(self) -> list[tuple[DecodeRequest, tuple[Generation, ...]]]:
        backend = self._backend
        backend.decode_gate.wait(TIMEOUT_S)
        words = [backend.words_of(job.prompt_ids) for job in self._steps]
        backend.decode_batches.append(len(words))
        if sum(job.params.num_rows for job in self._steps) > backend.memory_rows:
            raise out_of_memory()
        if any(DEADLY_WORD in spoken for spoken in words):
            raise torch.AcceleratorError("the device is lost")
        if any(POISON_WORD in spoken for spoken in words):
            raise RuntimeError("a poisoned prompt")
        done = []
        for job in list(self._steps):
            self._steps[job] += 1
            if self._steps[job] >= len(job.prompt_ids):
                del self._steps[job]
                done.append((job, backend.generations(job)))
        return done


@dataclass(eq=False)
class FakeBackend:
    """encode_gate, decode_gate: cleared, they hold the device. The lists are what the device saw."""

    can_generate: bool = True
    can_match: bool = True
    is_question_conditioned: bool = False
    name: str = "fake"
    matching_name: str = "fake"
    matching_encoder: EncoderId = EncoderId.MAIN
    fingerprint: str = "f" * 64
    device: str = "cpu"
    dtype: str = "float32"
    num_query_tokens: int = 1
    max_text_tokens: int = 8
    last_progress: float = 0.0
    memory_rows: int = 10**9  # of images, texts, pairs or beams; a batch of more runs out of memory
    encode_gate: threading.Event = field(default_factory=threading.Event)
    decode_gate: threading.Event = field(default_factory=threading.Event)
    vision_batches: list[list[int]] = field(default_factory=list)
    match_batches: list[int] = field(default_factory=list)
    text_batches: list[int] = field(default_factory=list)
    decode_batches: list[int] = field(default_factory=list)
    num_added: int = 0  # to the decoder
    num_cancelled: int = 0
    num_freed: int = 0
    _vocabulary: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.encode_gate.set()
        self.decode_gate.set()

    def empty_embedding(self, kind: EmbeddingKind, encoder: EncoderId) -> Tensor:
        return torch.empty((2, 3) if kind is EmbeddingKind.IMAGE_FEATURES else (1, 2), device="meta")

    @property
    def max_prefix_tokens(self) -> int:
        return MAX_PROMPT_WORDS + self.num_query_tokens

    def image_size(self, encoder: EncoderId) -> int:
        return 2

    def is_text_cut(self, text: str) -> bool:
        return len(text.split()) > self.max_text_tokens

    def is_question_cut(self, question: str) -> bool:
        return self.is_question_conditioned and self.is_text_cut(question)

    def caption_prompt(self) -> str:
        return "a photo"

    def question_prompt(self, question: str, history: Sequence[tuple[str, str]], template: str | None) -> str:
        turns = " ".join(f"{asked} {answer}" for asked, answer in history)
        return f"{turns} {(template or 'Q {}').replace('{}', question)}".strip()

    def tokenize_prompt(self, prompt: str, _params: GenerationParams) -> tuple[int, ...]:
        words = prompt.split() or [""]
        if len(words) > MAX_PROMPT_WORDS:
            raise InvalidPromptError(f"the prompt has {len(words)} words, the limit is {MAX_PROMPT_WORDS}")
        return tuple(self._vocabulary.setdefault(word, len(self._vocabulary)) for word in words)

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        return [f"t{token_id}" for token_id in token_ids]

    def words_of(self, prompt_ids: Sequence[int]) -> list[str]:
        vocabulary = list(self._vocabulary)
        return [vocabulary[word_id] for word_id in prompt_ids]

    def generations(self, job: DecodeRequest) -> tuple[Generation, ...]:
        words = self.words_of(job.prompt_ids)
        red = round(job.language_model_inputs.mean().item() * 255)
        score = float("nan") if NAN_WORD in words else -1.0
        text = f"{red} {' '.join(words)}"
        return tuple(
            Generation(f"{text} #{rank}", (1, 2), score - rank, 2, "stop", (-0.1, -0.2))
            for rank in range(job.params.num_return_sequences)
        )

    def to_device(self, tensor: Tensor) -> Tensor:
        return tensor

    def synchronize(self) -> None:
        pass

    def free_memory(self) -> None:
        self.num_freed += 1

    def encode_images(self, pixels: Tensor, encoder: EncoderId) -> Tensor:
        self.encode_gate.wait(TIMEOUT_S)
        values = pixels[:, 0, 0, 0] / 255  # [B], the red of each image
        reds = pixels[:, 0, 0, 0].tolist()
        self.vision_batches.append(reds)
        if len(reds) > self.memory_rows:
            raise out_of_memory()
        if POISON_RED in reds:
            raise RuntimeError("a poisoned image")
        return values[:, None, None].expand(-1, 2, 3)  # [B, P, V]

    def encode(self, kind: EmbeddingKind, image_features: Tensor) -> Tensor:
        return image_features[:, :1, :2]  # [B, Q, D]

    def kv_bytes(self, requirements: Sequence[MemoryRequirement]) -> int:
        return len(requirements)  # a byte each

    def build_decoder(self) -> FakeDecoder:
        return FakeDecoder(self)

    def build_decode_request(
        self, encoded: Tensor, prompt_ids: tuple[int, ...], params: GenerationParams, question: str | None
    ) -> DecodeRequest:
        return DecodeRequest(encoded, prompt_ids, params)

    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """A text that is a number is near the images of that red; others lie in the middle."""
        self.text_batches.append(len(texts))
        if len(texts) > self.memory_rows:
            raise out_of_memory()
        return torch.tensor([[_number(text), 0.0] for text in texts])  # [M, E]

    def similarities(self, image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
        distance = (image_embeds[:, 0, :1] - text_embeds[:, 0][None]).abs()
        return 1 - distance  # [N, M]

    def match_logits(self, image_features: Tensor, texts: Sequence[str]) -> Tensor:
        """The higher red and number together, the better the match: not the order of the cosines."""
        self.match_batches.append(len(texts))
        if len(texts) > self.memory_rows:
            raise out_of_memory()
        numbers = torch.tensor([_number(text) for text in texts])
        yes = image_features[:, 0, 0] + numbers
        if bool((image_features[:, 0, 0] * 255).round().eq(POISON_RED + 1).any()):
            raise RuntimeError("a poisoned pair")
        return torch.stack([-yes, yes], dim=1)
