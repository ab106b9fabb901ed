"""The tensor names of LAVIS and ours, mapped in both directions.

Ours are the Hub's names, and `ln_vision.*`, `text_head.*` and `temperature`, which the Hub names differently
or lacks. Each of the two encoders has its own map, because LAVIS took their code from different places.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from model.errors import CheckpointError

Encoder = Literal["eva_clip_g", "clip_L"]
Pairs = Sequence[tuple[str, str]]

_PREFIXES: Pairs = (
    ("query_tokens", "query_tokens"),
    ("ln_vision.", "ln_vision."),
    ("Qformer.bert.embeddings.LayerNorm.", "qformer.layernorm."),
    ("Qformer.bert.embeddings.", "embeddings."),
    ("Qformer.bert.", "qformer."),
    ("Qformer.cls.predictions.", "text_head."),
    ("vision_proj.", "vision_projection."),
    ("text_proj.", "text_projection."),
    ("itm_head.", "itm_head."),
    ("temp", "temperature"),
)
_LANGUAGE_PREFIXES: Mapping[str, Pairs] = {
    "opt": (("opt_proj.", "language_projection."), ("opt_model.", "language_model.")),
    "t5": (("t5_proj.", "language_projection."), ("t5_model.", "language_model.")),
}
_ATTENTION: Pairs = (
    (".attention.self.", ".attention.attention."),
    (".crossattention.self.", ".crossattention.attention."),
)
_ENCODERS: Mapping[Encoder, tuple[Pairs, Pairs]] = {
    "eva_clip_g": (
        (
            ("visual_encoder.cls_token", "vision_model.embeddings.class_embedding"),
            ("visual_encoder.pos_embed", "vision_model.embeddings.position_embedding"),
            ("visual_encoder.patch_embed.proj.", "vision_model.embeddings.patch_embedding."),
            ("visual_encoder.blocks.", "vision_model.encoder.layers."),
        ),
        (
            (".norm1.", ".layer_norm1."),
            (".norm2.", ".layer_norm2."),
            (".attn.qkv.", ".self_attn.qkv."),
            (".attn.proj.", ".self_attn.projection."),
        ),
    ),
    "clip_L": (
        (
            ("visual_encoder.class_embedding", "vision_model.embeddings.class_embedding"),
            ("visual_encoder.positional_embedding", "vision_model.embeddings.position_embedding.weight"),
            ("visual_encoder.conv1.", "vision_model.embeddings.patch_embedding."),
            ("visual_encoder.ln_pre.", "vision_model.pre_layrnorm."),
            ("visual_encoder.transformer.resblocks.", "vision_model.encoder.layers."),
        ),
        (
            (".ln_1.", ".layer_norm1."),
            (".ln_2.", ".layer_norm2."),
            (".attn.out_proj.", ".self_attn.out_proj."),
            (".mlp.c_fc.", ".mlp.fc1."),
            (".mlp.c_proj.", ".mlp.fc2."),
        ),
    ),
}
_HEAD_BIAS, _HEAD_BIAS_COPY = "Qformer.cls.predictions.bias", "Qformer.cls.predictions.decoder.bias"
_BUFFERS = ("Qformer.bert.embeddings.position_ids",)


def find_encoder(names: Iterable[str]) -> Encoder | None:
    """Return the image encoder among LAVIS' tensors; None where the file holds none."""
    for encoder, (prefixes, _) in _ENCODERS.items():
        if prefixes[0][0] in names:
            return encoder
    return None


def from_lavis(tensors: Mapping[str, Tensor], *, source: Path) -> dict[str, Tensor]:
    """Return LAVIS' tensors under our names and in our shapes.

    Raises CheckpointError naming a tensor that our model does not have, or that cannot be joined or split.
    """
    remaining = {name: tensor for name, tensor in tensors.items() if name not in _BUFFERS}
    _drop_head_bias_copy(remaining, source)
    ours = _join_eva_biases(remaining, source) | _split_clip_projections(remaining, source)
    prefixes, inner = _name_pairs(find_encoder(remaining), find_language_family(remaining))
    for name, tensor in remaining.items():
        if not name.startswith(tuple(old for old, _ in prefixes)):
            raise CheckpointError(
                f"{source} holds the tensor {name!r}, which no BLIP-2 of LAVIS has; give the .pth file that "
                "LAVIS saved, of the kind its .json says"
            )
        ours[_rename(name, prefixes, inner)] = tensor
    return ours


def to_lavis(
    tensors: Mapping[str, Tensor], *, encoder: Encoder, language_family: str, source: Path
) -> dict[str, Tensor]:
    """Return our tensors under LAVIS' names and in its shapes; the inverse of `from_lavis`.

    language_family: "opt" or "t5". Raises CheckpointError for a key bias that is not zero: LAVIS' encoder has
    none.
    """
    remaining = dict(tensors)
    lavis_tensors = (
        _split_eva_biases(remaining, source) if encoder == "eva_clip_g" else _join_clip_projections(remaining)
    )
    prefixes, inner = ([(new, old) for old, new in pairs] for pairs in _name_pairs(encoder, language_family))
    lavis_tensors |= {_rename(name, prefixes, inner): tensor for name, tensor in remaining.items()}
    if _HEAD_BIAS in lavis_tensors:
        lavis_tensors[_HEAD_BIAS_COPY] = lavis_tensors[_HEAD_BIAS]
    return lavis_tensors


def _name_pairs(encoder: Encoder | None, language_family: str | None) -> tuple[Pairs, Pairs]:
    encoder_prefixes, encoder_inner = _ENCODERS[encoder] if encoder is not None else ((), ())
    language_prefixes = _LANGUAGE_PREFIXES[language_family] if language_family is not None else ()
    return (*encoder_prefixes, *language_prefixes, *_PREFIXES), (*encoder_inner, *_ATTENTION)


def find_language_family(names: Iterable[str]) -> str | None:
    """Return the language model that LAVIS' tensors were trained with; None for a stage-1 file."""
    for language_family, pairs in _LANGUAGE_PREFIXES.items():
        if any(name.startswith(tuple(old for old, _ in pairs)) for name in names):
            return language_family
    return None


def _rename(name: str, prefixes: Pairs, inner: Pairs) -> str:
    for old, new in prefixes:
        if name.startswith(old):
            name = new + name.removeprefix(old)
            break
    for old, new in inner:
        name = name.replace(old, new)
    return name


def _drop_head_bias_copy(tensors: dict[str, Tensor], source: Path) -> None:
    copy = tensors.pop(_HEAD_BIAS_COPY, None)
    if copy is not None and not torch.equal(copy, tensors.get(_HEAD_BIAS, copy)):
        raise CheckpointError(
            f"{source}: {_HEAD_BIAS} and {_HEAD_BIAS_COPY} differ, and the text head has one bias; "
            "save it again"
        )


def _join_eva_biases(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Remove the query and value biases from `tensors`; return one bias per layer, zero for the keys."""
    joined = {}
    for name in [name for name in tensors if name.endswith(".attn.q_bias")]:
        stem = name.removesuffix("q_bias")
        query, value = tensors.pop(name), tensors.pop(f"{stem}v_bias", None)
        key = tensors.pop(f"{stem}k_bias", torch.zeros_like(query))
        if value is None:
            raise CheckpointError(f"{source} holds {name!r} but no {stem}v_bias; save it again")
        if query.dim() != 1 or not query.shape == key.shape == value.shape:
            raise CheckpointError(
                f"{source}: the biases {stem}*_bias have the shapes {list(query.shape)}, {list(key.shape)} "
                f"and {list(value.shape)}; each must have the encoder's width: save it again"
            )
        _check_key_bias(key, f"{stem}k_bias", source)
        prefixes, inner = _ENCODERS["eva_clip_g"]
        joined[_rename(f"{stem}qkv.bias", prefixes, inner)] = torch.cat([query, key, value])
    return joined


def _split_eva_biases(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    split: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith(".self_attn.qkv.bias")]:
        query, key, value = tensors.pop(name).chunk(3)
        _check_key_bias(key, name, source)
        stem = name.replace("vision_model.encoder.layers.", "visual_encoder.blocks.").removesuffix(
            "self_attn.qkv.bias"
        )
        split |= {f"{stem}attn.q_bias": query, f"{stem}attn.v_bias": value}
    return split


def _check_key_bias(key: Tensor, name: str, source: Path) -> None:
    if key.any():
        raise CheckpointError(
            f"{source}: the key bias in {name!r} is not zero, and the attention of LAVIS' EVA encoder has "
            "none; this encoder is another one, keep it in the Hub's format"
        )


def _split_clip_projections(tensors: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Remove the joint query, key and value projections from `tensors`; return the three of each layer."""
    split = {}
    for name in [name for name in tensors if ".attn.in_proj_" in name]:
        kind = name.rpartition("_")[2]  # weight or bias
        layer = name.removeprefix("visual_encoder.transformer.resblocks.").partition(".")[0]
        joined = tensors.pop(name)
        if joined.dim() == 0 or len(joined) == 0 or len(joined) % 3:
            raise CheckpointError(
                f"{source}: the tensor {name!r} has shape {list(joined.shape)}, and holds queries, keys and "
                "values, so that its rows are a multiple of 3; save it again"
            )
        for projection, tensor in zip("qkv", joined.chunk(3), strict=True):
            split[f"vision_model.encoder.layers.{layer}.self_attn.{projection}_proj.{kind}"] = tensor.clone()
    return split


def _join_clip_projections(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    joined = {}
    for name in [name for name in tensors if ".self_attn.q_proj." in name]:
        kind = name.rpartition(".")[2]
        layer = name.removeprefix("vision_model.encoder.layers.").partition(".")[0]
        projections = [tensors.pop(name.replace(".q_proj.", f".{each}_proj.")) for each in "qkv"]
        stem = f"visual_encoder.transformer.resblocks.{layer}"
        joined[f"{stem}.attn.in_proj_{kind}"] = torch.cat(projections)
    return joined
