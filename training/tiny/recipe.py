"""The recipe of the embedded default model: unimodal pre-trainings, then the two stages of the paper.

    language_model      OPT on texts of the synthetic world      ┐
    language_model_t5   T5 on the same                           │ frozen afterwards
    vision_model        ViT on labelled scenes                   ┘
    stage1              Q-Former on frozen features: ITC, ITM, ITG
    retrieval           stage 1 fine-tuned for retrieval
    stage2              stage 1's Q-Former and a projection into the frozen OPT
    stage2_t5           the same into the frozen T5

Each phase saves its result under `<out>/model/`. A finished phase is skipped, an interrupted one resumes from
its last checkpoint. The processes of one run (torchrun) share `<out>`; the main process writes there.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import PartialState

from model.checkpoints import QFormerBranch
from model.matching import Matcher
from model.vision import VisionEncoder
from training.config import Optimization, Stage1Config
from training.data.features import ImageFeatures
from training.loop import Run
from training.provenance import record_run
from training.stages.stage1 import build_matcher, train_matcher
from training.stages.stage2 import LanguageObjective, build_objective, build_query_branch, train_stage2
from training.tiny.artifacts import Artifacts
from training.tiny.config import TinyConfig
from training.tiny.datasets import Datasets
from training.tiny.language import pretrain_language_model
from training.tiny.language_t5 import pretrain_encoder_decoder
from training.tiny.vision import pretrain_vision_encoder
from training.world.captions import sample_text
from training.world.pairs import ScenePairSampler, TextSampler, sample_retrieval_text
from training.world.qa_turns import SceneQaSampler
from training.world.vocabulary import (
    build_encoder_decoder_tokenizer,
    build_language_tokenizer,
    build_text_tokenizer,
)

logger = logging.getLogger(__name__)


def build_tiny_matcher(config: TinyConfig) -> Matcher:
    """Build the untrained stage-1 model of a configuration."""
    return build_matcher(
        config.qformer,
        encoder_hidden_size=config.vision_model.hidden_size,
        tokenizer=build_text_tokenizer(),
    )


@dataclass(frozen=True)
class TinyRecipe:
    """All phases of one run; `out` holds checkpoints, curves and, under `model/`, the results."""

    config: TinyConfig
    out: Path
    device: torch.device

    PHASES: ClassVar = (
        "language_model",
        "language_model_t5",
        "vision_model",
        "stage1",
        "retrieval",
        "stage2",
        "stage2_t5",
    )

    @property
    def artifacts(self) -> Artifacts:
        """The results of the phases."""
        return Artifacts(self.out, self.config.world.image_size)

    def run(self, phases: Sequence[str] = PHASES) -> None:
        """Run the unfinished ones of `phases`, in the order of `PHASES`."""
        for name in self.PHASES:
            if name not in phases:
                continue
            PartialState().wait_for_everyone()  # the main process has saved the former phase
            if self.artifacts.is_finished(name):
                logger.info("%s: finished before, in %s", name, self.artifacts.result(name))
                continue
            logger.info("%s: starting", name)
            getattr(self, f"_train_{name}")()

    def train_opt_stage2(self, phase: str, matcher: Matcher) -> None:
        """Train stage 2 into the frozen OPT from a stage-1 model's image branch; resumes like any phase."""
        language_model = self.artifacts.load_language_model("language_model")
        branch = self._train_branch(phase, self.config.stage2, matcher, build_objective(language_model))
        self.artifacts.save_query_branch(
            phase,
            branch,
            encoder=self._encoder,
            language_model=language_model,
            language_phase="language_model",
        )

    @cached_property
    def _datasets(self) -> Datasets:
        return Datasets(self.config.world, self.out)

    @cached_property
    def _encoder(self) -> VisionEncoder:
        return self.artifacts.load_encoder().to(self.device)

    @cached_property
    def _features(self) -> ImageFeatures:
        return self._datasets.features(self._encoder, self.device)

    def _train_language_model(self) -> None:
        tokenizer, scenes = build_language_tokenizer(), self._datasets.language_scenes
        llm = pretrain_language_model(self._run("language_model"), self.config, scenes, tokenizer)
        self.artifacts.save_frozen("language_model", llm, tokenizer)

    def _train_language_model_t5(self) -> None:
        tokenizer, scenes = build_encoder_decoder_tokenizer(), self._datasets.language_scenes
        llm = pretrain_encoder_decoder(self._run("language_model_t5"), self.config, scenes, tokenizer)
        self.artifacts.save_frozen("language_model_t5", llm, tokenizer)

    def _train_vision_model(self) -> None:
        named, recolored = self._datasets.labeled_scenes(), self._datasets.recolored_scenes()
        encoder = pretrain_vision_encoder(self._run("vision_model"), self.config, named, recolored)
        self.artifacts.save_frozen("vision_model", encoder.vit)

    def _train_stage1(self) -> None:
        torch.manual_seed(self.config.seed)
        matcher = build_tiny_matcher(self.config)
        self._train_matcher("stage1", matcher, self.config.stage1, sample_text)

    def _train_retrieval(self) -> None:
        """Fine-tune stage 1 in larger batches, half of the texts full listings.

        The paper (section 4.4) also trains the image encoder; here it stays frozen, so that both stages share
        one encoder.
        """
        matcher = self.artifacts.load_stage1()
        self._train_matcher("retrieval", matcher, self.config.retrieval, sample_retrieval_text)

    def _train_matcher(
        self, phase: str, matcher: Matcher, config: Stage1Config, sample_text: TextSampler
    ) -> None:
        batch_size = config.optimization.batch_size
        sampler = ScenePairSampler(
            self._datasets.scenes, self._features, batch_size, sample_text, matcher.tokenize
        )
        self.artifacts.save_matcher(phase, train_matcher(self._run(phase), matcher, sampler, config))

    def _train_stage2(self) -> None:
        self.train_opt_stage2("stage2", self.artifacts.load_stage1())

    def _train_stage2_t5(self) -> None:
        language_model = self.artifacts.load_language_model("language_model_t5")
        matcher, objective = self.artifacts.load_stage1(), build_objective(language_model)
        branch = self._train_branch("stage2_t5", self.config.stage2_t5, matcher, objective)
        self.artifacts.save_query_branch(
            "stage2_t5",
            branch,
            encoder=self._encoder,
            language_model=language_model,
            language_phase="language_model_t5",
        )

    def _train_branch(
        self, phase: str, optimization: Optimization, matcher: Matcher, objective: LanguageObjective
    ) -> QFormerBranch:
        torch.manual_seed(self.config.seed)  # initialises the projection
        branch = build_query_branch(matcher, objective.llm.config.hidden_size)
        sampler = SceneQaSampler(
            self._datasets.scenes, self._features, optimization.batch_size, self.config.num_questions
        )
        return train_stage2(self._run(phase), optimization, sampler, branch, objective)

    def _run(self, phase: str) -> Run:
        with PartialState().main_process_first():
            record_run(self.out / phase, self.config)
        return Run(
            name=phase,
            directory=self.out / phase,
            seed=self.config.seed,
            device=self.device,
            autocast_dtype=torch.bfloat16 if self.config.autocast == "bfloat16" else None,
            save_every=self.config.save_every,
        )
