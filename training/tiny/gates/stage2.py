"""The gate of stage 2: what the whole model says of an image, in captions and answers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model import Blip2
from model.checkpoints import LoadOptions
from training.tiny.gates.findings import Bar, Measured
from training.tiny.gates.plan import Plan, prepare_pixels
from training.tiny.gates.speaking import PromptedSpeaker, Spoken, measure_speaker
from training.world.questions import FAMILIES
from training.world.scenes import Scene

_QUESTION_BAR = 0.90
_FAMILY_BAR = 0.80
_PAIRS_BAR = 0.95
_CAPTION_BAR = 0.90
_QUESTION_GAP = 0.10  # held-out may be this much below unseen
_CAPTION_GAP = 0.20


def measure_stage2(phase: str, plan: Plan) -> Measured:
    """Measures the model of a run, with either language model."""
    blip2 = Blip2.from_pretrained(str(plan.result(phase)), LoadOptions(device=torch.device(plan.device)))
    assert blip2.language_model is not None, "a stage-2 adapter names a language model"

    def prefix(scenes: Sequence[Scene]) -> Tensor:
        image_features = blip2.encode_images(prepare_pixels(scenes, blip2.preprocess))
        return blip2.project_queries(blip2.encode_queries(image_features))  # [B, Q, L]

    return judge_viewer(measure_speaker(PromptedSpeaker(blip2.language_model, blip2.prompts, prefix), plan))


def judge_viewer(spoken: Spoken) -> Measured:
    """Holds what was said of images against the bars."""
    questions, captions = spoken.figures["questions, unseen"], spoken.figures["captions, unseen"]
    held_questions = spoken.figures["questions, held-out"]["overall"]
    held_captions = spoken.figures["captions, held-out"]["wholly_true"]
    bars = (
        Bar("unseen: questions", questions["overall"], _QUESTION_BAR),
        *(
            Bar(f"unseen: questions, {family}", questions[family], _FAMILY_BAR)
            for family in FAMILIES
            if family in questions
        ),
        Bar("unseen: named pairs true", captions["named_pairs_true"], _PAIRS_BAR),
        Bar("unseen: captions wholly true", captions["wholly_true"], _CAPTION_BAR),
        Bar("held-out: questions", held_questions, max(0.0, questions["overall"] - _QUESTION_GAP)),
        Bar(
            "held-out: captions wholly true", held_captions, max(0.0, captions["wholly_true"] - _CAPTION_GAP)
        ),
    )
    return Measured(spoken.figures, bars, samples=spoken.samples, mistakes=spoken.mistakes)
