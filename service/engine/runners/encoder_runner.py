"""Runs the image encoder and the Q-Formers over a batch of images."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from model import EmbeddingKind
from service.engine.image_pool import ComputedEmbedding, EncodeBatch, EncodedImage
from service.engine.protocols import EngineMetrics, LocalEmbeddingCache
from service.model_backend import Backend


class EncoderRunner:
    """Computes what is missing of images, and keeps it in the in-process cache."""

    def __init__(self, backend: Backend, local_cache: LocalEmbeddingCache, metrics: EngineMetrics) -> None:
        self._backend = backend
        self._local_cache = local_cache
        self._metrics = metrics

    def run(self, images: Sequence[EncodedImage]) -> None:
        """Encode images of one encoder in one batch; their features stay until `release`."""
        batch = EncodeBatch(time.monotonic(), len(images))
        for image in images:
            image.batches.append(batch)
        without = [image for image in images if EmbeddingKind.IMAGE_FEATURES not in image.available]
        for image in without:
            if image.cached_features is not None:
                image.available[EmbeddingKind.IMAGE_FEATURES] = self._backend.to_device(image.cached_features)
        if unknown := [image for image in without if image.cached_features is None]:
            self._encode_features(unknown, batch)
        for kind in (EmbeddingKind.QUERY_OUTPUT, EmbeddingKind.IMAGE_EMBEDS):
            if lacking := [image for image in images if kind in image.missing]:
                self._encode_queries(lacking, kind)
        batch.qformer_s = time.monotonic() - batch.started - batch.vision_s

    def release(self, images: Sequence[EncodedImage]) -> None:
        """Free the features that no request needs of its pooled image."""
        for image in images:
            if EmbeddingKind.IMAGE_FEATURES not in image.required:
                image.available.pop(EmbeddingKind.IMAGE_FEATURES, None)

    def _encode_features(self, images: Sequence[EncodedImage], batch: EncodeBatch) -> None:
        pixels = torch.stack([_pixels_of(image) for image in images])  # [B, S, S, 3]
        image_features = self._backend.encode_images(self._backend.to_device(pixels), images[0].encoder)
        self._backend.synchronize()  # one sync per vision batch: its time is in every answer
        batch.vision_s = time.monotonic() - batch.started
        self._metrics.observe_batch("vision", len(images))
        for image, features in zip(images, image_features, strict=True):
            image.available[EmbeddingKind.IMAGE_FEATURES] = (
                features.clone()
            )  # a view would keep the batch alive
            if EmbeddingKind.IMAGE_FEATURES in image.required:
                self._keep(image, EmbeddingKind.IMAGE_FEATURES)

    def _encode_queries(self, images: Sequence[EncodedImage], kind: EmbeddingKind) -> None:
        image_features = torch.stack([image.available[EmbeddingKind.IMAGE_FEATURES] for image in images])
        encoded = self._backend.encode(kind, image_features)
        self._backend.synchronize()
        self._metrics.observe_batch("qformer", len(images))
        for image, tensor in zip(images, encoded, strict=True):
            image.available[kind] = tensor.clone()
            self._keep(image, kind)

    def _keep(self, image: EncodedImage, kind: EmbeddingKind) -> None:
        tensor = image.available[kind].to("cpu")
        self._local_cache.put(image.digest, kind, tensor, is_bulk=image.is_bulk)
        image.computed.append(ComputedEmbedding(image.digest, kind, tensor))


def _pixels_of(image: EncodedImage) -> Tensor:
    assert image.pixels is not None, "a request brought neither pixels nor embeddings"
    return image.pixels
