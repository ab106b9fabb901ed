"""What a loader gives: built parts, and what identifies them."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from model.parts import Blip2Parts


@dataclass(frozen=True, slots=True)
class LoadedParts:
    """sources: the text of all configurations, and what gives the hashes of all weight files."""

    parts: Blip2Parts
    sources: tuple[str | Callable[[], str], ...]

    def fingerprint(self) -> str:
        """Gives a sha256 that differs wherever the model may compute something else; a key for caches.

        Reads the weight files once more, unless an adapter had their hashes checked.
        """
        preprocess, language_model = self.parts.preprocess, self.parts.language_model
        pixels = f"{preprocess.image_size} {preprocess.mean} {preprocess.std}"
        types = f"{self.parts.vision_model.dtype} {language_model.dtype if language_model else None}"
        # Each source is hashed first, so that no two lists of sources read the same when joined.
        sources = (source if isinstance(source, str) else source() for source in self.sources)
        lines = [hashlib.sha256(source.encode()).hexdigest() for source in (*sources, pixels, types)]
        return hashlib.sha256("\n".join(lines).encode()).hexdigest()
