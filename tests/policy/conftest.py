"""With `--opa`, everything here that can be asked of both engines is asked of a real OPA too."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringfence.rego.bundle import Bundle, load_bundle
from ringfence.rego.embedded import EmbeddedEngine
from ringfence.rego.engine import ACTION, CEILING, ISSUANCE, PolicyEngine
from ringfence.rego.opa import OpaEngine
from tests.conftest import needed
from tests.policy.opa_server import opa_binary, running_opa

# Else regorus looks up where in its own code it was, for each mutant that does not compile: a tenth of a second each.
os.environ["RUST_BACKTRACE"] = "0"

TIMEOUT_MS = 30_000
"""No test of what the bundle says may fail because the machine is busy."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without `--opa`, what needs it is deselected, and counted as such."""
    if config.getoption("--opa"):
        return
    without = [item for item in items if item.get_closest_marker("opa")]
    if without:
        config.hook.pytest_deselected(items=without)
        items[:] = [item for item in items if not item.get_closest_marker("opa")]


@pytest.fixture(scope="session")
def opa(request: pytest.FixtureRequest) -> Path:
    """The OPA that was asked for; where it cannot be had, the run fails."""
    with needed(request):
        return opa_binary(request.config.getoption("--opa"))


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return load_bundle()


@pytest.fixture(scope="session")
def opa_url(opa: Path, bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A server with the bundle that comes with Ringfence."""
    with running_opa(opa, tmp_path_factory.mktemp("opa"), bundle) as url:
        yield url


@dataclass(frozen=True)
class Engines:
    """One kind of engine, by entry point."""

    kind: str
    by_entry_point: dict[str, PolicyEngine]

    def __getitem__(self, entry_point: str) -> PolicyEngine:
        return self.by_entry_point[entry_point]


@pytest.fixture(scope="session", params=["embedded", pytest.param("opa", marks=pytest.mark.opa)])
async def engines(request: pytest.FixtureRequest, bundle: Bundle) -> AsyncIterator[Engines]:
    url = request.getfixturevalue("opa_url") if request.param == "opa" else None
    found: dict[str, PolicyEngine] = {}
    for entry_point in (ISSUANCE, ACTION, CEILING):
        if url is None:
            found[entry_point] = EmbeddedEngine(bundle, timeout_ms=TIMEOUT_MS, entry_point=entry_point)
        else:
            found[entry_point] = OpaEngine(url, bundle, timeout_ms=TIMEOUT_MS, entry_point=entry_point)
        await found[entry_point].start()
    yield Engines(request.param, found)
    for engine in found.values():
        await engine.close()
