"""The API server of the suite. What cannot start fails the run."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import needed
from tests.support.servers.kubernetes import ApiServer, running_api_server


@pytest.fixture(scope="session")
def api_server(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ApiServer]:
    """One for the whole run; give namespaces names of their own."""
    with needed(request), running_api_server(tmp_path_factory.mktemp("kubernetes")) as server:
        yield server
