"""The largest steps that the scheduler makes: requests for them, and the images of the warm-up."""

from itertools import cycle, islice
from typing import Final

import torch
from torch import Tensor

from model import GenerationParams
from model.generation import MAX_BEAMS
from service.engine.image_pool import ImageInput
from service.engine.request import GenerateInput, Generations, Matches, MatchInput, Mode, Request
from service.engine.scheduler import MAX_IMAGES_PER_STEP, MAX_PROMPT_TOKENS_PER_STEP, MAX_TEXTS_PER_STEP
from service.model_backend import Backend, EncoderId

_NUM_TOKENS: Final = 3  # of each answer: a prefill, and two decode steps over all rows
_LONG_TEXT: Final = "photo " * 600  # more tokens than a Q-Former reads


def largest_prompts_request(backend: Backend, max_rows: int) -> Request[Generations]:
    """Build as many of the longest prompts as one prefill takes, and short ones until all rows are taken."""
    params = GenerationParams(num_beams=MAX_BEAMS, max_new_tokens=_NUM_TOKENS, min_new_tokens=_NUM_TOKENS)
    short = backend.tokenize_prompt(backend.question_prompt("what is this?", (), None), params)
    num_prefix_tokens = backend.max_prefix_tokens - _NUM_TOKENS
    length = num_prefix_tokens - backend.num_query_tokens
    longest = tuple(islice(cycle(short), max(length, len(short))))
    num_prompts = max(1, max_rows // MAX_BEAMS)
    num_longest = min(num_prompts, max(1, MAX_PROMPT_TOKENS_PER_STEP // num_prefix_tokens))
    prompts = (longest,) * num_longest + (short,) * (num_prompts - num_longest)
    questions = (_LONG_TEXT,) * num_prompts if backend.is_question_conditioned else ()
    image = warmup_images(backend, EncoderId.MAIN)[0]
    return Request(GenerateInput(image, prompts, params, questions))


def largest_pairs_request(backend: Backend) -> Request[Matches]:
    """Build a full batch of the longest texts, which are then scored in full batches of pairs."""
    image = warmup_images(backend, backend.matching_encoder)[0]
    texts = tuple(f"{number} {_LONG_TEXT}" for number in range(MAX_TEXTS_PER_STEP))
    return Request(MatchInput(image, texts, Mode.ITM, rerank_k=1, top_k=1))


def warmup_images(backend: Backend, encoder: EncoderId) -> tuple[ImageInput, ...]:
    """Build a full batch of images, each of another colour."""
    shades = [255 * index // MAX_IMAGES_PER_STEP for index in range(MAX_IMAGES_PER_STEP)]
    side = backend.image_size(encoder)
    return tuple(
        ImageInput(f"warm-up-{encoder}-{index}", _one_colour(shade, 128, 255 - shade, side=side), {}, encoder)
        for index, shade in enumerate(shades)
    )


def _one_colour(*rgb: int, side: int) -> Tensor:
    return torch.tensor(rgb, dtype=torch.uint8).expand(side, side, 3)
