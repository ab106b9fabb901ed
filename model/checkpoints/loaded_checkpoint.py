"""A loaded checkpoint: its components, and the sources of its fingerprint."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from model.components import Blip2Components

Source = str | Callable[[], str]


@dataclass(frozen=True, slots=True)
class LoadedCheckpoint:
    """sources: the text of all configurations, and functions that compute the hashes of all weight files."""

    components: Blip2Components
    sources: tuple[Source, ...]

    def fingerprint_function(self) -> Callable[[], str]:
        """Return a function that computes the model fingerprint, a sha256.

        Two models with equal fingerprints compute equal results, so caches may use it as a key. The function
        reads the weight files again, unless an adapter had their hashes checked. It holds no reference to the
        components, which may be shared or dropped afterwards.
        """
        preprocess, language_model = self.components.preprocess, self.components.language_model
        pixels = f"{preprocess.image_size} {preprocess.mean} {preprocess.std}"
        vision_dtype = self.components.vision_model.dtype
        types = f"{vision_dtype} {language_model.dtype if language_model else None}"
        return partial(_hash_sources, (*self.sources, pixels, types))


def _hash_sources(sources: Sequence[Source]) -> str:
    """Hash each source first, so that different lists of sources are never equal when joined."""
    texts = (source if isinstance(source, str) else source() for source in sources)
    hashes = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    return hashlib.sha256("\n".join(hashes).encode()).hexdigest()
