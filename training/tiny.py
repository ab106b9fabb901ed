"""The embedded default model from nothing: two unimodal pre-trainings, then the paper's two stages.

    language_model   OPT on texts of the synthetic world      ┐ then frozen
    vision_model     ViT on labelled scenes                   ┘
    stage1           Q-Former on frozen features: ITC, ITM, ITG
    retrieval        stage 1 fine-tuned to retrieve: ITC, ITM
    stage2           stage 1's Q-Former and projection into the frozen language model

Each phase leaves its result under `<out>/model/`, in the formats the service loads; a phase whose result is
there is not run again, and one that was killed goes on from its last checkpoint.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from model.checkpoints import (
    load_adapter,
    load_language_model,
    load_vision_model,
    save_generation_adapter,
    save_retrieval_adapter,
)
from model.matching import Matcher
from model.parts import Blip2Parts
from model.preprocess import ImagePreprocessor
from model.prompts import PromptTemplates
from model.vision import VisionEncoder
from training.config import TinyConfig
from training.features import ImageFeatures, encode_scenes
from training.finetune import finetune_retrieval
from training.language import QUESTION_PROMPT, pretrain_language_model
from training.loop import Run
from training.pixels import SceneImages, draw_scenes
from training.provenance import record_run
from training.scenes import Scene, iter_scenes
from training.stage1 import train_stage1
from training.stage2 import hash_weights, train_stage2
from training.vision import pretrain_vision_encoder
from training.vocabulary import build_language_tokenizer

SAVED_DTYPE = torch.bfloat16  # half the bytes; the phases behind train on what was saved

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TinyTraining:
    """All phases of one run; `out` holds checkpoints, curves and, under `model/`, the results."""

    config: TinyConfig
    out: Path
    device: torch.device

    PHASES: ClassVar = ("language_model", "vision_model", "stage1", "retrieval", "stage2")

    def run(self, phases: Sequence[str] = PHASES) -> None:
        """Runs those of `phases` that are not done yet, in their order."""
        for name in self.PHASES:
            if name not in phases:
                continue
            if (self._result(name) / "config.json").exists():
                logger.info("%s: done before, in %s", name, self._result(name))
                continue
            logger.info("%s: starting", name)
            getattr(self, f"_train_{name}")()

    @cached_property
    def _scenes(self) -> list[Scene]:
        world = self.config.world
        return list(iter_scenes(world.seed, "train", world.num_train_scenes))

    @cached_property
    def _images(self) -> SceneImages:
        world = self.config.world
        name = f"scenes-{world.seed}-{world.num_train_scenes}-{world.image_size}.npy"
        return draw_scenes(self._scenes, world.image_size, self.out / name)

    @cached_property
    def _encoder(self) -> VisionEncoder:
        return load_vision_model(self._result("vision_model"), attn_implementation="eager").to(self.device)

    @cached_property
    def _features(self) -> ImageFeatures:
        path = self.out / f"features-{hash_weights(self._encoder)[:16]}-{len(self._images)}.npy"
        return encode_scenes(self._encoder, self._images, path, self.device)

    def _train_language_model(self) -> None:
        tokenizer = build_language_tokenizer()
        llm = pretrain_language_model(self._run("language_model"), self.config, self._scenes, tokenizer)
        _save_frozen(self._result("language_model"), llm, tokenizer)

    def _train_vision_model(self) -> None:
        encoder = pretrain_vision_encoder(self._run("vision_model"), self.config, self._scenes, self._images)
        _save_frozen(self._result("vision_model"), encoder.tower)

    def _train_stage1(self) -> None:
        self._save_matcher(
            "stage1", train_stage1(self._run("stage1"), self.config, self._scenes, self._features)
        )

    def _train_retrieval(self) -> None:
        matcher = finetune_retrieval(
            self._run("retrieval"), self.config.retrieval, self._scenes, self._features, self._load_stage1()
        )
        self._save_matcher("retrieval", matcher)

    def _save_matcher(self, phase: str, matcher: Matcher) -> None:
        save_retrieval_adapter(
            self._result(phase),
            matcher,
            self._preprocess(),
            vision_directory=self._result("vision_model"),
            dtype=SAVED_DTYPE,
        )

    def _train_stage2(self) -> None:
        matcher = self._load_stage1()
        language_model = load_language_model(self._result("language_model"))
        language_model.llm.set_attn_implementation("eager")  # for speed on a CPU, as in pre-training
        branch = train_stage2(
            self._run("stage2"), self.config, self._scenes, self._features, matcher, language_model
        )
        parts = Blip2Parts(
            vision_model=self._encoder,
            preprocess=self._preprocess(),
            ln_vision=branch.ln_vision,
            query_tokens=branch.query_tokens,
            qformer=branch.qformer,
            language_projection=branch.language_projection,
            language_model=language_model,
            prompts=PromptTemplates(caption="", question=QUESTION_PROMPT),
        )
        save_generation_adapter(
            self._result("stage2"),
            parts,
            vision_directory=self._result("vision_model"),
            language_directory=self._result("language_model"),
            retrieval_directory=self._result("retrieval"),
            dtype=SAVED_DTYPE,
        )

    def _load_stage1(self) -> Matcher:
        matcher = load_adapter(self._result("stage1"), dtype=torch.float32).parts.matcher
        assert matcher is not None, "a stage-1 adapter holds a matcher"
        return matcher

    def _preprocess(self) -> ImagePreprocessor:
        return ImagePreprocessor(self.config.world.image_size)

    def _result(self, phase: str) -> Path:
        return self.out / "model" / phase

    def _run(self, phase: str) -> Run:
        record_run(self.out / phase, self.config)
        autocast_dtype = torch.bfloat16 if self.config.autocast == "bfloat16" else None
        return Run(
            name=phase,
            directory=self.out / phase,
            seed=self.config.seed,
            device=self.device,
            autocast_dtype=autocast_dtype,
            save_every=self.config.save_every,
        )


def _save_frozen(
    directory: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast | None = None
) -> None:
    """Saves a part that is frozen from here on; the directory appears when it is whole."""
    partial = directory.with_name(f"{directory.name}.partial")
    model.to(SAVED_DTYPE).save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    partial.replace(directory)
