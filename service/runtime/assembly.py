"""Assembly of image decoder, cache, request queue and engine around a loaded model."""

from dataclasses import dataclass

import torch

from service.cache.breaker import CircuitBreaker
from service.cache.embedding_cache import EmbeddingCache
from service.cache.lru import LruTier
from service.cache.redis_store import open_redis
from service.cache.redis_tier import RedisTier
from service.engine.engine import Engine
from service.engine.request_queue import RequestQueue, Throughput
from service.image_decoding import PREPROCESS_VERSION, ImageDecoder
from service.inference import Inference
from service.model_backend import Backend
from service.runtime.metrics import Metrics
from service.runtime.settings import Settings

_ENGINE_STOP_S = 5.0
_REDIS_CLOSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Service:
    """The parts that serve requests with a loaded model."""

    backend: Backend
    image_decoder: ImageDecoder
    redis: RedisTier | None
    queue: RequestQueue
    engine: Engine
    inference: Inference

    def stop_engine(self) -> None:
        """Block until the present step is over, but for five seconds at most."""
        self.engine.stop(_ENGINE_STOP_S)

    async def aclose(self) -> None:
        """Close connections; the processes that decode end with the event loop."""
        if self.redis is not None:
            await self.redis.aclose(_REDIS_CLOSE_S)


def assemble(settings: Settings, backend: Backend, metrics: Metrics) -> Service:
    """Build the service; the engine is not started yet. To be called on the event loop."""
    image_decoder = ImageDecoder(
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        num_processes=settings.preprocess_threads,
        max_decode_bytes=settings.decode_bytes,
        max_cpu_s=settings.decode_timeout_ms / 1000,
    )
    memory, redis = LruTier(settings.cache_bytes), _open_redis(settings, metrics)
    cache = EmbeddingCache(
        memory,
        redis,
        fingerprint=backend.fingerprint,
        preprocess_version=PREPROCESS_VERSION,
        expected=backend.empty_embedding,
        count=metrics.count_lookup,
    )
    throughput = Throughput()
    queue = RequestQueue(settings.max_waiting, throughput, max_bytes=settings.max_waiting_bytes)
    engine = Engine(
        backend,
        queue,
        memory,
        throughput=throughput,
        metrics=metrics,
        max_rows=settings.max_rows,
        max_kv_bytes=settings.kv_bytes_on(backend.device),
    )
    _register_gauges(metrics, backend, queue, engine, redis)
    inference = Inference(
        backend,
        image_decoder,
        cache,
        queue,
        observe_queue_s=metrics.queue_seconds.observe,
    )
    return Service(backend, image_decoder, redis, queue, engine, inference)


def _open_redis(settings: Settings, metrics: Metrics) -> RedisTier | None:
    if settings.redis_url is None:
        return None
    store = open_redis(settings.redis_url.get_secret_value())
    return RedisTier(store, CircuitBreaker(), ttl_s=settings.redis_ttl_s, count_writes=metrics.count_writes)


def _register_gauges(
    metrics: Metrics, backend: Backend, queue: RequestQueue, engine: Engine, redis: RedisTier | None
) -> None:
    metrics.set_model(
        name=backend.name, fingerprint=backend.fingerprint, device=backend.device, dtype=backend.dtype
    )
    metrics.set_gauges(
        waiting=lambda: queue.num_items,
        running=lambda: engine.num_running,
        heartbeat_age_s=engine.heartbeat_age_s,
        breaker_open=lambda: redis is not None and redis.breaker_open,
        device_memory_bytes=lambda: _device_memory_bytes(backend.device),
    )


def _device_memory_bytes(device: str) -> int:
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0
