"""Saves the processor of a checkpoint in the Hub's format, as `transformers`' `Blip2Processor` reads it."""

import copy
import json
from pathlib import Path

from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AddedToken, PreTrainedTokenizerFast

from model.language import SpecialTokenTemplate
from model.preprocess import ImagePreprocessor
from model.text_encoder import IMAGE_TOKEN


def build_processor_tokenizer(
    tokenizer: PreTrainedTokenizerFast, special_tokens: SpecialTokenTemplate
) -> PreTrainedTokenizerFast:
    """Return a copy of a tokenizer that has "<image>" and adds the special tokens around a text itself."""
    copied = copy.deepcopy(tokenizer)
    copied.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    bare, whole = (copied.encode("a", add_special_tokens=added) for added in (False, True))
    prefix_ids, suffix_ids = special_tokens
    if whole != [*prefix_ids, *bare, *suffix_ids]:
        prefix, suffix = (copied.convert_ids_to_tokens(list(ids)) for ids in special_tokens)
        copied.backend_tokenizer.post_processor = TemplateProcessing(
            single=[*prefix, "$A", *suffix],
            special_tokens=list(zip([*prefix, *suffix], [*prefix_ids, *suffix_ids], strict=True)),
        )
    return copied


def save_processor(
    directory: Path,
    tokenizer: PreTrainedTokenizerFast,
    preprocess: ImagePreprocessor,
    *,
    num_query_tokens: int,
) -> None:
    """Save a tokenizer, see `build_processor_tokenizer`, with both configurations of the processor.

    num_query_tokens: the image tokens that the processor puts in front of a text; without the number it puts
    none there, and the model answers without the image.
    """
    tokenizer.save_pretrained(directory)
    _write_json(
        directory / "processor_config.json",
        {"processor_class": "Blip2Processor", "num_query_tokens": num_query_tokens},
    )
    _write_json(
        directory / "preprocessor_config.json",
        {
            "processor_class": "Blip2Processor",
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
        },
    )


def _write_json(path: Path, fields: dict[str, object]) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")
