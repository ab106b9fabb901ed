"""Saves the Hub's format, which `transformers`' BLIP-2 classes read."""

import dataclasses
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from model.checkpoints.frozen import BLIP2_VISION, FINAL_NORM_PREFIX, LANGUAGE_PREFIX, VISION_PREFIX
from model.checkpoints.qformer_branch import qformer_branch_tensors
from model.components import Blip2Components
from model.errors import CheckpointError
from model.language import LanguageModel
from model.matching import Matcher
from model.preprocess import ImagePreprocessor

# Tensors that the retrieval format does not have.
DROPPED = ("text_head.", "temperature")


def save_hub(directory: Path, components: Blip2Components) -> None:
    """Save a model in the Hub's format, with its tokenizer and a preprocessor_config.json.

    With a language model, for `Blip2ForConditionalGeneration`, without matcher and prompts; else for
    `Blip2ForImageTextRetrieval`, without text head and temperature. The format has none of these. Raises
    CheckpointError where these classes do not support the image encoder.
    """
    if (found := components.vision_model.vit.config.model_type) != BLIP2_VISION:
        raise CheckpointError(
            f"the image encoder is of type {found!r}, and transformers' BLIP-2 has {BLIP2_VISION!r} only; "
            "save an adapter instead"
        )
    if components.language_model is not None:
        _save_generation(directory, components, components.language_model)
    else:
        assert components.matcher is not None, "a model without a language model has a matcher"
        _save_retrieval(directory, components, components.matcher)
    _write_preprocessor_config(components.preprocess, directory / "preprocessor_config.json")


def _save_generation(directory: Path, components: Blip2Components, language_model: LanguageModel) -> None:
    llm = language_model.llm
    language = {LANGUAGE_PREFIX + name: tensor for name, tensor in llm.state_dict().items()}
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(_config(components, language_model))
    model.load_state_dict(
        _hub_tensors(qformer_branch_tensors(components), components) | language, assign=True
    )
    model.language_model = llm  # keeps a head that is not tied
    model.save_pretrained(directory)
    language_model.tokenizer.save_pretrained(directory)


def _save_retrieval(directory: Path, components: Blip2Components, matcher: Matcher) -> None:
    tensors = {name: value for name, value in matcher.state_dict().items() if not name.startswith(DROPPED)}
    with torch.device("meta"):
        model = Blip2ForImageTextRetrieval(_config(components, None))
    model.load_state_dict(_hub_tensors(tensors, components), assign=True)
    model.save_pretrained(directory)
    matcher.tokenizer.save_pretrained(directory)


def _hub_tensors(trained: dict[str, Tensor], components: Blip2Components) -> dict[str, Tensor]:
    renamed = {
        name.replace("ln_vision.", VISION_PREFIX + FINAL_NORM_PREFIX): tensor
        for name, tensor in trained.items()
    }
    return renamed | {
        VISION_PREFIX + name: each for name, each in components.vision_model.backbone.state_dict().items()
    }


def _config(components: Blip2Components, language_model: LanguageModel | None) -> Blip2Config:
    qformer = dataclasses.asdict(components.qformer.config)
    num_query_tokens, joint_size = qformer.pop("num_query_tokens"), qformer.pop("joint_size")
    qformer["use_qformer_text_input"] = language_model is None
    return Blip2Config(
        vision_config=components.vision_model.vit.config.to_dict(),
        qformer_config=qformer,
        text_config=None if language_model is None else language_model.llm.config.to_dict(),
        num_query_tokens=num_query_tokens,
        image_text_hidden_size=joint_size,
        image_token_index=None if language_model is None else language_model.image_token_id,
    )


def _write_preprocessor_config(preprocess: ImagePreprocessor, path: Path) -> None:
    fields = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": preprocess.image_size, "width": preprocess.image_size},
        "resample": int(Image.Resampling.BICUBIC),
        "rescale_factor": 1 / 255,
        "image_mean": preprocess.mean,
        "image_std": preprocess.std,
    }
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
