"""Loads the image preprocessor of a checkpoint in the Hub's format."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image
from pydantic import TypeAdapter, ValidationError

from model.checkpoints.json_records import read_json
from model.errors import CheckpointError
from model.preprocess import CLIP_MEAN, CLIP_STD, ImagePreprocessor

log = logging.getLogger(__name__)
_FIXED: Mapping[str, object] = {  # fixed in ImagePreprocessor
    "do_resize": True,
    "do_rescale": True,
    "do_normalize": True,
    "do_center_crop": False,
    "resample": int(Image.Resampling.BICUBIC),
}
_RESCALE_FACTOR = 1 / 255
_Channels = tuple[float, float, float]


def load_preprocessor(directory: Path, image_size: int) -> ImagePreprocessor:
    """Load mean and deviation of the pixels, from the file of old releases of transformers or of new ones.

    Without either they are CLIP's, as in every published checkpoint, and a warning is logged. The size is
    that of the encoder, whatever the file says. Raises CheckpointError where the file differs from BLIP-2's
    processor.
    """
    path, fields = _read_fields(directory)
    fields = {key: value for key, value in fields.items() if value is not None}  # null: unset
    for key, value in _FIXED.items():
        if fields.get(key, value) != value:
            raise CheckpointError(
                f"{path} sets {key!r} to {fields[key]!r}; BLIP-2's images are made with {value!r}: correct "
                "it, or remove the key"
            )
    factor = fields.get("rescale_factor", _RESCALE_FACTOR)
    if not isinstance(factor, float) or abs(factor - _RESCALE_FACTOR) > 1e-6:
        raise CheckpointError(f"{path} sets 'rescale_factor' to {factor!r}; it must be 1/255: correct it")
    mean, std = fields.get("image_mean", CLIP_MEAN), fields.get("image_std", CLIP_STD)
    try:
        (mean, std) = TypeAdapter(tuple[_Channels, _Channels]).validate_python((mean, std))
    except ValidationError as error:
        raise CheckpointError(
            f"{path} has image_mean {mean!r} and image_std {std!r}; three numbers each must stand there, "
            f"such as {list(CLIP_MEAN)}: correct it"
        ) from error
    if min(std) <= 0:
        raise CheckpointError(f"{path} has image_std {std!r}; each must be above 0: correct it")
    return ImagePreprocessor(image_size, mean, std)


def _read_fields(directory: Path) -> tuple[Path, dict[str, Any]]:
    path = directory / "preprocessor_config.json"
    if path.is_file():
        return path, read_json(path)
    path = directory / "processor_config.json"
    nested = read_json(path).get("image_processor") if path.is_file() else None
    if isinstance(nested, dict):
        return path, nested
    log.warning(
        "%s has no preprocessor_config.json: images are made as config.json and BLIP-2's processor say, "
        "at the encoder's size with the mean and deviation of CLIP",
        directory,
    )
    return path, {}
