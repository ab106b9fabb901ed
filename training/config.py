"""Run configurations: YAML files loaded into frozen dataclasses; an unknown or missing key is an error."""

from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import yaml

CONFIG_DIR = Path(__file__).parent / "configs"

_Config = TypeVar("_Config")


class ConfigError(Exception):
    """A configuration, or a file of a run, that cannot be used; the message names the file and the key."""


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
class Stage1Config:
    """Stage 1: ITC uses the whole batch, ITM and ITG its first `num_pairs` pairs."""

    num_pairs: int
    optimization: Optimization


def load_config(path: Path, config_class: type[_Config]) -> _Config:
    """Load a YAML file into a dataclass. Raises ConfigError naming the file and the wrong key."""
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as exc:
        shipped = ", ".join(sorted(file.name for file in CONFIG_DIR.glob("*.yaml")))
        raise ConfigError(f"cannot read {path}: {exc.strerror}; shipped: {shipped}") from exc
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path} is not YAML: {exc}") from exc
    config: _Config = _parse_dataclass(config_class, raw, str(path))
    return config


def _parse_dataclass(config_class: Any, raw: Any, location: str) -> Any:
    if not isinstance(raw, dict):
        raise ConfigError(f"{location}: expected a mapping for {config_class.__name__}, got {raw!r}")
    names = [field.name for field in fields(config_class)]
    if unknown := sorted(set(raw) - set(names)):
        raise ConfigError(f"{location}: unknown key {unknown[0]!r}; known keys: {', '.join(names)}")
    if missing := [name for name in names if name not in raw]:
        raise ConfigError(f"{location}: missing key {missing[0]!r}")
    types = get_type_hints(config_class)
    return config_class(
        **{name: _parse_value(types[name], raw[name], f"{location}: {name}") for name in names}
    )


def _parse_value(value_type: Any, raw: Any, location: str) -> Any:
    if is_dataclass(value_type):
        return _parse_dataclass(value_type, raw, location)
    if value_type is float and type(raw) is int:
        return float(raw)
    if type(raw) is not value_type:
        raise ConfigError(f"{location}: expected {value_type.__name__}, got {raw!r}")
    return raw
