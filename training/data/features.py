"""Features of the frozen image encoder, computed once, for training reads each image many times."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.vision import VisionEncoder
from training.world.pixels import SceneImages

_BATCH = 256


class ImageFeatures:
    """[count, P, V] half-precision features before `ln_vision`, read from disk as they are needed."""

    def __init__(self, values: np.ndarray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    def load(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """The float32 features [B, P, V] of the images numbered `indices`."""
        return torch.from_numpy(self._values[indices]).float()


def encode_scenes(
    encoder: VisionEncoder, images: SceneImages, path: Path, device: torch.device
) -> ImageFeatures:
    """Encodes all images into `path` (`.npy`), unless it is there already."""
    if not path.exists():
        partial = path.with_suffix(".partial")
        shape = (len(images), encoder.num_image_tokens, encoder.hidden_size)
        values = np.lib.format.open_memmap(partial, mode="w+", dtype=np.float16, shape=shape)
        with torch.inference_mode():
            for start in tqdm(range(0, len(images), _BATCH), desc="features", mininterval=5):
                chosen = np.arange(start, min(start + _BATCH, len(images)))
                values[chosen] = encoder(images.pixel_values(chosen).to(device)).cpu().half().numpy()
        values.flush()
        partial.replace(path)
    return ImageFeatures(np.load(path, mmap_mode="r"))
