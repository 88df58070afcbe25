"""A task's limit at a language model, with all services running: spent at the gateway, and summed by audit."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

from ringfence.cli.commands.dev import client_settings
from ringfence.client.reports.read_api import ReadApi
from ringfence.dev.stack import Stack
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.messages.registry import BackendSettings, ModelLimits, ModelRule, RequestRule, VerbFloor
from tests.gateway.target import Target
from tests.gateway.test_model_usage import Server
from tests.support.stack import WITHIN_S, RunningStack

CHAT = {"model": "m-1", "messages": [{"role": "user", "content": "Hello"}]}
RULE = RequestRule(
    method="POST", path="/v1/chat/completions", verb="generate", resource="model/{model*}",
    model=ModelRule(api="openai"),
)  # fmt: skip


async def placed(realm: RunningStack, server: Target, limits: ModelLimits) -> str:
    """The id of a task with these limits, at a target whose models `server` has."""
    scope = [Permission(target=realm.target, verbs=("generate",), resources=("model/m-1",))]
    async with realm.as_operator() as olga:
        for who in ("sam", "maria"):
            await olga.set_user(
                realm.name(who), name=who, roles=["sponsor"] if who == "sam" else [],
                keys=[realm.key("user", realm.name(who))], entitlements=scope,
            )  # fmt: skip
        backend = {"kind": "jwt", "url": f"http://127.0.0.1:{server.port}"}
        await olga.set_target(
            realm.target, description="models", backend=BackendSettings.model_validate(backend),
            verbs=[VerbFloor(verb="generate")], requests=[RULE], keys=[],
        )  # fmt: skip
    async with realm.administrator("sam") as sam:
        key = realm.key("agent", realm.agent)
        await sam.register_agent(realm.agent, description="a bot", keys=[key], ceiling=scope)
    async with realm.administrator("maria") as maria:
        return await maria.assign_task(
            realm.agent, purpose="a test", scope=scope, ends_in_s=3600, limits=limits
        )


async def test_limit_is_spent_at_the_gateway_and_usage_is_summed_by_audit(stack: Stack) -> None:
    realm, server = RunningStack(stack, client_settings(stack.environment())), Server()
    async with server.serving():
        task = await placed(realm, server, ModelLimits(tokens=10_000, requests=1))
        socket = realm.stack.sockets / f"{task}.sock"
        async with realm.as_agent() as agent:
            await agent.request(
                task=task, target=realm.target, verbs=["generate"], resources=["model/m-1"], reason="to use",
                delivery="gateway", timeout_s=WITHIN_S,
            )  # fmt: skip
        url = f"http://gateway/{realm.target}/v1/chat/completions"

        async def post(http: httpx.AsyncClient) -> httpx.Response:
            return await http.post(url, json=CHAT)

        async with asyncio.timeout(WITHIN_S):
            while not socket.exists():
                await asyncio.sleep(0.02)
            transport = httpx.AsyncHTTPTransport(uds=str(socket))
            async with httpx.AsyncClient(transport=transport, timeout=WITHIN_S) as http:
                while (first := await post(http)).status_code == 403 and first.json()["code"] == "no_lease":
                    await asyncio.sleep(0.02)
                assert first.status_code == 200, first.text
                second = await post(http)
        assert (second.status_code, second.json()["code"]) == (403, "budget_spent")
        assert len(server.requests) == 1
        group = await summed(realm, task)
        assert (group["agent"], group["model"], group["requests"], group["tokens"]) == (
            realm.agent, "m-1", 1, 730,
        )  # fmt: skip


async def summed(realm: RunningStack, task: str) -> dict[str, Any]:
    """What audit sums of the task, once it has read the answer."""
    olga = SigningKey.load(realm.stack.trust.user_key(realm.stack.options.operator))
    async with asyncio.timeout(WITHIN_S), ReadApi(olga, realm.settings) as api:
        while not (groups := (await api.model_usage(since_ms=0, task=task))["groups"]):
            await asyncio.sleep(0.05)
    (group,) = groups
    return dict(group)
