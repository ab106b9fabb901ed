"""Compare reduced precision with float32 on unseen scenes, for the embedded models.

    python -m benchmarks.precision [--scenes 100] [--out benchmarks/precision.md]

Every precision generates the same five answers and one caption per scene, with the service's prompts. The
Q-Former in bfloat16 runs under autocast. int8 requires torchao; its rows are skipped without it.
"""

import argparse
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from model import Blip2
from model.checkpoints import EMBEDDED, LoadOptions, Quantization
from training.evaluation.metrics import AnsweredQuestion, caption_figures, vqa_figures
from training.tiny.gates.generation import PromptedGenerator
from training.tiny.gates.plan import GatePlan, prepare_pixels
from training.world.questions import Question
from training.world.scenes import Scene


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table; frozen: dtype of the frozen parts, qformer: dtype of the Q-Former."""

    name: str
    frozen: torch.dtype = torch.float32
    qformer: torch.dtype = torch.float32
    quantize: Quantization = "none"


SETTINGS = (
    Setting("float32"),
    Setting("frozen parts bfloat16 (BLIP2_DTYPE=bfloat16)", frozen=torch.bfloat16),
    Setting("all bfloat16, the Q-Former too", frozen=torch.bfloat16, qformer=torch.bfloat16),
    Setting("language model int8 (BLIP2_QUANTIZE=int8)", quantize="int8"),
    Setting("frozen parts bfloat16, language model int8", frozen=torch.bfloat16, quantize="int8"),
)


@dataclass(frozen=True, slots=True)
class Outputs:
    """Generated texts of all scenes; inputs: [B, Q, L] language-model inputs."""

    answers: list[str]
    captions: list[str]
    inputs: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare reduced precision with float32.")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--out", type=Path, help="also write the table to this file")
    arguments = parser.parse_args()
    plan = GatePlan(Path(), num_scenes=arguments.scenes)
    text = "\n".join(_report(plan)) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


def _report(plan: GatePlan) -> Iterator[str]:
    settings = [each for each in SETTINGS if each.quantize == "none" or find_spec("torchao")]
    yield "# Reduced precision compared with float32"
    yield ""
    yield (
        f"`python -m benchmarks.precision --scenes {plan.num_scenes}`, torch {torch.__version__}, "
        "CPU, unseen scenes with five questions each. Equal: to the text with float32. Drift: relative "
        "distance of the language-model inputs, mean over tokens."
    )
    if len(settings) < len(SETTINGS):
        yield "\ntorchao is not installed: the rows with int8 are skipped."
    scenes = plan.scenes("unseen")
    questions = plan.questions(scenes)
    for name in EMBEDDED:
        yield f"\n## {name}\n"
        yield "| precision | drift | answers equal | correct | captions equal | wholly true |"
        yield "|---|---|---|---|---|---|"
        reference: Outputs | None = None
        for setting in settings:
            outputs = _generate(name, setting, scenes, questions)
            reference = reference or outputs
            yield _row(setting, outputs, reference, scenes, questions)


def _generate(
    name: str, setting: Setting, scenes: Sequence[Scene], questions: Sequence[Sequence[Question]]
) -> Outputs:
    blip2 = Blip2.from_pretrained(name, LoadOptions(dtype=setting.frozen, quantize=setting.quantize))
    assert blip2.language_model is not None
    generator = PromptedGenerator(blip2.language_model, blip2.prompts, partial(_project, blip2, setting))
    answers = generator.answer(scenes, [[item.question for item in row] for row in questions])
    captions = generator.caption(scenes)
    with torch.inference_mode():
        inputs = _project(blip2, setting, scenes)
    return Outputs([one.text for row in answers for one in row], [one.text for one in captions], inputs)


def _project(blip2: Blip2, setting: Setting, scenes: Sequence[Scene]) -> Tensor:
    image_features = blip2.encode_images(prepare_pixels(scenes, blip2.preprocess))
    with _autocast(setting.qformer):
        return blip2.project_queries(blip2.encode_queries(image_features)).float()


def _autocast(dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)


def _row(
    setting: Setting,
    outputs: Outputs,
    reference: Outputs,
    scenes: Sequence[Scene],
    questions: Sequence[Sequence[Question]],
) -> str:
    flat = [question for row in questions for question in row]
    answered = [
        AnsweredQuestion(question, text, 0) for question, text in zip(flat, outputs.answers, strict=True)
    ]
    correct = vqa_figures(answered)["overall"]
    true = caption_figures(outputs.captions, scenes)["wholly_true"]
    drift = ((outputs.inputs - reference.inputs).norm(dim=-1) / reference.inputs.norm(dim=-1)).mean()
    shares = (
        _share_equal(outputs.answers, reference.answers),
        correct,
        _share_equal(outputs.captions, reference.captions),
        true,
    )
    return f"| {setting.name} | {drift:.4f} | " + " | ".join(f"{share:.3f}" for share in shares) + " |"


def _share_equal(texts: Sequence[str], others: Sequence[str]) -> float:
    return sum(text == other for text, other in zip(texts, others, strict=True)) / len(texts)


if __name__ == "__main__":
    main()
