"""What the language model answers without the image: the floor that a model which sees must clear."""

from collections.abc import Sequence

import torch
from tqdm import tqdm

from model import Blip2, GenerationParams
from training.scene_text import FILLER, Question

_PARAMS = GenerationParams(num_beams=5, max_new_tokens=10, length_penalty=-1.0)


def answer_blindly(checkpoint: str, asked: Sequence[Sequence[Question]]) -> list[list[str]]:
    """Answers every question with the visual tokens replaced by embeddings of the filler word.

    The same prompt, beams and length penalty as `/vqa`; the answer to a question is the same for every scene.
    """
    blip2 = Blip2.from_pretrained(checkpoint)
    language_model = blip2.language_model
    assert language_model is not None, "a checkpoint without a language model answers no questions"
    filler = language_model.tokenizer.convert_tokens_to_ids(FILLER)
    token_ids = torch.full((1, blip2.qformer.config.num_query_tokens), filler)
    prefix = language_model.embed_tokens(token_ids).detach()  # [1, Q, L]
    distinct = sorted({item.question for questions in asked for item in questions})
    answers: dict[str, str] = {}
    for question in tqdm(distinct, desc="blind", mininterval=5):
        prompt = blip2.prompts.question_prompt(question)
        answers[question] = blip2.generate(prefix, [prompt], _PARAMS)[0][0].text
    return [[answers[item.question] for item in questions] for questions in asked]
