"""The Prometheus series of the service, in a registry of their own. All exist from the first scrape."""

from collections.abc import Callable
from typing import Final

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)

from model import EmbeddingKind

ROUTES: Final = ("/caption", "/vqa", "/retrieve")
PROBES: Final = ("/livez", "/readyz", "/startupz", "/health", "/version", "/metrics")
OTHER_ROUTE: Final = "other"  # unknown paths are one series, or a scanner would make thousands
STAGES: Final = ("preprocess", "vision", "qformer", "decode", "match")
SHED_REASONS: Final = ("overloaded", "not_ready", "draining", "too_many_connections")
ABANDONED_REASONS: Final = ("deadline", "disconnected")

_STATUSES: Final = (
    "200", "400", "404", "405", "408", "413", "415", "422", "429", "431", "499", "500", "503", "504",
)  # fmt: skip
_SECONDS: Final = (*(0.001 * 2**power for power in range(16)), 60.0)  # geometric from 1 ms to 60 s
_RATIOS: Final = (0.0, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0)
_ROWS: Final = tuple(2**power for power in range(11))


class Metrics:
    """One instance a service. The counters and histograms may be used from any thread."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter("blip2_requests", "Answered requests", ["route", "status"], registry=registry)
        self.request_seconds = Histogram(
            "blip2_request_seconds",
            "From the first byte of a request to its answer",
            ["route"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.stage_seconds = Histogram(
            "blip2_stage_seconds",
            "Duration of each stage, as in timings_ms",
            ["stage"],
            buckets=_SECONDS,
            registry=registry,
        )
        self.queue_seconds = Histogram(
            "blip2_queue_seconds", "Time in the request queue", buckets=_SECONDS, registry=registry
        )
        self.batch_rows = Histogram(
            "blip2_batch_rows", "Rows of each batch", ["stage"], buckets=_ROWS, registry=registry
        )
        self.generated_tokens = Counter(
            "blip2_generated_tokens", "Tokens in answers, the end tokens included", registry=registry
        )
        self.shed = Counter(
            "blip2_shed", "Requests refused for the state of the service", ["reason"], registry=registry
        )
        self.abandoned = Counter(
            "blip2_abandoned", "Requests whose caller did not wait any more", ["reason"], registry=registry
        )
        self.cache_requests = Counter(
            "blip2_cache_requests", "Look-ups", ["tier", "kind", "result"], registry=registry
        )
        self.cache_writes = Counter(
            "blip2_cache_writes", "Embeddings given to Redis", ["result"], registry=registry
        )
        self.padding_waste = Histogram(
            "blip2_padding_waste_ratio",
            "Share of padding where prompts are prefilled together",
            buckets=_RATIOS,
            registry=registry,
        )
        self.device_seconds = Counter(
            "blip2_device_seconds", "Time the device worked for each stage", ["stage"], registry=registry
        )
        self.out_of_memory = Counter(
            "blip2_out_of_memory", "Batches the device's memory did not hold", ["stage"], registry=registry
        )
        self.upload_bytes = Gauge("blip2_upload_bytes", "Request bodies in flight", registry=registry)
        self._waiting = Gauge("blip2_waiting", "Items in the request queue", registry=registry)
        self._running = Gauge(
            "blip2_running", "Items taken from the queue and not answered", registry=registry
        )
        self._breaker_open = Gauge(
            "blip2_cache_breaker_open", "1 while the circuit breaker keeps Redis out", registry=registry
        )
        self._heartbeat_age = Gauge(
            "blip2_engine_heartbeat_age_seconds",
            "Time since the engine's last progress; 0 while idle",
            registry=registry,
        )
        self._device_memory = Gauge(
            "blip2_device_memory_bytes", "Device memory held by tensors; 0 on a CPU", registry=registry
        )
        self._model_info = Gauge(
            "blip2_model_info", "The model", ["name", "fingerprint", "device", "dtype"], registry=registry
        )
        self._create_series()

    def set_gauges(
        self,
        *,
        waiting: Callable[[], float],
        running: Callable[[], float],
        heartbeat_age_s: Callable[[], float],
        breaker_open: Callable[[], float],
        device_memory_bytes: Callable[[], float],
    ) -> None:
        """Set the functions that gauges read when they are scraped."""
        self._waiting.set_function(waiting)
        self._running.set_function(running)
        self._heartbeat_age.set_function(heartbeat_age_s)
        self._breaker_open.set_function(breaker_open)
        self._device_memory.set_function(device_memory_bytes)

    def set_model(self, *, name: str, fingerprint: str, device: str, dtype: str) -> None:
        self._model_info.labels(name, fingerprint, device, dtype).set(1)

    def observe_batch(self, stage: str, num_rows: int) -> None:
        self.batch_rows.labels(stage).observe(num_rows)

    def observe_padding(self, ratio: float) -> None:
        self.padding_waste.observe(ratio)

    def add_device_seconds(self, stage: str, seconds: float) -> None:
        self.device_seconds.labels(stage).inc(seconds)

    def count_out_of_memory(self, stage: str) -> None:
        self.out_of_memory.labels(stage).inc()

    def count_lookup(self, tier: str, kind: EmbeddingKind, result: str) -> None:
        self.cache_requests.labels(tier, kind.value, result).inc()

    def count_writes(self, result: str, num_values: int) -> None:
        self.cache_writes.labels(result).inc(num_values)

    def exposition(self) -> bytes:
        """Return the text that Prometheus scrapes."""
        return generate_latest(self.registry)

    def _create_series(self) -> None:
        for route in (*ROUTES, OTHER_ROUTE):
            self.request_seconds.labels(route)
            for status in _STATUSES:
                self.requests.labels(route, status)
        for stage in STAGES:
            self.stage_seconds.labels(stage)
        for stage in ("vision", "qformer", "decode", "match"):
            self.batch_rows.labels(stage)
        for stage in ("vision", "decode", "match"):
            self.device_seconds.labels(stage)
            self.out_of_memory.labels(stage)
        for reason in SHED_REASONS:
            self.shed.labels(reason)
        for reason in ABANDONED_REASONS:
            self.abandoned.labels(reason)
        for result in ("written", "refused", "error", "skipped", "dropped"):
            self.cache_writes.labels(result)
        for kind in EmbeddingKind:
            for tier, results in (
                ("memory", ("hit", "miss")),
                ("redis", ("hit", "miss", "error", "skipped")),
            ):
                for result in results:
                    self.cache_requests.labels(tier, kind.value, result)
