"""Files of LAVIS, small and random, with the tensor names of lavis_keys.txt."""

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.builders import (
    IMAGE_SIZE,
    build_language_tokenizer,
    build_opt,
    build_text_tokenizer,
    build_vision_config,
    build_vit,
)

KEYS = [line.split() for line in (Path(__file__).parent / "lavis_keys.txt").read_text().splitlines()]
NOT_IN_STAGE_2 = (
    *("Qformer.cls.", "Qformer.bert.embeddings.w", "Qformer.bert.embeddings.p"),
    *("vision_proj", "text_proj", "itm_head", "temp"),
)


def build_tensors(*, seed: int = 0) -> dict[str, Tensor]:
    """Build all tensors of a small BLIP-2 in LAVIS, of stage 1 and stage 2 together."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape, _ in KEYS:
        sizes = [] if shape == "scalar" else [int(size) for size in shape.split("x")]
        tensors[name] = torch.randn(sizes, generator=generator) * 0.2
        if "norm" in name.lower() and name.endswith("weight"):
            tensors[name] += 1
    tensors["Qformer.cls.predictions.decoder.weight"] = tensors[
        "Qformer.bert.embeddings.word_embeddings.weight"
    ]
    tensors["Qformer.cls.predictions.decoder.bias"] = tensors["Qformer.cls.predictions.bias"]
    tensors["temp"] = torch.tensor(0.05)
    return tensors


def of_stage1(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("opt_proj")}


def of_stage2(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(NOT_IN_STAGE_2)}
    text_ffn = (".intermediate.dense", ".output.dense", ".output.LayerNorm")
    for name in list(kept):
        inside = name.removeprefix("Qformer.bert.encoder.layer.")[1:]
        if name.startswith("Qformer.bert.encoder") and inside.startswith(text_ffn):
            del kept[name]
    return kept


class Folder:
    """A folder with a .pth file, its .json, and the frozen models that they may name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        build_opt().save_pretrained(path / "opt")
        build_language_tokenizer().save_pretrained(path / "opt")
        build_text_tokenizer().save_pretrained(path / "bert")
        build_vit("blip_2_vision_model").save_pretrained(path / "encoder")
        config = build_vision_config().to_dict()  # whose weights the .pth holds
        (path / "vit").mkdir()
        (path / "vit" / "config.json").write_text(json.dumps(config))

    def save(self, tensors: object, **fields: Any) -> str:
        torch.save(tensors, self.path / "blip2.pth")
        stage2 = {"arch": "blip2_opt", "language_model": "opt"}
        description = {"image_size": IMAGE_SIZE, "vision_model": "vit", **stage2, **fields}
        (self.path / "blip2.json").write_text(json.dumps(description))
        return str(self.path / "blip2.pth")

    def save_stage1(self, tensors: object, **fields: Any) -> str:
        return self.save(tensors, arch="blip2", language_model=None, tokenizer="bert", **fields)
