"""What types of fewer bits do to the answers of the embedded models, on unseen scenes.

    python -m benchmarks.precision [--scenes 100] [--out benchmarks/precision.md]

Every row is asked the same as float32: five questions and a caption of each scene, in the service's ways. The
Q-Former in bfloat16 runs under autocast. int8 needs torchao; without it, its rows are left out.
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
from model.checkpoints import EMBEDDED, LoadOptions
from model.checkpoints.options import Quantization
from training.gates.plan import Plan, prepare_pixels
from training.gates.speaking import PromptedSpeaker
from training.metrics import Answered, caption_figures, vqa_figures
from training.questions import Question
from training.scenes import Scene


@dataclass(frozen=True, slots=True)
class Setting:
    """A row of the table; q_former: the type it computes in."""

    name: str
    frozen: torch.dtype = torch.float32
    q_former: torch.dtype = torch.float32
    quantize: Quantization = "none"


SETTINGS = (
    Setting("float32"),
    Setting("frozen parts bfloat16 (BLIP2_DTYPE=bfloat16)", frozen=torch.bfloat16),
    Setting("all bfloat16, the Q-Former too", frozen=torch.bfloat16, q_former=torch.bfloat16),
    Setting("language model int8 (BLIP2_QUANTIZE=int8)", quantize="int8"),
    Setting("frozen parts bfloat16, language model int8", frozen=torch.bfloat16, quantize="int8"),
)


@dataclass(frozen=True, slots=True)
class Said:
    """inputs: [B, Q, L] of all scenes, what the language model is given."""

    answers: list[str]
    captions: list[str]
    inputs: Tensor


def main() -> None:
    parser = argparse.ArgumentParser(description="Compares types of fewer bits with float32.")
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--out", type=Path, help="write the table here too")
    arguments = parser.parse_args()
    plan = Plan(Path(), num_scenes=arguments.scenes)
    text = "\n".join(_report(plan)) + "\n"
    print(text, end="")
    if arguments.out is not None:
        arguments.out.write_text(text, encoding="utf-8")


def _report(plan: Plan) -> Iterator[str]:
    settings = [each for each in SETTINGS if each.quantize == "none" or find_spec("torchao")]
    yield "# Types of fewer bits beside float32"
    yield ""
    yield (
        f"`python -m benchmarks.precision --scenes {plan.num_scenes}`, torch {torch.__version__}, "
        "CPU, unseen scenes with five questions each. Equal: to the text that float32 gives. Drift: of what "
        "the language model is given, the mean over soft tokens of the relative distance."
    )
    if len(settings) < len(SETTINGS):
        yield "\ntorchao is not installed: the rows with int8 are left out."
    scenes = plan.scenes("unseen")
    asked = plan.questions(scenes)
    for name in EMBEDDED:
        yield f"\n## {name}\n"
        yield "| types | drift | answers equal | right | captions equal | wholly true |"
        yield "|---|---|---|---|---|---|"
        reference: Said | None = None
        for setting in settings:
            said = _ask(name, setting, scenes, asked)
            reference = reference or said
            yield _row(setting, said, reference, scenes, asked)


def _ask(name: str, setting: Setting, scenes: Sequence[Scene], asked: Sequence[Sequence[Question]]) -> Said:
    blip2 = Blip2.from_pretrained(name, LoadOptions(dtype=setting.frozen, quantize=setting.quantize))
    assert blip2.language_model is not None
    speaker = PromptedSpeaker(blip2.language_model, blip2.prompts, partial(_read, blip2, setting))
    answers = speaker.answer(scenes, [[item.question for item in row] for row in asked])
    captions = speaker.caption(scenes)
    with torch.inference_mode():
        inputs = _read(blip2, setting, scenes)
    return Said([one.text for row in answers for one in row], [one.text for one in captions], inputs)


def _read(blip2: Blip2, setting: Setting, scenes: Sequence[Scene]) -> Tensor:
    image_features = blip2.encode_images(prepare_pixels(scenes, blip2.preprocess))
    with _computing_in(setting.q_former):
        return blip2.project_queries(blip2.encode_queries(image_features)).float()


def _computing_in(dtype: torch.dtype) -> AbstractContextManager[object]:
    return nullcontext() if dtype == torch.float32 else torch.autocast("cpu", dtype=dtype)


def _row(
    setting: Setting,
    said: Said,
    reference: Said,
    scenes: Sequence[Scene],
    asked: Sequence[Sequence[Question]],
) -> str:
    questions = [item for row in asked for item in row]
    right = vqa_figures(
        [Answered(item, text, 0) for item, text in zip(questions, said.answers, strict=True)]
    )["overall"]
    true = caption_figures(said.captions, scenes)["wholly_true"]
    drift = ((said.inputs - reference.inputs).norm(dim=-1) / reference.inputs.norm(dim=-1)).mean()
    shares = (
        _share_equal(said.answers, reference.answers),
        right,
        _share_equal(said.captions, reference.captions),
        true,
    )
    return f"| {setting.name} | {drift:.4f} | " + " | ".join(f"{share:.3f}" for share in shares) + " |"


def _share_equal(texts: Sequence[str], others: Sequence[str]) -> float:
    return sum(text == other for text, other in zip(texts, others, strict=True)) / len(texts)


if __name__ == "__main__":
    main()
