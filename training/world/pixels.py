"""The pixels of a set of scenes, drawn once and kept on disk."""

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
from training.world.scenes import Scene, render_scene

_CHUNK = 256  # scenes that a process draws at a time


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
    """Draws all scenes into `path` (`.npy`), unless it is there already.

    Raises ConfigError where the file there shows other scenes: drawn by another version of the world.
    """
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".partial")
        shape = (len(scenes), image_size, image_size, 3)
        pixels = np.lib.format.open_memmap(unfinished, mode="w+", dtype=np.uint8, shape=shape)
        draw = partial(_draw, image_size=image_size)
        with _start_workers(len(scenes)) as pool:
            drawn = pool.map(draw, scenes, chunksize=_CHUNK) if pool else map(draw, scenes)
            for index, image in enumerate(tqdm(drawn, desc="scenes", total=len(scenes), mininterval=5)):
                pixels[index] = image
        pixels.flush()
        unfinished.replace(path)
    pixels = np.load(path, mmap_mode="r")
    for index in (0, len(scenes) - 1):
        if not np.array_equal(pixels[index], _draw(scenes[index], image_size)):
            raise ConfigError(f"{path}: scene {index} is drawn otherwise today; delete the file, and the run")
    return SceneImages(pixels)


def _start_workers(num_scenes: int) -> AbstractContextManager[ProcessPoolExecutor | None]:
    """A process for each core, or none where starting them takes longer than drawing."""
    if num_scenes <= 2 * _CHUNK:
        return nullcontext()
    return ProcessPoolExecutor(mp_context=get_context("spawn"))


def _draw(scene: Scene, image_size: int) -> np.ndarray:
    return np.asarray(render_scene(scene, image_size))
