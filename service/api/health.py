"""Probes, version and metrics. None of them waits for the device."""

from importlib.metadata import version

from fastapi import APIRouter, Response
from fastapi.routing import APIRoute
from prometheus_client import CONTENT_TYPE_LATEST

from service.api.openapi import problem_responses
from service.api.responses import ProbeResponse, VersionResponse
from service.runtime.metrics import Metrics
from service.runtime.readiness import Readiness, tasks_of

DISTRIBUTION = "blip2-server"


class HealthRoutes:
    """Each failing probe answers 503 with a problem that names the reason."""

    def __init__(self, readiness: Readiness, metrics: Metrics) -> None:
        self._readiness = readiness
        self._metrics = metrics

    def router(self) -> APIRouter:
        router = APIRouter(tags=["operations"])
        for path, probe, operation_id in (
            ("/livez", self.livez, "livez"),
            ("/readyz", self.readyz, "readyz"),
            ("/startupz", self.startupz, "startupz"),
            ("/health", self.readyz, "health"),
        ):
            router.add_api_route(
                path,
                probe,
                operation_id=operation_id,
                response_model=ProbeResponse,
                responses=problem_responses(400, 431, 503),
            )
        router.add_api_route(
            "/version",
            self.version,
            operation_id="version",
            response_model=VersionResponse,
            responses=problem_responses(400, 431),
        )
        router.add_api_route(
            "/metrics",
            self.metrics,
            operation_id="metrics",
            response_class=Response,
            responses={200: {"content": {"text/plain": {}}}, **problem_responses(400, 431)},
        )
        for route in list(router.routes):
            assert isinstance(route, APIRoute)
            router.add_api_route(route.path, route.endpoint, methods=["HEAD"], include_in_schema=False)
        return router

    async def livez(self) -> ProbeResponse:
        """Check that the engine makes progress, or has nothing to do. If not, restart the process."""
        self._readiness.check_alive()
        return ProbeResponse()

    async def readyz(self) -> ProbeResponse:
        """Check that requests are served: the weights are loaded and warm, and nothing is draining."""
        self._readiness.check_ready()
        return ProbeResponse()

    async def startupz(self) -> ProbeResponse:
        """Check that the weights are loaded and warm."""
        self._readiness.check_started()
        return ProbeResponse()

    async def version(self) -> VersionResponse:
        """Return the versions of service and model."""
        backend = self._readiness.backend
        if backend is None:
            return VersionResponse(version=version(DISTRIBUTION))
        return VersionResponse(
            version=version(DISTRIBUTION),
            model=backend.name,
            retrieval_model=backend.matching_name if backend.can_match else None,
            fingerprint=backend.fingerprint,
            device=backend.device,
            dtype=backend.dtype,
            tasks=tasks_of(backend),
        )

    async def metrics(self) -> Response:
        """Return counters, gauges and histograms, as Prometheus reads them."""
        return Response(self._metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
