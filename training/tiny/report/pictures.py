"""The scenes that gates speak of, drawn again from their seeds."""

import base64
import io
from dataclasses import dataclass
from functools import cache

from training.world.captions import listing_caption
from training.world.gallery import identified_scenes
from training.world.scenes import Scene, Split, render_scene, sample_scene

_QUALITY = 90


@dataclass(frozen=True, slots=True)
class Picture:
    """A scene as a `data:` URI of a JPEG file, with what it shows in words."""

    uri: str
    text: str


class Album:
    """Draws each scene once, at the size the model reads it, `image_size` pixels square."""

    def __init__(self, image_size: int) -> None:
        self._image_size = image_size
        self._draw = cache(self._draw_scene)
        self._gallery = cache(identified_scenes)

    def scene(self, seed: int, split: Split, index: int) -> Picture:
        return self._draw(sample_scene(seed, split, index))

    def gallery_scene(self, seed: int, split: Split, size: int, index: int) -> Picture:
        """Scene `index` of the gallery of `size` scenes."""
        return self._draw(self._gallery(seed, split, size)[index])

    def _draw_scene(self, scene: Scene) -> Picture:
        buffer = io.BytesIO()
        render_scene(scene, self._image_size).save(buffer, format="JPEG", quality=_QUALITY, subsampling=0)
        content = base64.b64encode(buffer.getvalue()).decode()
        return Picture(f"data:image/jpeg;base64,{content}", listing_caption(scene))
