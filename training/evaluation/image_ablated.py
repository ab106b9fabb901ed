"""The image-ablated baseline: the language model's answers without the image."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from model import Blip2, GenerationParams, TaskUnavailableError
from training.world.captions import FILLER
from training.world.questions import Question

_ANSWER_PARAMS = GenerationParams(num_beams=5, max_new_tokens=10, length_penalty=-1.0)
_CAPTION_PARAMS = GenerationParams(num_beams=5, max_new_tokens=30)


@dataclass(frozen=True, slots=True)
class ImageAblatedModel:
    """A checkpoint with its visual tokens replaced by embeddings of the filler word, `prefix` [1, Q, L].

    It generates with the prompts, beams and length penalties of the service; every scene has the same output.
    """

    blip2: Blip2
    prefix: Tensor

    def caption(self) -> str:
        """Generate the one caption."""
        return self._generate(self.blip2.prompts.caption_prompt(), _CAPTION_PARAMS)

    def answer(self, questions: Sequence[Sequence[Question]]) -> list[list[str]]:
        """Generate the answers to the questions about each scene, one for each distinct question."""
        distinct = sorted({item.question for of_scene in questions for item in of_scene})
        answers = {
            question: self._generate(self.blip2.prompts.question_prompt(question), _ANSWER_PARAMS)
            for question in tqdm(distinct, desc="image-ablated", mininterval=5)
        }
        return [[answers[item.question] for item in of_scene] for of_scene in questions]

    def _generate(self, prompt: str, params: GenerationParams) -> str:
        return self.blip2.generate(self.prefix, [prompt], params)[0][0].text


def load_image_ablated(checkpoint: str) -> ImageAblatedModel:
    """Load a checkpoint, of which only the language model is used.

    Raises TaskUnavailableError if it has none.
    """
    blip2 = Blip2.from_pretrained(checkpoint)
    language_model = blip2.language_model
    if language_model is None:
        raise TaskUnavailableError(f"{checkpoint} has no language model to evaluate without an image")
    filler = language_model.tokenizer.convert_tokens_to_ids(FILLER)
    token_ids = torch.full((1, blip2.qformer.config.num_query_tokens), filler)
    return ImageAblatedModel(blip2, language_model.embed_tokens(token_ids).detach())
