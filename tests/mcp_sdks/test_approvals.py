"""A call that a person is asked about, by each official SDK: those of 2026-07-28 retry until there is an answer."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.dev.processes import free_port
from ringfence.gateway.contract import DecisionCore
from ringfence.gateway.dataplane.plane import DataPlane, DataPlaneSettings
from ringfence.messages.operations import ActionDecided
from ringfence.messages.registry import BackendSettings, McpRule, RequestRule, VerbFloor
from ringfence.model.verdict import ALLOWED, Allowed
from tests.mcp_sdks.conftest import WITHIN_S, agent, serving
from tests.mcp_sdks.test_sdks import CLIENTS
from tests.support.switches import build_options
from tests.unit.test_gateway_mcp_approving import McpGateway


class Asking(McpGateway):
    """The gateway before a real server, of which a person has to approve `push`."""

    def __init__(self, port: int) -> None:
        super().__init__()
        backend = BackendSettings.model_validate({"kind": "jwt", "url": f"http://127.0.0.1:{port}"})

        def rule(method: str, verb: str, resource: str) -> RequestRule:
            return RequestRule(
                method="MCP", path="/mcp", mcp=McpRule(method=method), verb=verb, resource=resource
            )

        connects = ("server/discover", "initialize", "notifications/*", "tools/list")
        rules = (
            *(
                RequestRule(method=one, path="/mcp", verb="read", resource="env/x")
                for one in ("GET", "DELETE")
            ),
            *(rule(one, "read", "env/x") for one in connects),
            rule("tools/call", "deploy", "env/{arguments.repo}"),
        )
        verbs = (VerbFloor(verb="read"), VerbFloor(verb="deploy"))
        self.ledger.give(
            self.ledger.target_set("olga", "staging", backend=backend, requests=rules, verbs=verbs)
        )

    def view_expired(self) -> bool:
        return False

    def check_view(self) -> Allowed:
        return ALLOWED


@contextlib.asynccontextmanager
async def asking(port: int) -> AsyncIterator[tuple[Asking, str]]:
    gateway, listens = Asking(port), free_port()
    plane = DataPlane(
        DecisionCore(gateway.gate, lambda host: False),
        settings=DataPlaneSettings(**build_options("gateway")),
    )
    await plane.start()
    try:
        await plane.listen("127.0.0.1", listens, names=[f"localhost:{listens}"])
        yield gateway, f"http://localhost:{listens}/staging/mcp"
    finally:
        await plane.close()


@pytest.mark.parametrize("verdict", ["approved", "denied"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_gets_what_a_person_said(sdks: Path, client: str, verdict: str) -> None:
    program, mode, revision = CLIENTS[client]
    async with serving(sdks) as server, asking(server.port) as (gateway, url):
        call = asyncio.create_task(agent(sdks, program, url, mode, ["call", "push", {"repo": "a"}]))
        async with asyncio.timeout(WITHIN_S):
            await gateway.asked.wait()
            while not any(question.waiting for question in gateway.questions):
                assert not call.done(), call.result()
                await asyncio.sleep(0.01)
        decided: list[Any] = [*gateway.events]  # with what came of it
        pending = [one for one in decided if isinstance(one, ActionDecided) and not one.allowed]
        assert bool(pending) == (revision == "2026-07-28"), (
            "others are told nothing before there is an answer"
        )
        await gateway.said(gateway.claims(verdict=verdict))
        (said,) = await call
        if verdict == "approved":
            assert said["result"] == [False, "pushed"]
        else:
            assert (said["code"], said["data"]["code"]) == (403, "approval_denied")
        assert len(gateway.sent) == 1
    assert server.calls == (["push a"] if verdict == "approved" else [])


def test_all_revisions_are_tried() -> None:
    revisions: set[Any] = {revision for _, _, revision in CLIENTS.values()}
    assert revisions == {"2025-11-25", "2026-07-28"}
