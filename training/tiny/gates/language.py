"""The gate of a language model: what it says behind dense descriptions, the best that soft prompts can be."""

import json
from collections.abc import Sequence

from torch import Tensor

from model.checkpoints import load_language_model
from model.prompts import PromptTemplates
from training.config import ConfigError
from training.tiny.gates.findings import Bar, Measured
from training.tiny.gates.plan import Plan
from training.tiny.gates.speaking import PromptedSpeaker, Spoken, measure_speaker
from training.tiny.language import embed_descriptions
from training.world.qa_turns import QUESTION_PROMPT
from training.world.scenes import Scene

_QUESTION_BAR = 0.95
_CAPTION_BAR = 0.9


def measure_language_model(phase: str, plan: Plan) -> Measured:
    """Measures the language model of a run, of either family."""
    language_model = load_language_model(plan.result(phase)).to(plan.device)
    length = plan.num_query_tokens or _configured_length(phase, plan)

    def prefix(scenes: Sequence[Scene]) -> Tensor:
        return embed_descriptions(language_model.llm, language_model.tokenizer, scenes, length)

    prompts = PromptTemplates(caption="", question=QUESTION_PROMPT)
    return judge_reader(measure_speaker(PromptedSpeaker(language_model, prompts, prefix), plan))


def judge_reader(spoken: Spoken) -> Measured:
    """Holds what was said of descriptions against the bars."""
    bars = (
        Bar("unseen: questions, macro", spoken.figures["questions, unseen"]["macro"], _QUESTION_BAR),
        Bar("unseen: captions wholly true", spoken.figures["captions, unseen"]["wholly_true"], _CAPTION_BAR),
    )
    return Measured(spoken.figures, bars, samples=spoken.samples, mistakes=spoken.mistakes)


def _configured_length(phase: str, plan: Plan) -> int:
    """The number of query tokens that the run was begun with."""
    path = plan.out / phase / "run.json"
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["config"]["qformer"]["num_query_tokens"])
    except (OSError, KeyError, ValueError) as exc:
        raise ConfigError(f"{path} does not say how long a description is ({exc!r}); give --queries") from exc
