"""A disk cache of rendered scenes: each scene is rendered once."""

from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from model.preprocess import CLIP_MEAN, CLIP_STD
from training.config import ConfigError
from training.world.rendering import render_scene
from training.world.scenes import Scene

_CHUNK_SIZE = 256  # scenes per task of a worker process


class SceneImages:
    """Rendered scenes, [count, S, S, 3] bytes, read from disk on demand."""

    def __init__(self, pixels: np.ndarray) -> None:
        self._pixels = pixels

    def __len__(self) -> int:
        return len(self._pixels)

    def pixel_values(self, indices: Sequence[int] | np.ndarray) -> Tensor:
        """Load normalised [B, 3, S, S] float32 images, equal to the output of `ImagePreprocessor`."""
        pixels = torch.from_numpy(self._pixels[indices]).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
        return (pixels - mean) / std


def cache_images(scenes: Sequence[Scene], image_size: int, path: Path) -> SceneImages:
    """Render all scenes into `path` (`.npy`) unless it exists, and open it.

    Raises ConfigError if the file holds other scenes, rendered by another version of the world.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        shape = (len(scenes), image_size, image_size, 3)
        pixels = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=shape)
        render = partial(_render, image_size=image_size)
        with _start_workers(len(scenes)) as pool:
            images = pool.map(render, scenes, chunksize=_CHUNK_SIZE) if pool else map(render, scenes)
            for index, image in enumerate(tqdm(images, desc="scenes", total=len(scenes), mininterval=5)):
                pixels[index] = image
        pixels.flush()
        unfinished.replace(path)
    pixels = np.load(path, mmap_mode="r")
    for index in (0, len(scenes) - 1):
        if not np.array_equal(pixels[index], _render(scenes[index], image_size)):
            raise ConfigError(f"{path}: scene {index} is drawn otherwise today; delete the file, and the run")
    return SceneImages(pixels)


def _start_workers(num_scenes: int) -> AbstractContextManager[ProcessPoolExecutor | None]:
    """Start a worker process for each core; none if rendering is shorter than the start."""
    if num_scenes <= 2 * _CHUNK_SIZE:
        return nullcontext()
    return ProcessPoolExecutor(mp_context=get_context("spawn"))


def _render(scene: Scene, image_size: int) -> np.ndarray:
    return np.asarray(render_scene(scene, image_size))
