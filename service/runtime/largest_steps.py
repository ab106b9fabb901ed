"""The largest steps that the scheduler makes: requests for them, and the images of the warm-up."""

from dataclasses import dataclass
from itertools import cycle, islice
from typing import Final

import torch
from torch import Tensor

from model import GenerationParams, MemoryRequirement
from model.generation import MAX_BEAMS
from service.engine.image_pool import ImageInput
from service.engine.request import GenerateInput, Generations, Matches, MatchInput, Mode, Request
from service.engine.scheduler import MAX_IMAGES_PER_STEP, MAX_PROMPT_TOKENS_PER_STEP, MAX_TEXTS_PER_STEP
from service.model_backend import Backend, EncoderId

_NUM_TOKENS: Final = 3  # of each answer: a prefill, and two decode steps over all rows
_LONG_TEXT: Final = "photo " * 600  # more tokens than a Q-Former reads


@dataclass(frozen=True, slots=True)
class StepSizes:
    """The largest sizes of a warm-up: images, texts, rows, and tokens of one prompt with its image."""

    images_per_step: int
    texts_per_step: int
    rows_per_step: int
    tokens_per_prompt: int


LARGEST: Final = StepSizes(
    MAX_IMAGES_PER_STEP, MAX_TEXTS_PER_STEP, rows_per_step=2**31, tokens_per_prompt=2**31
)
# For a device that the largest steps would keep for minutes. Each layer of a step counts as progress, and one
# layer of the largest step takes less than four times a whole one of these, which is the default time-out.
REDUCED: Final = StepSizes(1, 4, rows_per_step=MAX_BEAMS, tokens_per_prompt=128)


def largest_prompts_request(
    backend: Backend, sizes: StepSizes, *, max_rows: int, max_kv_bytes: int
) -> Request[Generations]:
    """Build as many of the longest prompts as one prefill takes, and short ones until all rows are taken."""
    params = GenerationParams(num_beams=MAX_BEAMS, max_new_tokens=_NUM_TOKENS, min_new_tokens=_NUM_TOKENS)
    short = backend.tokenize_prompt(backend.question_prompt("what is this?", (), None), params)
    num_prefix_tokens = min(backend.max_prefix_tokens - _NUM_TOKENS, sizes.tokens_per_prompt)
    while backend.kv_bytes(
        [MemoryRequirement(num_prefix_tokens, params.num_rows, _NUM_TOKENS)]
    ) > max_kv_bytes and num_prefix_tokens > backend.num_query_tokens + len(short):
        num_prefix_tokens = num_prefix_tokens * 9 // 10
    length = num_prefix_tokens - backend.num_query_tokens
    longest = tuple(islice(cycle(short), max(length, len(short))))
    num_prompts = max(1, min(max_rows, sizes.rows_per_step) // MAX_BEAMS)
    num_longest = min(num_prompts, max(1, MAX_PROMPT_TOKENS_PER_STEP // num_prefix_tokens))
    prompts = (longest,) * num_longest + (short,) * (num_prompts - num_longest)
    questions = (_LONG_TEXT,) * num_prompts if backend.is_question_conditioned else ()
    (image,) = warmup_images(backend, EncoderId.MAIN, 1)
    return Request(GenerateInput(image, prompts, params, questions))


def largest_pairs_request(backend: Backend, sizes: StepSizes) -> Request[Matches]:
    """Build a full batch of the longest texts, which are then scored in full batches of pairs."""
    (image,) = warmup_images(backend, backend.matching_encoder, 1)
    texts = tuple(f"{number} {_LONG_TEXT}" for number in range(sizes.texts_per_step))
    return Request(MatchInput(image, texts, Mode.ITM, rerank_k=1, top_k=1))


def warmup_images(backend: Backend, encoder: EncoderId, count: int) -> tuple[ImageInput, ...]:
    """Build so many images, each of another colour; one alone has a colour that none of eight has."""
    shades = [255 * index // (count + 1) for index in range(1, count + 1)]
    side = backend.image_size(encoder)
    return tuple(
        ImageInput(f"warm-up-{encoder}-{shade}", _one_colour(shade, 128, 255 - shade, side=side), {}, encoder)
        for shade in shades
    )


def _one_colour(*rgb: int, side: int) -> Tensor:
    return torch.tensor(rgb, dtype=torch.uint8).expand(side, side, 3)
