"""The gate of stage 2: captions and answers of the whole model."""

from collections.abc import Sequence

import torch
from torch import Tensor

from model import Blip2
from model.checkpoints import LoadOptions
from training.tiny.gates.generation import GenerationResult, PromptedGenerator, measure_generation
from training.tiny.gates.plan import GatePlan, prepare_pixels
from training.tiny.gates.results import Bar, Measurement
from training.world.questions import QUESTION_TYPES
from training.world.scenes import Scene

_QUESTION_BAR = 0.90
_QUESTION_TYPE_BAR = 0.80
_PAIRS_BAR = 0.95
_CAPTION_BAR = 0.90
_QUESTION_GAP = 0.10  # allowed difference of held-out from unseen
_CAPTION_GAP = 0.20


def measure_stage2(phase: str, plan: GatePlan) -> Measurement:
    """Measure the model of a run, with either language model."""
    blip2 = Blip2.from_pretrained(str(plan.result(phase)), LoadOptions(device=torch.device(plan.device)))
    assert blip2.language_model is not None, "a stage-2 adapter names a language model"

    def prefix(scenes: Sequence[Scene]) -> Tensor:
        image_features = blip2.encode_images(prepare_pixels(scenes, blip2.preprocess))
        return blip2.project_queries(blip2.encode_queries(image_features))  # [B, Q, L]

    generator = PromptedGenerator(blip2.language_model, blip2.prompts, prefix)
    return judge_stage2(measure_generation(generator, plan))


def judge_stage2(generated: GenerationResult) -> Measurement:
    """Compare texts generated from images with the bars."""
    questions, captions = generated.figures["questions, unseen"], generated.figures["captions, unseen"]
    held_out_questions = generated.figures["questions, held-out"]["overall"]
    held_out_captions = generated.figures["captions, held-out"]["wholly_true"]
    question_minimum = max(0.0, questions["overall"] - _QUESTION_GAP)
    caption_minimum = max(0.0, captions["wholly_true"] - _CAPTION_GAP)
    bars = (
        Bar("unseen: questions", questions["overall"], _QUESTION_BAR),
        *(
            Bar(f"unseen: questions, {name}", questions[name], _QUESTION_TYPE_BAR)
            for name in QUESTION_TYPES
            if name in questions
        ),
        Bar("unseen: named pairs true", captions["named_pairs_true"], _PAIRS_BAR),
        Bar("unseen: captions wholly true", captions["wholly_true"], _CAPTION_BAR),
        Bar("held-out: questions", held_out_questions, question_minimum),
        Bar("held-out: captions wholly true", held_out_captions, caption_minimum),
    )
    return Measurement(generated.figures, bars, samples=generated.samples, mistakes=generated.mistakes)
