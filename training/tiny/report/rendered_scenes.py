"""The scenes of gate results, rendered again from their seeds."""

import base64
import io
from dataclasses import dataclass
from functools import cache

from training.world.captions import listing_caption
from training.world.rendering import render_scene
from training.world.scenes import Scene, Split, sample_scene
from training.world.truth import identified_scenes

_JPEG_QUALITY = 90


@dataclass(frozen=True, slots=True)
class RenderedScene:
    """A scene as the `data:` URI of a JPEG file, with its listing."""

    uri: str
    text: str


class SceneRenderer:
    """A renderer of scenes at the model's `image_size` in pixels; each scene is rendered once."""

    def __init__(self, image_size: int) -> None:
        self._image_size = image_size
        self._render = cache(self._render_scene)
        self._identified_scenes = cache(identified_scenes)

    def scene(self, seed: int, split: Split, index: int) -> RenderedScene:
        """Render scene `index` of a split."""
        return self._render(sample_scene(seed, split, index))

    def gallery_scene(self, seed: int, split: Split, size: int, index: int) -> RenderedScene:
        """Render scene `index` of the retrieval gallery of `size` scenes."""
        return self._render(self._identified_scenes(seed, split, size)[index])

    def _render_scene(self, scene: Scene) -> RenderedScene:
        buffer = io.BytesIO()
        image = render_scene(scene, self._image_size)
        image.save(buffer, format="JPEG", quality=_JPEG_QUALITY, subsampling=0)
        content = base64.b64encode(buffer.getvalue()).decode()
        return RenderedScene(f"data:image/jpeg;base64,{content}", listing_caption(scene))
