"""One service of the default model for all attacks that only send requests."""

from collections.abc import Iterator

import pytest

from tests.integration.processes import ServiceProcess, service


@pytest.fixture(scope="session")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    with service(tmp_path_factory.mktemp("attacked")) as started:
        yield started
