"""A disk cache of the frozen image encoder's features: each image is encoded once for all steps."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.vision import VisionEncoder

_BATCH_SIZE = 256


class ImageDataset(Protocol):
    """Images that can be loaded by index."""

    def __len__(self) -> int: ...

    def pixel_values(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Load normalised [B, 3, S, S] float32 images."""
        ...


class ImageFeatures:
    """[count, P, V] half-precision features before `ln_vision`, read from disk on demand."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def load(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Load the float32 features [B, P, V] of the images at `indices`."""
        return torch.from_numpy(self._values[indices]).float()


def cache_features(
    encoder: VisionEncoder, images: ImageDataset, path: Path, device: torch.device
) -> ImageFeatures:
    """Encode all images into `path` (`.npy`) unless it exists, and open it."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        shape = (len(images), encoder.num_image_tokens, encoder.hidden_size)
        values = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        with torch.inference_mode():
            for start in tqdm(range(0, len(images), _BATCH_SIZE), desc="features", mininterval=5):
                indices = np.arange(start, min(start + _BATCH_SIZE, len(images)))
                values[indices] = encoder(images.pixel_values(indices).to(device)).cpu().half().numpy()
        values.flush()
        partial.replace(path)
    return ImageFeatures(np.load(path, mmap_mode="r"))
