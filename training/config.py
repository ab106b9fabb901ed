"""Run configurations: YAML files loaded into frozen dataclasses; an unknown or missing key is an error."""

import json
import re
from collections.abc import Hashable
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

CONFIG_DIR: Final = Path(__file__).parent / "configs"
STRICT: Final = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)  # of every configuration class
DIRECTORY: Final = "directory"  # of the file, in the context that validators are given
_MAX_ECHO: Final = 60

_Config = TypeVar("_Config")

Count = Annotated[int, Field(ge=1)]
Rate = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class ConfigError(Exception):
    """A configuration, or a file of a run, that cannot be used; the message names the file and the key."""


@dataclass(frozen=True, slots=True)
class Optimization:
    """AdamW with linear warm-up and cosine decay, both counted in steps.

    warmup_steps: None for a tenth of the steps, up to the 2,000 of the paper.
    """

    __pydantic_config__ = STRICT

    steps: Count
    batch_size: Count
    learning_rate: Rate = 1e-4
    min_learning_rate: Rate = 1e-5
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    weight_decay: Rate = 0.05
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.98
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0

    @property
    def num_warmup_steps(self) -> int:
        return min(2000, self.steps // 10) if self.warmup_steps is None else self.warmup_steps


@dataclass(frozen=True, slots=True)
class QFormerShape:
    """The Q-Former of both stages."""

    __pydantic_config__ = STRICT

    num_query_tokens: Count
    hidden_size: Count
    num_hidden_layers: Count
    num_attention_heads: Count
    intermediate_size: Count
    cross_attention_frequency: Count
    joint_size: Count
    max_text_tokens: Annotated[int, Field(ge=3)]
    dropout: Annotated[float, Field(ge=0, lt=1)]


@dataclass(frozen=True, slots=True)
class Stage1Config:
    """Stage 1: ITC uses the whole batch, ITM and ITG its first `num_pairs` pairs."""

    __pydantic_config__ = STRICT

    num_pairs: Count
    optimization: Optimization


class _Loader(yaml.SafeLoader):
    """YAML 1.2's numbers, so that 1e-4 is one; a key that is given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise yaml.MarkedYAMLError(problem=f"{twice[0]!r} is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def load_config(path: Path, config_class: type[_Config]) -> _Config:
    """Load a YAML file into a dataclass. Raises ConfigError naming the file, the key, its value and the cure.

    Validators find the directory of the file as `info.context[DIRECTORY]`.
    """
    raw = _read(path)
    try:
        # As JSON, for only there do strict dataclasses take mappings.
        text = json.dumps(raw, default=str)
        return TypeAdapter(config_class).validate_json(text, context={DIRECTORY: path.parent})
    except ValidationError as error:
        details = error.errors(include_url=False)
        unknown = [each for each in details if each["type"] == "unexpected_keyword_argument"]
        raise ConfigError(_describe(path, config_class, (unknown or details)[0])) from error


def _read(path: Path) -> object:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as exc:
        shipped = ", ".join(sorted(file.name for file in CONFIG_DIR.glob("*.yaml")))
        raise ConfigError(f"cannot read {path}: {exc.strerror}; shipped: {shipped}") from exc
    except UnicodeDecodeError as exc:
        raise ConfigError(f"{path} is not UTF-8: {exc.reason}; save it as UTF-8") from exc
    except (yaml.YAMLError, ValueError, RecursionError) as exc:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(exc).split())}; correct that place") from exc


def _describe(path: Path, config_class: type, error: ErrorDetails) -> str:
    *outer, last = location = [str(each) for each in error["loc"]] or [""]
    name = ".".join(location)
    match error["type"]:
        case "unexpected_keyword_argument":
            known = ", ".join(_keys_at(config_class, outer))
            return f"{path}: unknown key {name!r}; known keys: {known}"
        case "missing":
            place = f"{path}: {'.'.join(outer)}" if outer else str(path)
            return f"{place}: missing key {last!r}; add it"
        case "dataclass_type":
            subject, problem = name or "the file", "it must be keys with values"
        case _:
            subject, problem = name, error["msg"].removeprefix("Value error, ").replace("Input", "it")
    return f"{path}: {subject} is {_echo(error['input'])}; {problem}"


def _keys_at(config_class: type, location: list[str]) -> list[str]:
    """Return the keys of the dataclass at a location, as in a file."""
    for name in location:
        if not name.isdigit():
            config_class = _find_dataclass(get_type_hints(config_class).get(name))
    hints = get_type_hints(config_class, include_extras=True)
    aliases = {
        name: extra.alias
        for name, hint in hints.items()
        for extra in get_args(hint)
        if hasattr(extra, "alias")
    }
    return [aliases.get(field.name) or field.name for field in fields(config_class)]


def _find_dataclass(hint: Any) -> Any:
    return hint if is_dataclass(hint) else next(filter(None, map(_find_dataclass, get_args(hint))), None)


def _echo(value: object) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_ECHO else f"{text[: _MAX_ECHO - 1]}…"
