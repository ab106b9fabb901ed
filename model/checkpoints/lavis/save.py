"""Saves LAVIS' format: a .pth file, with the .json and the directories that loading needs."""

import json
from pathlib import Path

import torch
from torch import Tensor

from model.checkpoints.adapter import TIED_HEAD
from model.checkpoints.frozen import VISION_PREFIX
from model.checkpoints.lavis.language_model import differing_fields
from model.checkpoints.lavis.tensor_names import Encoder, to_lavis
from model.checkpoints.qformer_branch import qformer_branch_tensors
from model.components import Blip2Components
from model.errors import CheckpointError

_ENCODERS: dict[str, Encoder] = {"blip_2_vision_model": "eva_clip_g", "clip_vision_model": "clip_L"}


def save_lavis(path: Path, components: Blip2Components) -> None:
    """Save <name>.pth with the trained weights and the image encoder, as {"model": state dict}.

    Also <name>.json, <name>.vision_model with the encoder's configuration, and <name>.language_model or
    <name>.tokenizer. The matcher of a generation model is left out: LAVIS keeps it in a file of its own.
    Raises CheckpointError where LAVIS does not have the image encoder or the language model.
    """
    _check_supported(components)
    encoder = _ENCODERS[components.vision_model.vit.config.model_type]
    language_family = (
        "opt" if components.language_model is None else components.language_model.llm.config.model_type
    )
    tensors = to_lavis(_tensors(components), encoder=encoder, language_family=language_family, source=path)
    directories = {
        name: path.with_suffix(f".{name}") for name in ("vision_model", "language_model", "tokenizer")
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    components.vision_model.vit.config.save_pretrained(directories["vision_model"])
    fields: dict[str, object] = {
        "image_size": components.preprocess.image_size,
        "vision_model": directories["vision_model"].name,
        "num_attention_heads": components.qformer.config.num_attention_heads,
    }
    if components.language_model is not None:
        fields |= {"arch": f"blip2_{language_family}", "language_model": directories["language_model"].name}
        fields |= differing_fields(components.language_model)
        components.language_model.llm.save_pretrained(directories["language_model"])
        components.language_model.tokenizer.save_pretrained(directories["language_model"])
    else:
        assert components.matcher is not None, "a model without a language model has a matcher"
        fields |= {"arch": "blip2", "tokenizer": directories["tokenizer"].name}
        components.matcher.tokenizer.save_pretrained(directories["tokenizer"])
    torch.save({"model": tensors}, path)
    path.with_suffix(".json").write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def _check_supported(components: Blip2Components) -> None:
    """Raise CheckpointError where LAVIS does not have such an image encoder, Q-Former or language model."""
    model_type = components.vision_model.vit.config.model_type
    if model_type not in _ENCODERS:
        raise CheckpointError(
            f"the image encoder is of type {model_type!r}, and LAVIS has those of {sorted(_ENCODERS)}; "
            "save an adapter instead"
        )
    language_model = components.language_model
    if language_model is not None and (found := language_model.llm.config.model_type) not in ("opt", "t5"):
        raise CheckpointError(
            f"the language model is of type {found!r}, and LAVIS has 'opt' and 't5'; save an adapter instead"
        )
    sizes = components.qformer.config
    if (sizes.cross_attention_frequency, sizes.layer_norm_eps) != (2, 1e-12):
        raise CheckpointError(
            f"the Q-Former attends to the image in every {sizes.cross_attention_frequency}. layer and has "
            f"the epsilon {sizes.layer_norm_eps}; LAVIS' does so in every 2., with 1e-12: save an adapter"
        )


def _tensors(components: Blip2Components) -> dict[str, Tensor]:
    if components.language_model is not None:
        trained = qformer_branch_tensors(components)
    else:
        assert components.matcher is not None
        trained = dict(components.matcher.state_dict())
        if components.matcher.text_head is not None:
            trained[TIED_HEAD] = trained["embeddings.word_embeddings.weight"]
    encoder = {
        VISION_PREFIX + name: tensor for name, tensor in components.vision_model.backbone.state_dict().items()
    }
    return {name: tensor.detach() for name, tensor in (encoder | trained).items()}
