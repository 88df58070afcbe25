"""The gateway's decisions, end to end: what a proxy is told about the requests of agents."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.messages.lease import RevocationAck, Selector
from ringfence.messages.registry import AgentSuspend, TaskEnd
from ringfence.messages.topics import ACTION, REVOCATION_ACK, REVOCATION_REQUEST
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.audit_stories import is_told
from tests.support.benches.gateway_flows import (
    HUB,
    PARTNER,
    Proxy,
    action,
    gateway,
    handle,
    hub,
    leased,
    secret_in,
)
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.world import World

A = f"https://{HUB}/a/x"


DID = {
    "GET": "Read",
    "HEAD": "Read",
    "POST": "Create",
    "PUT": "Update",
    "PATCH": "Update",
    "DELETE": "Delete",
}


@pytest.fixture(scope="module")
async def office(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[tuple[IssuerBench, Proxy, Path]]:
    """Registry, issuer, revoker and a gateway, once for all tests here."""
    folder = tmp_path_factory.mktemp("secrets")
    place = secret_in(folder, "first-secret")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RINGFENCE_BACKENDS_ACCESS", json.dumps({"partner": place}))
        async with (
            World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
            opened_desks(world) as first,
            world.running("issuer", "revoker"),
            gateway(world) as proxy,
        ):
            await hub(await another(first))
            await hub(await another(first), "partner", "http", PARTNER, auth="header", header="X-Api-Key")
            yield first, proxy, Path(place.removeprefix("file:"))


@pytest.fixture
def proxy(office: tuple[IssuerBench, Proxy, Path]) -> Proxy:
    return office[1]


@pytest.fixture
async def desk(office: tuple[IssuerBench, Proxy, Path]) -> IssuerBench:
    """An agent and a task of the test's own."""
    return await own(office[0])


async def own(first: IssuerBench, target: str = "hub") -> IssuerBench:
    desk = await another(first)
    wide = (desk.scope("read")[0].model_copy(update={
        "target": target, "verbs": ("read", "write"), "resources": ("path/**",),
    }),)  # fmt: skip
    user = await desk.world.user(f"u-{desk.bot.name}", entitlements=wide)
    desk.bot = await desk.world.agent(f"{desk.bot.name}-h", sponsor=desk.sam, ceiling=wide)
    desk.task = await desk.world.task(desk.bot, by=user, scope=wide)
    return desk


async def until_allowed(desk: IssuerBench, proxy: Proxy, lease: str, url: str = A) -> dict[str, str]:
    """The lease is on its way to the gateway when the agent has its handle: at most a moment."""
    async with asyncio.timeout(60):
        while True:
            answer = await proxy.as_agent(desk.bot.key, lease, "GET", url)
            if answer.status_code == 200:
                return dict(answer.headers)
            await asyncio.sleep(0.02)


async def test_in_scope_goes_on_with_the_credential_that_the_agent_never_had(
    desk: IssuerBench, proxy: Proxy
) -> None:
    asked, content = await leased(desk, "read")
    assert content.credential is None
    headers = await until_allowed(desk, proxy, asked.lease_id)
    scheme, _, token = headers["authorization"].partition(" ")
    assert scheme == "Bearer"
    assert token.count(".") == 2
    event = await action(desk.world, lease_id=asked.lease_id, allowed=True)
    assert (event.agent_id, event.task_id, event.target_id) == (desk.bot.name, desk.task, "hub")
    assert (event.verb, event.resource, event.access, event.method) == ("read", "path/a/x", "read", "GET")
    assert event.gateway == desk.world.key("gateway").id
    assert token.encode() not in b"".join(r.value for r in await desk.world.records(ACTION))


@pytest.mark.parametrize(
    ("method", "url", "code", "side"),
    [
        ("GET", f"https://{HUB}/b/x", "beyond_lease", "lease"),
        ("PUT", A, "beyond_lease", "lease"),
        ("PUT", f"https://{HUB}/.ci/run.yml", "beyond_scope", "task"),
        ("DELETE", A, "request_unmapped", None),
        ("GET", f"https://{HUB}/a/b%2fc", "request_unmapped", None),
        ("GET", f"https://{HUB}:444/a/x", "target_unknown", None),
        ("GET", "https://elsewhere.example/a/x", "target_unknown", None),
    ],
)
async def test_out_of_scope_is_blocked_and_reported(
    desk: IssuerBench, proxy: Proxy, method: str, url: str, code: str, side: str | None
) -> None:
    lease = await handle(desk, "read")
    await until_allowed(desk, proxy, lease)
    answer = await proxy.as_agent(desk.bot.key, lease, method, url)
    assert answer.status_code == 403
    assert answer.headers["content-type"] == "application/problem+json"
    assert "authorization" not in answer.headers
    problem = answer.json()
    assert problem["code"] == code, problem
    assert problem.get("side") == side
    event = await action(desk.world, agent_id=desk.bot.name, allowed=False)
    assert event.reasons[0].code == code
    assert event.access == ("read" if method == "GET" else "write")
    assert problem["instance"] == f"urn:uuid:{event.action_id}"
    every = f"{code} {side}" if side else code
    user = f"u-{desk.bot.name.removesuffix('-h')}"
    if code == "beyond_scope":  # nobody allows it
        every += ", beyond_scope ceiling:bot, beyond_scope entitlements:user, beyond_lease lease"
    said = f"6003 {DID[method]}: Failure/Denied action.denied [{every}] by bot"
    await is_told(desk.world, said, {"action": event.action_id}, bot=desk.bot.name, user=user)


async def test_denial_names_the_command_that_asks_for_the_missing_permission(
    desk: IssuerBench, proxy: Proxy
) -> None:
    lease = await handle(desk, "read")
    await until_allowed(desk, proxy, lease)
    problem = (await proxy.as_agent(desk.bot.key, lease, "GET", f"https://{HUB}/b/x")).json()
    assert problem["permission"] == {"target": "hub", "verbs": ["read"], "resources": ["path/b/x"]}
    assert problem["ask"] == (
        f"ringfence request --task {desk.task} --delivery gateway --allow hub:read:path/b/x --reason WHY"
    )


async def test_a_stolen_handle_is_refused_and_attributed(
    desk: IssuerBench, proxy: Proxy, office: tuple[IssuerBench, Proxy, Path]
) -> None:
    lease = await handle(desk, "read")
    await until_allowed(desk, proxy, lease)
    thief = await own(office[0])
    answer = await proxy.as_agent(thief.bot.key, lease, "GET", A)
    assert answer.status_code == 403
    assert answer.json()["code"] == "handle_other_agent"
    event = await action(desk.world, agent_id=thief.bot.name)
    assert (event.allowed, event.lease_id) == (False, lease)
    assert desk.bot.name in event.reasons[0].message
    said = "6003 Read: Failure/Denied action.by_another [handle_other_agent] by thief"
    await is_told(desk.world, said, {"agent": thief.bot.name, "lease": lease}, thief=thief.bot.name)

    for authorization, dpop, code in (
        (f"DPoP {lease}", None, "proof_missing"),
        (f"Bearer {lease}", None, "no_credentials"),
        (f"DPoP {lease}", "a.b.c", "invalid_dpop_proof"),
    ):
        bare = await proxy.ask("GET", A, authorization=authorization, dpop=dpop)
        assert (bare.status_code, bare.json()["code"]) == (401, code)
    stranger = desk.world.party("agent", desk.bot.name)
    answer = await proxy.as_agent(stranger.key, lease, "GET", A)
    assert (answer.status_code, answer.json()["code"]) == (401, "proof_by_stranger")
    told = await action(desk.world, agent_id=None, lease_id=lease, allowed=False)
    assert told.reasons[0].code == "proof_missing", "the first of those that nobody sent"


@pytest.mark.parametrize("how", ["suspend", "end of the task", "selector", "release"])
async def test_a_cut_counts_from_the_gateways_word_on(desk: IssuerBench, proxy: Proxy, how: str) -> None:
    world = desk.world
    lease = await handle(desk, "read")
    await until_allowed(desk, proxy, lease)
    before = len(await world.records(REVOCATION_ACK))
    if how == "suspend":
        await world.accepted(
            world.claims(AgentSuspend, desk.sam, agent_id=desk.bot.name, reason="odd"), desk.sam
        )
    elif how == "end of the task":
        await world.accepted(
            world.claims(TaskEnd, world.operator, task_id=desk.task, reason="done"), world.operator
        )
    elif how == "selector":
        await desk.revoke(desk.sam, selector=Selector(agent_id=desk.bot.name))
    else:
        await desk.revoke(desk.bot, "release", lease_id=lease)
    async with asyncio.timeout(60):
        while len(await world.records(REVOCATION_ACK)) == before:
            await asyncio.sleep(0.02)
    word = world.opened((await world.records(REVOCATION_ACK))[-1], RevocationAck, "gateway")
    assert word.iss == world.key("gateway").id
    answer = await proxy.as_agent(desk.bot.key, lease, "GET", A)
    assert answer.status_code in (401, 403)
    assert answer.json()["code"] in {
        "lease_cut", "lease_ended", "agent_suspended", "task_ended", "handle_unknown",
    }  # fmt: skip


async def test_an_order_that_is_sent_again_cuts_nothing_more(desk: IssuerBench, proxy: Proxy) -> None:
    """By somebody who may write to the topic, and has no key: what it covered then is what it covers."""
    world = desk.world

    async def words() -> int:
        return len(await world.records(REVOCATION_ACK))

    claims, _ = await desk.revoke(desk.sam, selector=Selector(agent_id=desk.bot.name))
    assert (await desk.verdict(claims)).kind == "accepted"
    lease = await handle(desk, "read")
    await until_allowed(desk, proxy, lease)
    before = await words()
    await world.send(REVOCATION_REQUEST, desk.bot.name, sign(claims, desk.sam.key))
    async with asyncio.timeout(60):
        while await words() == before:
            await asyncio.sleep(0.02)
    assert (await proxy.as_agent(desk.bot.key, lease, "GET", A)).status_code == 200


async def test_a_static_secret_that_is_replaced_counts_with_the_next_request(
    office: tuple[IssuerBench, Proxy, Path],
) -> None:
    first, proxy, secret = office
    desk = await own(first, "partner")
    url = f"https://{PARTNER}/a/x"
    lease = await handle(desk, "read", target="partner")
    headers = await until_allowed(desk, proxy, lease, url)
    assert headers["x-api-key"] == "first-secret"
    assert headers["authorization"] == "none", "none of the agent's own gets through"
    secret.write_text("second-secret")
    headers = dict((await proxy.as_agent(desk.bot.key, lease, "GET", url)).headers)
    assert headers["x-api-key"] == "second-secret"
    secret.write_text("first-secret")
