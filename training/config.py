"""Run configurations: YAML files read into frozen dataclasses; an unknown or missing key is an error."""

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import yaml

CONFIG_DIR = Path(__file__).parent / "configs"
AUTOCAST_TYPES = ("bfloat16", "float32")
MAX_TRAINING_QUESTIONS = 20
MIN_READING_SIZE = 3  # layers, and heads of each, that `training.reading` supervises


class ConfigError(Exception):
    """A configuration file that cannot be used; the message names the file and the key."""


@dataclass(frozen=True, slots=True)
class Optimization:
    """AdamW with linear warm-up and cosine decay, both counted in steps."""

    steps: int
    batch_size: int
    learning_rate: float
    min_learning_rate: float
    warmup_steps: int
    weight_decay: float
    beta2: float
    max_grad_norm: float


@dataclass(frozen=True, slots=True)
class World:
    """How many scenes are drawn for training, and how large.

    `num_recolored_scenes`: scenes in colours without a name, for the image encoder only. `num_told_scenes`:
    scenes of more colours and shapes than are drawn, for the language models only.
    """

    seed: int
    num_train_scenes: int
    num_recolored_scenes: int
    num_told_scenes: int
    image_size: int


@dataclass(frozen=True, slots=True)
class VisionShape:
    """The image encoder: a ViT with the block of EVA-CLIP as `transformers` builds it for BLIP-2."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    patch_size: int


@dataclass(frozen=True, slots=True)
class LanguageShape:
    """The language model: OPT."""

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class EncoderDecoderShape:
    """The sibling's language model: T5."""

    hidden_size: int
    num_encoder_layers: int
    num_decoder_layers: int
    num_attention_heads: int
    intermediate_size: int


@dataclass(frozen=True, slots=True)
class QFormerShape:
    """The Q-Former of both stages."""

    num_query_tokens: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    cross_attention_frequency: int
    joint_size: int
    max_text_tokens: int
    dropout: float


@dataclass(frozen=True, slots=True)
class Stage1:
    """Stage 1: all of a batch takes part in ITC, its first `num_pairs` in ITM and ITG."""

    num_pairs: int
    optimization: Optimization


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """Everything that `python -m training tiny` does from nothing."""

    seed: int
    autocast: str
    save_every: int
    num_questions: int
    world: World
    vision_model: VisionShape
    language_model: LanguageShape
    language_model_t5: EncoderDecoderShape
    qformer: QFormerShape
    vision_pretraining: Optimization
    language_pretraining: Optimization
    language_pretraining_t5: Optimization
    stage1: Stage1
    retrieval: Stage1
    stage2: Optimization
    stage2_t5: Optimization

    def __post_init__(self) -> None:
        if self.autocast not in AUTOCAST_TYPES:
            raise ConfigError(f"autocast is {self.autocast!r}; choose one of {', '.join(AUTOCAST_TYPES)}")
        if self.save_every < 1:
            raise ConfigError(f"save_every is {self.save_every}; it must be at least 1")
        if not 1 <= self.num_questions <= MAX_TRAINING_QUESTIONS:
            raise ConfigError(f"num_questions is {self.num_questions}; choose 1 to {MAX_TRAINING_QUESTIONS}")
        opt, t5 = self.language_model, self.language_model_t5
        for layers, heads in (
            (opt.num_hidden_layers, opt.num_attention_heads),
            (t5.num_encoder_layers, t5.num_attention_heads),
        ):
            if min(layers, heads) < MIN_READING_SIZE:
                raise ConfigError(
                    f"a language model has {layers} layers of {heads} heads; "
                    f"supervised reading needs {MIN_READING_SIZE} of both"
                )
        for phase in (self.stage1.optimization, self.retrieval.optimization, self.stage2, self.stage2_t5):
            if not 2 <= phase.batch_size <= self.world.num_train_scenes:
                raise ConfigError(
                    f"a batch_size is {phase.batch_size}; choose 2 to num_train_scenes "
                    f"({self.world.num_train_scenes}): a batch draws distinct scenes, and needs a negative"
                )


def load_tiny_config(path: Path) -> TinyConfig:
    """Reads a `TinyConfig`; raises ConfigError naming the file and the key that is wrong."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        raise ConfigError(f"cannot read {path}: {exc.strerror}; shipped: {_shipped()}") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path} is not YAML: {exc}") from exc
    return _build(TinyConfig, raw, str(path))


def _shipped() -> str:
    return ", ".join(sorted(path.name for path in CONFIG_DIR.glob("*.yaml")))


def _build(kind: Any, raw: Any, where: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{where}: expected a mapping for {kind.__name__}, got {raw!r}")
    names = [field.name for field in fields(kind)]
    if unknown := sorted(set(raw) - set(names)):
        raise ConfigError(f"{where}: unknown key {unknown[0]!r}; known keys: {', '.join(names)}")
    if missing := [name for name in names if name not in raw]:
        raise ConfigError(f"{where}: missing key {missing[0]!r}")
    types = get_type_hints(kind)
    return kind(**{name: _value(types[name], raw[name], f"{where}: {name}") for name in names})


def _value(kind: Any, raw: Any, where: str) -> Any:
    if is_dataclass(kind):
        return _build(kind, raw, where)
    if kind is float and type(raw) is int:
        return float(raw)
    if type(raw) is not kind:
        raise ConfigError(f"{where}: expected {kind.__name__}, got {raw!r}")
    return raw
