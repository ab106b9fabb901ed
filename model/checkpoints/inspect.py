"""Lists the components of a checkpoint by the headers of its files; reads no weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.checkpoints.adapter import ADAPTER, find_frozen_model
from model.checkpoints.adapter.config import FORMAT, AdapterConfig
from model.checkpoints.frozen import FINAL_NORM_PREFIX, LANGUAGE_PREFIX, VISION_PREFIX
from model.checkpoints.hub import GENERATION, RETRIEVAL
from model.checkpoints.hub.peft import find_base_model, is_peft_adapter
from model.checkpoints.json_records import read_json
from model.checkpoints.lavis import LavisConfig, from_lavis, read_pickle
from model.checkpoints.tensors import TensorFiles, TensorHeader
from model.errors import CheckpointError

_TEXT_BRANCH = (".intermediate.", ".output.dense.", ".output.LayerNorm.")
_COMPONENTS: Mapping[str, str] = {  # prefix → component; the first that matches
    VISION_PREFIX: "image encoder",
    "ln_vision.": "ln_vision",
    "query_tokens": "queries",
    "embeddings.": "text embeddings",
    "text_head.": "text head (ITG)",
    "temperature": "temperature",
    "vision_projection.": "ITC head",
    "text_projection.": "ITC head",
    "itm_head.": "ITM head",
    "language_projection.": "projection",
    LANGUAGE_PREFIX: "language model",
}
_REQUIRED = {
    "/caption and /vqa": ("image encoder", "queries", "Q-Former", "projection", "language model"),
    "/retrieve by ITC": ("image encoder", "queries", "Q-Former", "Q-Former, text branch", "ITC head"),
    "/retrieve by ITM": ("image encoder", "queries", "Q-Former", "Q-Former, text branch", "ITM head"),
    "captions by the Q-Former (ITG)": ("image encoder", "Q-Former, text branch", "text head (ITG)"),
}


_ORDER = tuple(dict.fromkeys([*_COMPONENTS.values(), "Q-Former", "Q-Former, text branch"]))
_SHARED_NAMES = ("ln_vision", "queries", "Q-Former")


@dataclass(frozen=True, slots=True)
class ComponentSummary:
    """One component of a checkpoint; `dtypes` as safetensors names them, "F32", "BF16" and so on."""

    name: str
    num_tensors: int
    num_parameters: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """kind: of checkpoint. missing: unavailable tasks, each with the components that it lacks."""

    kind: str
    components: tuple[ComponentSummary, ...]
    missing: Mapping[str, tuple[str, ...]]


def inspect(path: Path) -> Summary:
    """Summarise a directory in the Hub's format, an adapter or a .pth file. Raises CheckpointError."""
    kind, headers = _read_headers(path)
    by_component: dict[str, list[TensorHeader]] = {}
    for header in headers:
        by_component.setdefault(_component_of(header.name), []).append(header)
    components = tuple(_summarize(name, by_component[name]) for name in _ORDER if name in by_component)
    lacking = {
        task: tuple(name for name in required if name not in by_component)
        for task, required in _REQUIRED.items()
    }
    return Summary(kind, components, {task: lacks for task, lacks in lacking.items() if lacks})


def _read_headers(path: Path) -> tuple[str, list[TensorHeader]]:
    if path.suffix == ".pth":
        tensors = from_lavis(read_pickle(path), source=path)
        lavis = LavisConfig.read(path.with_suffix(".json"))
        headers = [TensorHeader.from_tensor(name, tensor) for name, tensor in tensors.items()]
        for prefix, directory in (
            (VISION_PREFIX, lavis.vision_model),
            (LANGUAGE_PREFIX, lavis.language_model),
        ):
            if directory and not any(header.name.startswith(prefix) for header in headers):
                headers += _headers_of_frozen_model(path.parent / directory, prefix)
        return f"LAVIS, {lavis.arch}", headers
    if is_peft_adapter(path):
        kind, headers = _read_headers(find_base_model(path))
        return f"{kind}, with a PEFT adapter to merge", headers
    fields = read_json(path / "config.json")
    if fields.get("format") == FORMAT:
        config = AdapterConfig.read(path)
        headers = TensorFiles(path, ADAPTER).headers()
        headers += _headers_of_frozen_model(find_frozen_model(path, config.vision_model), VISION_PREFIX)
        if config.language_model is not None:
            headers += _headers_of_frozen_model(
                find_frozen_model(path, config.language_model), LANGUAGE_PREFIX
            )
        if config.retrieval_model is not None:
            retrieval = TensorFiles(path / config.retrieval_model, ADAPTER).headers()
            headers += [header for header in retrieval if _component_of(header.name) not in _SHARED_NAMES]
        return f"adapter, {config.kind}", headers
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or not any(
        each in architectures for each in (GENERATION, RETRIEVAL)
    ):
        raise CheckpointError(
            f"{path / 'config.json'} is of architecture {architectures}; {GENERATION}, {RETRIEVAL}, adapters "
            "and files of LAVIS can be inspected"
        )
    return f"Hub, {architectures[0]}", [
        TensorHeader(
            header.name.replace(VISION_PREFIX + FINAL_NORM_PREFIX, "ln_vision."), header.shape, header.dtype
        )
        for header in TensorFiles(path).headers()
    ]


def _headers_of_frozen_model(directory: Path, prefix: str) -> list[TensorHeader]:
    """Return the headers of a frozen model, alone in its directory or inside a whole model."""
    headers = TensorFiles(directory).headers()
    inside = [header for header in headers if header.name.startswith(prefix)]
    return inside or _prefixed(prefix, headers)


def _prefixed(prefix: str, headers: Iterable[TensorHeader]) -> list[TensorHeader]:
    return [TensorHeader(prefix + header.name, header.shape, header.dtype) for header in headers]


def _component_of(name: str) -> str:
    for prefix, component in _COMPONENTS.items():
        if name.startswith(prefix):
            return component
    inside = name.removeprefix("qformer.encoder.layer.").lstrip("0123456789")
    return "Q-Former, text branch" if inside.startswith(_TEXT_BRANCH) else "Q-Former"


def _summarize(name: str, headers: list[TensorHeader]) -> ComponentSummary:
    return ComponentSummary(
        name=name,
        num_tensors=len(headers),
        num_parameters=sum(header.num_parameters for header in headers),
        dtypes=tuple(sorted({header.dtype for header in headers})),
    )
