"""The configuration of the embedded default model's recipe; `configs/tiny.yaml` holds the shipped values."""

from dataclasses import dataclass
from pathlib import Path

from training.config import (
    CONFIG_DIR,
    STRICT,
    ConfigError,
    Optimization,
    QFormerShape,
    Stage1Config,
    load_config,
)
from training.tiny.attention_supervision import MIN_LAYERS_AND_HEADS
from training.world.questions import MAX_QUESTIONS

DEFAULT_CONFIG = CONFIG_DIR / "tiny.yaml"
AUTOCAST_TYPES = ("bfloat16", "float32")


@dataclass(frozen=True, slots=True)
class WorldConfig:
    """Numbers of training scenes, and the side of their images in pixels.

    num_recolored_scenes: scenes in unnamed colours, for the image encoder only. num_told_scenes: text-only
    scenes with additional colours and shapes, for the language models only.
    """

    __pydantic_config__ = STRICT

    seed: int
    num_train_scenes: int
    num_recolored_scenes: int
    num_told_scenes: int
    image_size: int


@dataclass(frozen=True, slots=True)
class VisionShape:
    """The image encoder: a ViT with the block of EVA-CLIP as `transformers` builds it for BLIP-2."""

    __pydantic_config__ = STRICT

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int


@dataclass(frozen=True, slots=True)
class LanguageShape:
    """The decoder-only language model: OPT."""

    __pydantic_config__ = STRICT

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class EncoderDecoderShape:
    """The encoder-decoder language model: T5."""

    __pydantic_config__ = STRICT

    hidden_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_attention_heads: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """All settings of `python -m training tiny`; raises ConfigError where they do not fit together."""

    __pydantic_config__ = STRICT

    seed: int
    autocast: str
    save_every: int
    num_questions: int
    world: WorldConfig
    vision_model: VisionShape
    language_model: LanguageShape
    language_model_t5: EncoderDecoderShape
    qformer: QFormerShape
    vision_pretraining: Optimization
    language_pretraining: Optimization
    language_pretraining_t5: Optimization
    stage1: Stage1Config
    retrieval: Stage1Config
    stage2: Optimization
    stage2_t5: Optimization

    def __post_init__(self) -> None:
        if self.autocast not in AUTOCAST_TYPES:
            raise ConfigError(f"autocast is {self.autocast!r}; choose one of {', '.join(AUTOCAST_TYPES)}")
        if self.save_every < 1:
            raise ConfigError(f"save_every is {self.save_every}; it must be at least 1")
        if not 1 <= self.num_questions <= MAX_QUESTIONS:
            raise ConfigError(f"num_questions is {self.num_questions}; choose 1 to {MAX_QUESTIONS}")
        self._check_language_models()
        self._check_batch_sizes()

    def _check_language_models(self) -> None:
        opt, t5 = self.language_model, self.language_model_t5
        for num_layers, num_heads in (
            (opt.num_hidden_layers, opt.num_attention_heads),
            (t5.num_encoder_layers, t5.num_attention_heads),
        ):
            if min(num_layers, num_heads) < MIN_LAYERS_AND_HEADS:
                raise ConfigError(
                    f"a language model has {num_layers} layers of {num_heads} heads; "
                    f"attention supervision needs {MIN_LAYERS_AND_HEADS} of both"
                )

    def _check_batch_sizes(self) -> None:
        for phase in (self.stage1.optimization, self.retrieval.optimization, self.stage2, self.stage2_t5):
            if not 2 <= phase.batch_size <= self.world.num_train_scenes:
                raise ConfigError(
                    f"a batch_size is {phase.batch_size}; choose 2 to num_train_scenes "
                    f"({self.world.num_train_scenes}): a batch samples distinct scenes and needs a negative"
                )


def load_tiny_config(path: Path = DEFAULT_CONFIG) -> TinyConfig:
    """Load a `TinyConfig`. Raises ConfigError naming the file and the wrong key."""
    return load_config(path, TinyConfig)
