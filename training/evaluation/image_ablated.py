"""What the language model says without the image: the floor that a model which sees must clear."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from model import Blip2, GenerationParams, TaskUnavailableError
from training.world.captions import FILLER
from training.world.questions import Question

_ANSWER = GenerationParams(num_beams=5, max_new_tokens=10, length_penalty=-1.0)
_CAPTION = GenerationParams(num_beams=5, max_new_tokens=30)


@dataclass(frozen=True, slots=True)
class BlindSpeaker:
    """A checkpoint whose visual tokens are replaced by embeddings of the filler word, `prefix` [1, Q, L].

    It answers with the prompts, beams and length penalties of the service; what it says is the same for
    every scene.
    """

    blip2: Blip2
    prefix: Tensor

    def caption(self) -> str:
        """The one caption."""
        return self._say(self.blip2.prompts.caption_prompt(), _CAPTION)

    def answer(self, asked: Sequence[Sequence[Question]]) -> list[list[str]]:
        """The answers to the questions about each scene."""
        distinct = sorted({item.question for questions in asked for item in questions})
        answers = {
            question: self._say(self.blip2.prompts.question_prompt(question), _ANSWER)
            for question in tqdm(distinct, desc="blind", mininterval=5)
        }
        return [[answers[item.question] for item in questions] for questions in asked]

    def _say(self, prompt: str, params: GenerationParams) -> str:
        return self.blip2.generate(self.prefix, [prompt], params)[0][0].text


def load_blind_speaker(checkpoint: str) -> BlindSpeaker:
    """Loads a checkpoint, of which only the language model is used.

    Raises TaskUnavailableError where it has none.
    """
    blip2 = Blip2.from_pretrained(checkpoint)
    language_model = blip2.language_model
    if language_model is None:
        raise TaskUnavailableError(f"{checkpoint} has no language model that could be asked without an image")
    filler = language_model.tokenizer.convert_tokens_to_ids(FILLER)
    token_ids = torch.full((1, blip2.qformer.config.num_query_tokens), filler)
    return BlindSpeaker(blip2, language_model.embed_tokens(token_ids).detach())
