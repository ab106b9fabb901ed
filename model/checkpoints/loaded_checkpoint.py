"""What a loader gives: built parts, and what identifies them."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from model.components import Blip2Parts

Source = str | Callable[[], str]


@dataclass(frozen=True, slots=True)
class LoadedParts:
    """sources: the text of all configurations, and what gives the hashes of all weight files."""

    parts: Blip2Parts
    sources: tuple[Source, ...]

    def identify(self) -> Callable[[], str]:
        """Gives what gives a sha256 that differs wherever the model may compute something else; for caches.

        That reads the weight files once more, unless an adapter had their hashes checked. It does not hold on
        to the parts, which may be shared or dropped afterwards.
        """
        preprocess, language_model = self.parts.preprocess, self.parts.language_model
        pixels = f"{preprocess.image_size} {preprocess.mean} {preprocess.std}"
        types = f"{self.parts.vision_model.dtype} {language_model.dtype if language_model else None}"
        return partial(_hash_sources, (*self.sources, pixels, types))


def _hash_sources(sources: Sequence[Source]) -> str:
    """Each source is hashed first, so that no two lists of sources read the same when joined."""
    texts = (source if isinstance(source, str) else source() for source in sources)
    lines = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
