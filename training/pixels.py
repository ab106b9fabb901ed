"""The pixels of a set of scenes, drawn once and kept on disk."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.preprocess import CLIP_MEAN, CLIP_STD
from training.scenes import Scene, render_scene


class SceneImages:
    """Scenes as [count, S, S, 3] bytes, read from disk as they are needed."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def pixel_values(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Normalised [B, 3, S, S] float32 images, equal to what `ImagePreprocessor` gives at this size."""
        pixels = torch.from_numpy(self._pixels[indices]).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (pixels - mean) / std


def draw_scenes(scenes: Sequence[Scene], image_size: int, path: Path) -> SceneImages:
    """Draws all scenes into `path` (`.npy`), unless it is there already."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        shape = (len(scenes), image_size, image_size, 3)
        pixels = np.lib.format.open_memmap(partial, mode="w+", dtype=np.uint8, shape=shape)
        for index, scene in enumerate(tqdm(scenes, desc="scenes", mininterval=5)):
            pixels[index] = np.asarray(render_scene(scene, image_size))
        pixels.flush()
        partial.replace(path)
    return SceneImages(np.load(path, mmap_mode="r"))
