"""Puts desk, cache, line and engine together around a loaded model."""

from dataclasses import dataclass

import torch

from service.api.response_builder import Replies
from service.cache import EmbeddingCache, MemoryCache
from service.cache.breaker import CircuitBreaker
from service.cache.redis_store import open_redis
from service.cache.redis_tier import RedisTier
from service.engine.engine import Engine
from service.engine.request_queue import Line, ServiceRate
from service.image_decoding import PREPROCESS_VERSION, ImageDesk
from service.inference import Inference
from service.model_backend import Backend
from service.runtime.metrics import Metrics
from service.runtime.settings import Settings

_ENGINE_STOP_S = 5.0
_REDIS_CLOSE_S = 2.0


@dataclass(frozen=True, slots=True)
class Parts:
    """All that serves, once a model is loaded."""

    backend: Backend
    desk: ImageDesk
    redis: RedisTier | None
    line: Line
    engine: Engine
    inference: Inference
    replies: Replies

    def stop_engine(self) -> None:
        """Blocks until the present turn is over, but for five seconds at most."""
        self.engine.stop(_ENGINE_STOP_S)

    async def aclose(self) -> None:
        """Lets go of threads and connections, the engine's aside."""
        self.desk.close()
        if self.redis is not None:
            await self.redis.aclose(_REDIS_CLOSE_S)


def assemble(settings: Settings, backend: Backend, metrics: Metrics) -> Parts:
    """Builds the parts; the engine is not started yet. To be called on the event loop."""
    desk = ImageDesk(
        backend.preprocess,
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        num_threads=settings.preprocess_threads,
    )
    memory, redis = MemoryCache(settings.cache_bytes), _open_redis(settings, metrics)
    cache = EmbeddingCache(
        memory,
        redis,
        fingerprint=backend.fingerprint,
        preprocess_version=PREPROCESS_VERSION,
        count=metrics.count_lookup,
    )
    rate = ServiceRate()
    line = Line(settings.max_waiting, rate)
    engine = Engine(backend, line, memory, rate=rate, max_rows=settings.max_rows, meter=metrics)
    metrics.set_model(
        name=backend.name, fingerprint=backend.fingerprint, device=backend.device, dtype=backend.dtype
    )
    metrics.watch(
        waiting=lambda: line.num_items,
        running=lambda: engine.num_running,
        heartbeat_age_s=engine.heartbeat_age_s,
        breaker_open=lambda: redis is not None and redis.breaker_open,
        device_memory_bytes=lambda: _device_memory_bytes(backend.device),
    )
    inference = Inference(backend, desk, cache, line)
    replies = Replies(backend, metrics)
    return Parts(backend, desk, redis, line, engine, inference, replies)


def _open_redis(settings: Settings, metrics: Metrics) -> RedisTier | None:
    if settings.redis_url is None:
        return None
    store = open_redis(settings.redis_url.get_secret_value())
    return RedisTier(store, CircuitBreaker(), ttl_s=settings.redis_ttl_s, count_writes=metrics.count_writes)


def _device_memory_bytes(device: str) -> int:
    return torch.cuda.memory_allocated(device) if device.startswith("cuda") else 0
