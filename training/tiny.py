"""The embedded default model from nothing: unimodal pre-trainings, then the paper's two stages.

    language_model      OPT on texts of the synthetic world      ┐
    language_model_t5   T5 on the same                           │ then frozen
    vision_model        ViT on labelled scenes                   ┘
    stage1              Q-Former on frozen features: ITC, ITM, ITG
    retrieval           stage 1 fine-tuned to retrieve
    stage2              stage 1's Q-Former and a projection into the frozen OPT
    stage2_t5           the same into the frozen T5

Each phase leaves its result under `<out>/model/`, in the formats the service loads; a phase whose result is
there is not run again, and one that was killed goes on from its last checkpoint. Several processes of one run
(torchrun) share `<out>`; the first of them writes there.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from accelerate import PartialState
from transformers import (
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5ForConditionalGeneration,
)

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
from training.config import Optimization, TinyConfig
from training.exchanges import QUESTION_PROMPT
from training.features import ImageFeatures, encode_scenes
from training.language import OptReader, pretrain_language_model
from training.language_t5 import T5Reader, pretrain_encoder_decoder
from training.loop import Run
from training.pixels import SceneImages, draw_scenes
from training.provenance import record_run
from training.scenes import Scene, Split, iter_scenes
from training.stage1 import finetune_retrieval, train_stage1
from training.stage2 import Reader, build_query_branch, hash_weights, train_stage2
from training.vision import LabeledScenes, pretrain_vision_encoder
from training.vocabulary import build_encoder_decoder_tokenizer, build_language_tokenizer

SAVED_DTYPE = torch.bfloat16  # half the bytes; the phases behind train on what was saved

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TinyTraining:
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

    def run(self, phases: Sequence[str] = PHASES) -> None:
        """Runs those of `phases` that are not done yet, in their order."""
        for name in self.PHASES:
            if name not in phases:
                continue
            PartialState().wait_for_everyone()  # the phase before is saved
            if (self.result(name) / "config.json").exists():
                logger.info("%s: done before, in %s", name, self.result(name))
                continue
            logger.info("%s: starting", name)
            getattr(self, f"_train_{name}")()

    @cached_property
    def _scenes(self) -> list[Scene]:
        world = self.config.world
        return list(iter_scenes(world.seed, "train", world.num_train_scenes))

    @cached_property
    def _told_scenes(self) -> list[Scene]:
        """What the language models read of: the scenes with images, and those without."""
        world = self.config.world
        return [*self._scenes, *iter_scenes(world.seed, "told", world.num_told_scenes)]

    @cached_property
    def _images(self) -> SceneImages:
        return self._draw("train", self._scenes)

    def _draw(self, split: Split, scenes: Sequence[Scene]) -> SceneImages:
        world = self.config.world
        name = f"scenes-{split}-{world.seed}-{len(scenes)}-{world.image_size}.npy"
        with PartialState().main_process_first():
            return draw_scenes(scenes, world.image_size, self.out / name)

    @cached_property
    def _encoder(self) -> VisionEncoder:
        return load_vision_model(self.result("vision_model"), attn_implementation="eager").to(self.device)

    @cached_property
    def _features(self) -> ImageFeatures:
        encoder, images = self._encoder, self._images
        path = self.out / f"features-{hash_weights(encoder)[:16]}-{len(images)}.npy"
        with PartialState().main_process_first():
            return encode_scenes(encoder, images, path, self.device)

    def _train_language_model(self) -> None:
        tokenizer = build_language_tokenizer()
        llm = pretrain_language_model(self._run("language_model"), self.config, self._told_scenes, tokenizer)
        _save_frozen(self.result("language_model"), llm, tokenizer)

    def _train_language_model_t5(self) -> None:
        tokenizer = build_encoder_decoder_tokenizer()
        llm = pretrain_encoder_decoder(
            self._run("language_model_t5"), self.config, self._told_scenes, tokenizer
        )
        _save_frozen(self.result("language_model_t5"), llm, tokenizer)

    def _train_vision_model(self) -> None:
        world = self.config.world
        recolored = list(iter_scenes(world.seed, "recolored", world.num_recolored_scenes))
        encoder = pretrain_vision_encoder(
            self._run("vision_model"),
            self.config,
            LabeledScenes(self._scenes, self._images),
            LabeledScenes(recolored, self._draw("recolored", recolored)),
        )
        _save_frozen(self.result("vision_model"), encoder.vit)

    def _train_stage1(self) -> None:
        self._save_matcher(
            "stage1", train_stage1(self._run("stage1"), self.config, self._scenes, self._features)
        )

    def _train_retrieval(self) -> None:
        matcher = finetune_retrieval(
            self._run("retrieval"), self.config, self._scenes, self._features, self.load_stage1()
        )
        self._save_matcher("retrieval", matcher)

    def _save_matcher(self, phase: str, matcher: Matcher) -> None:
        if not PartialState().is_main_process:
            return
        save_retrieval_adapter(
            self.result(phase),
            matcher,
            self._preprocess(),
            vision_directory=self.result("vision_model"),
            dtype=SAVED_DTYPE,
        )

    def _train_stage2(self) -> None:
        self.train_opt_stage2("stage2", self.load_stage1())

    def train_opt_stage2(self, phase: str, matcher: Matcher) -> None:
        """Stage 2 into the frozen OPT from the image branch of any stage-1 model; resumes like any phase."""
        language_model = self._load_language_model("language_model")
        assert isinstance(language_model.llm, OPTForCausalLM)
        reader = OptReader(language_model.llm, language_model.tokenizer)
        branch = self._train_branch(phase, self.config.stage2, matcher, reader)
        self._save_generation(phase, branch, language_model, "language_model")

    def _train_stage2_t5(self) -> None:
        language_model = self._load_language_model("language_model_t5")
        assert isinstance(language_model.llm, T5ForConditionalGeneration)
        reader = T5Reader(language_model.llm, language_model.tokenizer)
        branch = self._train_branch("stage2_t5", self.config.stage2_t5, self.load_stage1(), reader)
        self._save_generation("stage2_t5", branch, language_model, "language_model_t5")

    def _train_branch(
        self, phase: str, optimization: Optimization, matcher: Matcher, reader: Reader
    ) -> QFormerBranch:
        torch.manual_seed(self.config.seed)  # the projection is new
        branch = build_query_branch(matcher, reader.llm.config.hidden_size)
        return train_stage2(
            self._run(phase),
            optimization,
            self._scenes,
            self._features,
            branch,
            reader,
            self.config.num_questions,
        )

    def _save_generation(
        self, phase: str, branch: QFormerBranch, language_model: LanguageModel, language_phase: str
    ) -> None:
        if not PartialState().is_main_process:
            return
        parts = Blip2Components(
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
            self.result(phase),
            parts,
            vision_directory=self.result("vision_model"),
            language_directory=self.result(language_phase),
            retrieval_directory=self.result("retrieval"),
            dtype=SAVED_DTYPE,
        )

    def _load_language_model(self, phase: str) -> LanguageModel:
        language_model = load_language_model(self.result(phase))
        language_model.llm.set_attn_implementation("eager")  # for speed on a CPU, as in pre-training
        return language_model

    def load_stage1(self) -> Matcher:
        """The finished stage-1 model."""
        matcher = load_adapter(self.result("stage1")).components.matcher
        assert matcher is not None, "a stage-1 adapter holds a matcher"
        return matcher

    def _preprocess(self) -> ImagePreprocessor:
        return ImagePreprocessor(self.config.world.image_size)

    def result(self, phase: str) -> Path:
        """The directory of a phase's finished weights."""
        return self.out / "model" / phase

    def _run(self, phase: str) -> Run:
        with PartialState().main_process_first():
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
    if not PartialState().is_main_process:
        return
    partial = directory.with_name(f"{directory.name}.partial")
    model.to(SAVED_DTYPE).save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    partial.replace(directory)
