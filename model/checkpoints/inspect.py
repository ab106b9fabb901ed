"""Tells what a checkpoint holds, from the headers of its files: no weights are read."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from model.checkpoints.adapter.config import FORMAT, AdapterConfig
from model.checkpoints.adapter.load import ADAPTER, find_part
from model.checkpoints.frozen.vision_model import FINAL_NORM, LANGUAGE, VISION
from model.checkpoints.hub.load import GENERATION, RETRIEVAL
from model.checkpoints.json_records import read_json
from model.checkpoints.lavis.load import LavisConfig, read_pickle
from model.checkpoints.lavis.tensor_names import from_lavis
from model.checkpoints.tensors import TensorFiles, TensorHeader
from model.errors import CheckpointError

_TEXT_BRANCH = (".intermediate.", ".output.dense.", ".output.LayerNorm.")
_PARTS: Mapping[str, str] = {  # prefix → part; the first that fits
    VISION: "image encoder",
    "ln_vision.": "ln_vision",
    "query_tokens": "queries",
    "embeddings.": "text embeddings",
    "text_head.": "text head (ITG)",
    "temperature": "temperature",
    "vision_projection.": "ITC head",
    "text_projection.": "ITC head",
    "itm_head.": "ITM head",
    "language_projection.": "projection",
    LANGUAGE: "language model",
}
_NEEDED = {
    "/caption and /vqa": ("image encoder", "queries", "Q-Former", "projection", "language model"),
    "/retrieve by ITC": ("image encoder", "queries", "Q-Former", "Q-Former, text branch", "ITC head"),
    "/retrieve by ITM": ("image encoder", "queries", "Q-Former", "Q-Former, text branch", "ITM head"),
    "captions by the Q-Former (ITG)": ("image encoder", "Q-Former, text branch", "text head (ITG)"),
}


_ORDER = tuple(dict.fromkeys([*_PARTS.values(), "Q-Former", "Q-Former, text branch"]))
_SHARED_NAMES = ("ln_vision", "queries", "Q-Former")


@dataclass(frozen=True, slots=True)
class PartSummary:
    """What a checkpoint holds of one part; `dtypes` as safetensors names them, "F32", "BF16" and so on."""

    name: str
    num_tensors: int
    num_parameters: int
    dtypes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Summary:
    """kind: of checkpoint. missing: what cannot be done, each with the parts that it lacks."""

    kind: str
    parts: tuple[PartSummary, ...]
    missing: Mapping[str, tuple[str, ...]]


def inspect(path: Path) -> Summary:
    """Looks at a directory in the Hub's format, an adapter or a .pth file. Raises CheckpointError."""
    kind, headers = _read_headers(path)
    by_part: dict[str, list[TensorHeader]] = {}
    for header in headers:
        by_part.setdefault(_part_of(header.name), []).append(header)
    parts = tuple(_summarize(name, by_part[name]) for name in _ORDER if name in by_part)
    lacking = {
        task: tuple(part for part in needed if part not in by_part) for task, needed in _NEEDED.items()
    }
    return Summary(kind, parts, {task: lacks for task, lacks in lacking.items() if lacks})


def _read_headers(path: Path) -> tuple[str, list[TensorHeader]]:
    if path.suffix == ".pth":
        tensors = from_lavis(read_pickle(path), source=path)
        lavis = LavisConfig.read(path.with_suffix(".json"))
        headers = [TensorHeader.of(name, tensor) for name, tensor in tensors.items()]
        for prefix, directory in ((VISION, lavis.vision_model), (LANGUAGE, lavis.language_model)):
            if directory and not any(header.name.startswith(prefix) for header in headers):
                headers += _headers_of_part(path.parent / directory, prefix)
        return f"LAVIS, {lavis.arch}", headers
    fields = read_json(path / "config.json")
    if fields.get("format") == FORMAT:
        config = AdapterConfig.read(path)
        headers = TensorFiles(path, ADAPTER).headers()
        headers += _headers_of_part(find_part(path, config.vision_model), VISION)
        if config.language_model is not None:
            headers += _headers_of_part(find_part(path, config.language_model), LANGUAGE)
        if config.retrieval_model is not None:
            retrieval = TensorFiles(path / config.retrieval_model, ADAPTER).headers()
            headers += [header for header in retrieval if _part_of(header.name) not in _SHARED_NAMES]
        return f"adapter, {config.kind}", headers
    architectures = fields.get("architectures")
    if not isinstance(architectures, list) or not {GENERATION, RETRIEVAL} & set(architectures):
        raise CheckpointError(
            f"{path / 'config.json'} is of architecture {architectures}; {GENERATION}, {RETRIEVAL}, adapters "
            "and files of LAVIS can be looked at"
        )
    return f"Hub, {architectures[0]}", [
        TensorHeader(header.name.replace(VISION + FINAL_NORM, "ln_vision."), header.shape, header.dtype)
        for header in TensorFiles(path).headers()
    ]


def _headers_of_part(directory: Path, prefix: str) -> list[TensorHeader]:
    """Those of a frozen part, alone in its directory or inside a whole model."""
    headers = TensorFiles(directory).headers()
    inside = [header for header in headers if header.name.startswith(prefix)]
    return inside or _prefixed(prefix, headers)


def _prefixed(prefix: str, headers: Iterable[TensorHeader]) -> list[TensorHeader]:
    return [TensorHeader(prefix + header.name, header.shape, header.dtype) for header in headers]


def _part_of(name: str) -> str:
    for prefix, part in _PARTS.items():
        if name.startswith(prefix):
            return part
    inside = name.removeprefix("qformer.encoder.layer.").lstrip("0123456789")
    return "Q-Former, text branch" if inside.startswith(_TEXT_BRANCH) else "Q-Former"


def _summarize(name: str, headers: list[TensorHeader]) -> PartSummary:
    return PartSummary(
        name=name,
        num_tensors=len(headers),
        num_parameters=sum(header.num_parameters for header in headers),
        dtypes=tuple(sorted({header.dtype for header in headers})),
    )
