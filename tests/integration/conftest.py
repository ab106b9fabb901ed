"""One service for all tests that only send requests, and one redis-server."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.integration.processes import RedisProcess, ServiceProcess, redis_server, service


@pytest.fixture(scope="session")
def server(random_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with service(tmp_path_factory.mktemp("service"), model=random_checkpoint) as started:
        yield started


@pytest.fixture
def client(server: ServiceProcess) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as made:
        yield made


@pytest.fixture(scope="session")
def redis() -> Iterator[RedisProcess]:
    with redis_server() as started:
        yield started
