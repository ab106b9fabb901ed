"""Writes LAVIS' format: a .pth file, and beside it the .json and the directories that we read it with."""

import json
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoints.adapter.load import TIED_HEAD
from model.checkpoints.frozen.vision_model import VISION
from model.checkpoints.lavis.tensor_names import Encoder, to_lavis
from model.checkpoints.qformer_branch import query_branch_tensors
from model.components import Blip2Parts
from model.errors import CheckpointError

_ENCODERS: dict[str, Encoder] = {"blip_2_vision_model": "eva_clip_g", "clip_vision_model": "clip_L"}


def save_lavis(path: Path, parts: Blip2Parts) -> None:
    """Writes <name>.pth with the trained weights and the image encoder, as {"model": state dict}.

    Beside it <name>.json, <name>.vision_model with the encoder's configuration, and <name>.language_model or
    <name>.tokenizer. A generation model's retrieval side is left out, for LAVIS keeps that in a file of its
    own. Raises CheckpointError where the image encoder is none of LAVIS'.
    """
    model_type = parts.vision_model.tower.config.model_type
    if model_type not in _ENCODERS:
        raise CheckpointError(
            f"the image encoder is of type {model_type!r}, and LAVIS has those of {sorted(_ENCODERS)}; "
            "save an adapter instead"
        )
    sizes = parts.qformer.config
    if (sizes.cross_attention_frequency, sizes.layer_norm_eps) != (2, 1e-12):
        raise CheckpointError(
            f"the Q-Former attends to the image in every {sizes.cross_attention_frequency}. layer and has "
            f"the epsilon {sizes.layer_norm_eps}; LAVIS' does so in every 2., with 1e-12: save an adapter"
        )
    family = "opt" if parts.language_model is None else parts.language_model.llm.config.model_type
    tensors = to_lavis(_tensors(parts), encoder=_ENCODERS[model_type], family=family, source=path)
    beside = {part: path.with_suffix(f".{part}") for part in ("vision_model", "language_model", "tokenizer")}
    path.parent.mkdir(parents=True, exist_ok=True)
    parts.vision_model.tower.config.save_pretrained(beside["vision_model"])
    fields: dict[str, object] = {
        "image_size": parts.preprocess.image_size,
        "vision_model": beside["vision_model"].name,
        "num_attention_heads": parts.qformer.config.num_attention_heads,
    }
    if parts.language_model is not None:
        fields |= {"arch": f"blip2_{family}", "language_model": beside["language_model"].name}
        parts.language_model.llm.save_pretrained(beside["language_model"])
        parts.language_model.tokenizer.save_pretrained(beside["language_model"])
    else:
        assert parts.matcher is not None, "a model without a language model has a matcher"
        fields |= {"arch": "blip2", "tokenizer": beside["tokenizer"].name}
        parts.matcher.tokenizer.save_pretrained(beside["tokenizer"])
    torch.save({"model": tensors}, path)
    path.with_suffix(".json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _tensors(parts: Blip2Parts) -> dict[str, Tensor]:
    if parts.language_model is not None:
        trained = query_branch_tensors(parts)
    else:
        assert parts.matcher is not None
        trained = dict(parts.matcher.state_dict())
        if parts.matcher.text_head is not None:
            trained[TIED_HEAD] = trained["embeddings.word_embeddings.weight"]
    encoder = {VISION + name: tensor for name, tensor in parts.vision_model.body.state_dict().items()}
    return {name: tensor.detach() for name, tensor in (encoder | trained).items()}
