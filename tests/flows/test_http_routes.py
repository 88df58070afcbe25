"""No service has a route that its OpenAPI document does not name, and no document a route that is not there."""

from __future__ import annotations

import importlib
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest
from starlette.routing import BaseRoute, Route

from ringfence.console.http import Site
from ringfence.kernel.service.bearer_tokens import new_token
from ringfence.kernel.service.http import application
from ringfence.messages.base import ServiceRole
from ringfence.scim.settings import ScimSettings
from ringfence.signals.settings import SignalsSettings
from tests.conftest import Kafka
from tests.support.openapi import Document
from tests.support.world import World

ROLES: tuple[ServiceRole, ...] = (
    "registry", "policy", "issuer", "revoker", "audit", "gateway", "scim", "signals",
)  # fmt: skip
ANYTHING_ELSE = "/scim/v2/{rest:path}"
"""The route that answers 404 in SCIM's own words."""


def served(routes: Iterable[BaseRoute]) -> set[tuple[str, str]]:
    """Method and path of each route; HEAD comes with GET."""
    found = set()
    for route in routes:
        assert isinstance(route, Route)
        for method in route.methods or {"GET"}:
            if method != "HEAD" and route.path != ANYTHING_ELSE:
                found.add((method, route.path))
    return found


def documented(name: str) -> set[tuple[str, str]]:
    pairs = (operation.partition(" ") for operation in Document(name).operations())
    return {(method, path) for method, _, path in pairs}


@pytest.fixture(scope="module")
async def world(kafka: Kafka) -> AsyncIterator[World]:
    async with World.open(kafka.bootstrap, paced=kafka.embedded) as world:
        yield world


def own_settings(role: ServiceRole, world: World, folder: Path) -> Any:
    """Settings that a role cannot do without."""
    if role in ("scim", "signals"):
        world.party("user", "acme").key.save(folder / "acme.json")
        _, line = new_token("acme")
        (folder / "tokens").write_text(f"{line}\n")
        (folder / "tokens").chmod(0o600)
        (folder / "receivers.toml").write_text(
            '[[receiver]]\nname = "acme"\naudience = "https://acme.example"\ntargets = ["*"]\n'
        )
    if role == "signals":
        return SignalsSettings(receivers=folder / "receivers.toml", tokens=folder / "tokens")
    if role == "scim":
        return ScimSettings(provisioner=folder / "acme.json", tokens=folder / "tokens")
    return None


@pytest.mark.parametrize("role", ROLES)
def test_routes_are_those_of_the_document(world: World, role: ServiceRole, tmp_path: Path) -> None:
    build = importlib.import_module(f"ringfence.{role}.app").build
    runtime = build(world.settings(role), own_settings(role, world, tmp_path), None)
    found = served(application(runtime.routes, ()).routes)
    wanted = documented(role)
    if role == "scim":
        # One route answers all methods of a path, those that mean nothing there with 405.
        assert {path for _, path in found} == {path for _, path in wanted}
        assert wanted <= found
    else:
        assert found == wanted


def test_routes_of_the_console_are_those_of_the_document() -> None:
    console: Any = None
    assert served(Site(console).application().routes) == documented("console")


def test_a_route_more_or_less_would_be_found() -> None:
    async def nothing(_: object) -> Any: ...

    more = Route("/v1/secrets", nothing)
    assert served([more]) == {("GET", "/v1/secrets")}
    assert not served([more]) & documented("registry")
