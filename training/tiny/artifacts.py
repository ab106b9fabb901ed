"""The results of the phases: checkpoints under `<out>/model/`, in the formats that the service loads."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model.checkpoints import (
    QFormerBranch,
    load_adapter,
    load_language_model,
    load_vision_model,
    save_generation_adapter,
    save_retrieval_adapter,
)
from model.components import Blip2Components
from model.language import LanguageModel
from model.matching import Matcher
from model.preprocess import ImagePreprocessor
from model.prompts import PromptTemplates
from model.vision import VisionEncoder
from training.world.qa_turns import QUESTION_PROMPT

SAVED_DTYPE = torch.bfloat16  # half the bytes; later phases train on the saved weights


@dataclass(frozen=True, slots=True)
class Artifacts:
    """The store of one run's results; in a run of several processes only the main one saves."""

    out: Path
    image_size: int

    def result(self, phase: str) -> Path:
        """Return the directory of a phase's result."""
        return self.out / "model" / phase

    def is_finished(self, phase: str) -> bool:
        """Return whether the result of a phase exists."""
        return (self.result(phase) / "config.json").exists()

    def save_frozen(
        self, phase: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None
    ) -> None:
        """Save a model that is frozen from now on; its directory appears atomically."""
        if not PartialState().is_main_process:
            return
        directory = self.result(phase)
        partial = directory.with_name(f"{directory.name}.partial")
        model.to(SAVED_DTYPE).save_pretrained(partial)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        partial.replace(directory)

    def save_matcher(self, phase: str, matcher: Matcher) -> None:
        """Save a stage-1 model as a retrieval adapter."""
        if not PartialState().is_main_process:
            return
        save_retrieval_adapter(
            self.result(phase),
            matcher,
            ImagePreprocessor(self.image_size),
            vision_directory=self.result("vision_model"),
            dtype=SAVED_DTYPE,
        )

    def save_query_branch(
        self,
        phase: str,
        branch: QFormerBranch,
        *,
        encoder: VisionEncoder,
        language_model: LanguageModel,
        language_phase: str,
    ) -> None:
        """Save a stage-2 model as a generation adapter."""
        if not PartialState().is_main_process:
            return
        blip2_parts = Blip2Components(
            vision_model=encoder,
            preprocess=ImagePreprocessor(self.image_size),
            ln_vision=branch.ln_vision,
            query_tokens=branch.query_tokens,
            qformer=branch.qformer,
            language_projection=branch.language_projection,
            language_model=language_model,
            prompts=PromptTemplates(caption="", question=QUESTION_PROMPT),
        )
        save_generation_adapter(
            self.result(phase),
            blip2_parts,
            vision_directory=self.result("vision_model"),
            language_directory=self.result(language_phase),
            retrieval_directory=self.result("retrieval"),
            dtype=SAVED_DTYPE,
        )

    def load_encoder(self) -> VisionEncoder:
        """Load the frozen image encoder."""
        return load_vision_model(self.result("vision_model"), attn_implementation="eager")

    def load_language_model(self, phase: str) -> LanguageModel:
        """Load a frozen language model; eager attention is faster on a CPU, as in pre-training."""
        language_model = load_language_model(self.result(phase))
        language_model.llm.set_attn_implementation("eager")
        return language_model

    def load_stage1(self) -> Matcher:
        """Load the stage-1 model."""
        matcher = load_adapter(self.result("stage1")).components.matcher
        assert matcher is not None, "a stage-1 adapter holds a matcher"
        return matcher
