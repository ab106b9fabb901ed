"""The pool that deduplicates the images of running requests."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from weakref import WeakValueDictionary

from torch import Tensor

from model import EmbeddingKind
from service.engine.protocols import LocalEmbeddingCache
from service.model_backend import Backend, EncoderId


@dataclass(frozen=True, slots=True, eq=False)
class ImageInput:
    """One image on its way to the device.

    digest: SHA-256 of the file, with a suffix unless the main encoder reads it; names the image's embeddings.
    pixels: uint8 [S, S, 3], or None where the cached `embeddings` suffice without the image encoder.
    """

    digest: str
    pixels: Tensor | None
    embeddings: Mapping[EmbeddingKind, Tensor]
    encoder: EncoderId = EncoderId.MAIN

    @property
    def num_bytes(self) -> int:
        """Number of bytes of its pixels."""
        return 0 if self.pixels is None else self.pixels.nbytes


@dataclass(frozen=True, slots=True, eq=False)
class ComputedEmbedding:
    """An embedding computed for a request, on the CPU, that Redis does not hold yet."""

    digest: str
    kind: EmbeddingKind
    tensor: Tensor


@dataclass(slots=True, eq=False)
class EncodeBatch:
    """One pass over several images: its start on the monotonic clock, and its duration in each model."""

    started: float
    num_images: int
    vision_s: float = 0.0
    qformer_s: float = 0.0


@dataclass(slots=True, eq=False, weakref_slot=True)
class EncodedImage:
    """An image on the device, shared by all running requests that brought it.

    required: what those requests need of it. available: what is known of it, on the device. cached_features:
    [P, V] on the CPU, to compute the rest from. is_bulk: only requests of many images brought it.
    computed: what was computed and not yet handed to Redis.
    """

    digest: str
    encoder: EncoderId
    pixels: Tensor | None = None
    cached_features: Tensor | None = None
    is_bulk: bool = True
    required: set[EmbeddingKind] = field(default_factory=set)
    available: dict[EmbeddingKind, Tensor] = field(default_factory=dict)
    computed: list[ComputedEmbedding] = field(default_factory=list)
    batches: list[EncodeBatch] = field(default_factory=list)
    error: Exception | None = None

    @property
    def missing(self) -> set[EmbeddingKind]:
        return self.required - self.available.keys()

    @property
    def is_pending(self) -> bool:
        """Whether it is still to be encoded."""
        return self.error is None and bool(self.missing)

    def satisfies(self, required: frozenset[EmbeddingKind]) -> bool:
        return required <= self.available.keys()

    def needs_encoder(self, required: frozenset[EmbeddingKind]) -> bool:
        """Whether the image encoder must run before a request that requires these can go on."""
        has_features = EmbeddingKind.IMAGE_FEATURES in self.available or self.cached_features is not None
        return not (self.satisfies(required) or has_features)

    def fail(self, error: Exception) -> None:
        self.error = error

    def drain_computed(self) -> list[ComputedEmbedding]:
        """Return what was computed since the last call, so that it is written to Redis once."""
        computed, self.computed = self.computed, []
        return computed


class ImagePool:
    """Merges equal images in flight. An image stays in the pool as long as a running request holds it."""

    def __init__(self, backend: Backend, local_cache: LocalEmbeddingCache) -> None:
        self._backend = backend
        self._local_cache = local_cache
        self._images: WeakValueDictionary[str, EncodedImage] = WeakValueDictionary()

    def __len__(self) -> int:
        return len(self._images)

    def acquire(
        self, image: ImageInput, required: frozenset[EmbeddingKind], *, is_bulk: bool = False
    ) -> EncodedImage:
        """Return the pooled image, with every required embedding that is known already on the device."""
        pooled = self._images.get(image.digest)
        if pooled is None or pooled.error is not None:
            pooled = self._images[image.digest] = EncodedImage(image.digest, image.encoder)
        pooled.required |= required
        pooled.is_bulk = pooled.is_bulk and is_bulk
        if pooled.pixels is None:
            pooled.pixels = image.pixels
        if pooled.cached_features is None:
            pooled.cached_features = image.embeddings.get(EmbeddingKind.IMAGE_FEATURES)
        for kind in pooled.missing:
            # Once more from memory: it may have been computed since the event loop looked.
            known = image.embeddings.get(kind)
            if known is None:
                known = self._local_cache.get(image.digest, kind, is_bulk=is_bulk)
            if known is not None:
                pooled.available[kind] = self._backend.to_device(known)
        return pooled
