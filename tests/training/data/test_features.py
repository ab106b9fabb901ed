from pathlib import Path

import numpy as np
import torch

from tests.training.miniature import miniature_config
from training.data.features import cache_features
from training.tiny.vision import build_encoder
from training.world.pixels import cache_images
from training.world.scenes import iter_scenes


def test_features_are_the_encoders_in_half_precision_and_are_kept(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = build_encoder(miniature_config(steps=1)).eval()
    images = cache_images(list(iter_scenes(0, "train", 5)), 48, tmp_path / "scenes.npy")
    features = cache_features(encoder, images, tmp_path / "features.npy", torch.device("cpu"))
    with torch.inference_mode():
        expected = encoder(images.pixel_values([3, 1])).half().float()
    torch.testing.assert_close(features.load([3, 1]), expected)
    assert len(features) == 5
    for parameter in encoder.parameters():
        torch.nn.init.zeros_(parameter)
    again = cache_features(encoder, images, tmp_path / "features.npy", torch.device("cpu"))
    torch.testing.assert_close(again.load(np.arange(5)), features.load(np.arange(5)))
