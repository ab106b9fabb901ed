from pathlib import Path

import numpy as np
import pytest
import torch

from model.preprocess import ImagePreprocessor
from training.config import ConfigError
from training.world.pixels import cache_images
from training.world.rendering import render_scene
from training.world.scenes import iter_scenes


def test_pixel_values_are_what_the_service_makes_of_the_same_image(tmp_path: Path) -> None:
    scenes = list(iter_scenes(0, "train", 3))
    images = cache_images(scenes, 48, tmp_path / "scenes.npy")
    expected = torch.stack([ImagePreprocessor(48)(render_scene(scene, 48)) for scene in scenes])
    torch.testing.assert_close(images.pixel_values(np.arange(3)), expected)


def test_a_file_that_shows_other_scenes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "scenes.npy"
    cache_images(list(iter_scenes(0, "train", 3)), 48, path)
    with pytest.raises(ConfigError, match=r"scenes\.npy: scene 0 is drawn otherwise today"):
        cache_images(list(iter_scenes(1, "train", 3)), 48, path)
