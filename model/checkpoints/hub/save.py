"""Writes the Hub's format, which `transformers`' BLIP-2 classes read."""

import dataclasses
import json
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from transformers import Blip2Config, Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval

from model.checkpoints.frozen.vision_model import BLIP2_VISION, FINAL_NORM, LANGUAGE, VISION
from model.checkpoints.qformer_branch import query_branch_tensors
from model.components import Blip2Parts
from model.errors import CheckpointError
from model.language import LanguageModel
from model.matching import Matcher
from model.preprocess import ImagePreprocessor

# What the retrieval format has no place for.
DROPPED = ("text_head.", "temperature")


def save_hub(directory: Path, parts: Blip2Parts) -> None:
    """Writes a model in the Hub's format, with its tokenizer and a preprocessor_config.json.

    With a language model, for `Blip2ForConditionalGeneration`, and what the format has no place for, the
    retrieval side and the prompts, is left out; else for `Blip2ForImageTextRetrieval`, without text head and
    temperature. Raises CheckpointError where the image encoder is none that these classes have.
    """
    if (found := parts.vision_model.tower.config.model_type) != BLIP2_VISION:
        raise CheckpointError(
            f"the image encoder is of type {found!r}, and transformers' BLIP-2 has {BLIP2_VISION!r} only; "
            "save an adapter instead"
        )
    if parts.language_model is not None:
        _save_generation(directory, parts, parts.language_model)
    else:
        assert parts.matcher is not None, "a model without a language model has a matcher"
        _save_retrieval(directory, parts, parts.matcher)
    _write_preprocessor_config(parts.preprocess, directory / "preprocessor_config.json")


def _save_generation(directory: Path, parts: Blip2Parts, language_model: LanguageModel) -> None:
    llm = language_model.llm
    language = {LANGUAGE + name: tensor for name, tensor in llm.state_dict().items()}
    with torch.device("meta"):
        model = Blip2ForConditionalGeneration(_config(parts, language_model))
    model.load_state_dict(_hub_tensors(query_branch_tensors(parts), parts) | language, assign=True)
    model.language_model = llm  # whose head stays its own where it is
    model.save_pretrained(directory)
    language_model.tokenizer.save_pretrained(directory)


def _save_retrieval(directory: Path, parts: Blip2Parts, matcher: Matcher) -> None:
    tensors = {name: value for name, value in matcher.state_dict().items() if not name.startswith(DROPPED)}
    with torch.device("meta"):
        model = Blip2ForImageTextRetrieval(_config(parts, None))
    model.load_state_dict(_hub_tensors(tensors, parts), assign=True)
    model.save_pretrained(directory)
    matcher.tokenizer.save_pretrained(directory)


def _hub_tensors(trained: dict[str, Tensor], parts: Blip2Parts) -> dict[str, Tensor]:
    renamed = {name.replace("ln_vision.", VISION + FINAL_NORM): tensor for name, tensor in trained.items()}
    return renamed | {VISION + name: each for name, each in parts.vision_model.body.state_dict().items()}


def _config(parts: Blip2Parts, language_model: LanguageModel | None) -> Blip2Config:
    qformer = dataclasses.asdict(parts.qformer.config)
    num_query_tokens, joint_size = qformer.pop("num_query_tokens"), qformer.pop("joint_size")
    qformer["use_qformer_text_input"] = language_model is None
    return Blip2Config(
        vision_config=parts.vision_model.tower.config.to_dict(),
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
