"""Image preprocessing: from an image to the pixel values that a vision encoder was trained on.

image → resize_to_square → pixels, uint8 [S, S, 3] → normalise → pixel_values, float32 [3, S, S]
"""

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from model.images.resize import resize_to_square

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


class ImagePreprocessor:
    """Resizes images to a square, whatever their aspect ratio, and normalises them.

    Equal to `transformers`' BlipImageProcessor on its PIL backend, bit for bit. Thread-safe: no state.

    image_size: S. mean, std: of the red, green and blue channel, in units of the full range.
    """

    def __init__(
        self, image_size: int, mean: Sequence[float] = CLIP_MEAN, std: Sequence[float] = CLIP_STD
    ) -> None:
        self.image_size = image_size
        self.mean = tuple(mean)
        self.std = tuple(std)
        # A channel has 256 levels, so normalising is a look-up. The table is computed in the reference's
        # steps and precisions, because the last bit depends on them.
        levels = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
        means, stds = (np.array(values, dtype=np.float32)[:, None] for values in (self.mean, self.std))
        self._normalised = torch.from_numpy((levels - means) / stds)  # [3, 256]

    def has_equal_output(self, other: "ImagePreprocessor") -> bool:
        """Return whether both produce the same pixels of every image."""
        ours, theirs = ((each.image_size, each.mean, each.std) for each in (self, other))
        return ours == theirs

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the [3, S, S] float32 pixel values of an image of any mode; transparency becomes white."""
        pixels = np.array(resize_to_square(image, self.image_size))  # [S, S, 3]
        return self.normalise(torch.from_numpy(pixels)[None])[0]

    def normalise(self, pixels: Tensor) -> Tensor:
        """Convert [B, S, S, 3] uint8 pixels into [B, 3, S, S] float32 pixel values, on their device."""
        first_levels = 256 * torch.arange(3, device=pixels.device)[:, None, None]
        indices = pixels.permute(0, 3, 1, 2).long() + first_levels  # [B, 3, S, S]
        return torch.take(self._normalised.to(pixels.device), indices)
