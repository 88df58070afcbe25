"""Agents that turn against their task, and what others try with their handles: blocked, and the exact audit story."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from ringfence.messages.operations import ActionDecided
from ringfence.messages.registry import BackendSettings, RequestRule, VerbFloor
from ringfence.messages.topics import ACTION
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.gateway.raw import connected_unix
from tests.gateway.target import Target
from tests.support.audit_stories import is_told
from tests.support.benches.gateway_flows import Proxy, gateway
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.world import WITHIN_S, World, scope

REPO = "/repos/acme/shop"
RULES = (
    RequestRule(method="GET", path="/repos/{owner}/{repo}/{path*}", verb="read", resource="{owner}/{repo}"),
    RequestRule(
        method="POST", path="/repos/{owner}/{repo}/pulls/{number}/reviews", verb="review",
        resource="{owner}/{repo}",
    ),
    RequestRule(
        method="PUT", path="/repos/{owner}/{repo}/contents/.github/workflows/{path*}", verb="workflow",
        resource="{owner}/{repo}",
    ),
    RequestRule(
        method="PUT", path="/repos/{owner}/{repo}/contents/{path*}", verb="write", resource="{owner}/{repo}",
    ),
)  # fmt: skip
VERBS = tuple(VerbFloor(verb=verb) for verb in ("read", "review", "write", "workflow"))


ASSIGNED = """
    3004 Create: Requested task.assign by maria for bot
    ~3004 Create: Success task.assigned by maria for bot
    ~3004 Accept Command: Success command.accepted by registry for bot
"""
ISSUED = """
    3003 Request Privileges: Requested/Observed credential.requested by bot
    3003 Decide: Success/Allowed request.allowed by policy for bot
    ~3003 Assign Privileges: Success/Allowed credential.issued by issuer for bot
    ~3003 Deliver: Success/Observed delivery.sent by nobody known for bot
    ~3003 Deliver: Success/Observed reply.sent by nobody known for bot
"""
"""Where each story here begins: a person gave an agent a task, and the agent got a lease for it."""


def did(what: str) -> str:
    """It was let through."""
    return f"6003 {what}: Success/Allowed action.allowed by bot\n"


def blocked(what: str, why: str) -> str:
    """It was not."""
    return f"6003 {what}: Failure/Denied action.denied [{why}] by bot\n"


@dataclass
class Office:
    """A gateway that listens on sockets of tasks, and a forge of code behind it."""

    first: IssuerBench
    proxy: Proxy
    target: Target
    sockets: Path


@pytest.fixture(scope="module")
async def office(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Office]:
    sockets = tmp_path_factory.mktemp("gw") / "tasks"
    async with (
        Target().serving() as target,
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as first,
        world.running("issuer", "revoker"),
        gateway(world, sockets=sockets) as proxy,
    ):
        backend = BackendSettings.model_validate({"kind": "jwt", "url": f"http://127.0.0.1:{target.port}"})
        await world.target("forge", backend=backend, requests=RULES, verbs=VERBS)
        yield Office(first, proxy, target, sockets)


class Worker:
    """An agent at its task, behind the socket that is its only way out."""

    def __init__(self, office: Office, desk: IssuerBench, lease: str) -> None:
        self.office, self.desk, self.lease = office, desk, lease
        self._came_before = len(office.target.requests)

    async def sends(self, data: bytes) -> int:
        """The status that it gets for exactly these bytes."""
        async with connected_unix(str(self.office.sockets / f"{self.desk.task}.sock")) as raw:
            return (await raw.ask(data)).status

    async def tries(self, method: str, path: str, *headers: str, host: str = "gateway") -> int:
        body = b"" if method in ("GET", "DELETE") else b"{}"
        lines = [f"{method} {path} HTTP/1.1", f"Host: {host}", f"Content-Length: {len(body)}", *headers]
        return await self.sends("".join(f"{one}\r\n" for one in [*lines, ""]).encode() + body)

    def reached(self) -> list[tuple[str, str]]:
        """What came to the forge since it began."""
        return [(one.method, one.target) for one in self.office.target.requests[self._came_before :]]

    async def actions(self) -> list[ActionDecided]:
        records = [ActionDecided.model_validate_json(r.value) for r in await self.desk.world.records(ACTION)]
        return [record for record in records if record.task_id == self.desk.task]

    async def leaves(self, story: str) -> None:
        """Fails unless this is all that is told of its task, from its assignment on."""
        names = {"bot": self.desk.bot.name, "maria": self.desk.maria.name}
        await is_told(self.desk.world, ASSIGNED + ISSUED + story, {"task": self.desk.task}, **names)


async def worker(office: Office, may: tuple[str, ...], ceiling: tuple[str, ...]) -> Worker:
    """One whose task may do this with one repository, as it may with all others in other tasks; and a lease for it."""
    desk, name = await another(office.first), uuid.uuid4().hex[:8]
    world, narrow = desk.world, scope("forge", may, ("acme/shop",))
    everything = scope("forge", [floor.verb for floor in VERBS], ("acme/**",))
    desk.maria = await world.user(f"maria-{name}", entitlements=everything)
    desk.bot = await world.agent(f"bot-{name}", desk.sam, scope("forge", ceiling, ("acme/**",)))
    desk.task = await world.task(desk.bot, by=desk.maria, scope=narrow)
    asked = await desk.ask(scope=narrow, delivery="gateway")
    await desk.decide(asked)
    content = await desk.answer(asked)
    assert content.lease is not None, desk.refusal(content)
    async with asyncio.timeout(WITHIN_S):  # the gateway has heard of the lease
        while not (office.sockets / f"{desk.task}.sock").exists():
            await asyncio.sleep(0.02)
    assert await world.runtimes["gateway"].tables_caught_up(WITHIN_S)
    return Worker(office, desk, asked.lease_id)


async def reviewer(office: Office) -> Worker:
    """It reviews here, and writes code elsewhere; it never touches what CI does."""
    return await worker(office, ("read", "review"), ("read", "review", "write"))


WORKFLOW = "beyond_scope task, beyond_scope ceiling:bot, beyond_lease lease"
CODE = "beyond_scope task, beyond_lease lease"
CONTENTS = f"/forge{REPO}/contents"


async def test_a_reviewer_that_a_pull_request_talks_into_it_changes_no_workflow(office: Office) -> None:
    """Read and review, workflows and code: all is the same API, with the same credential."""
    bot, injected = await reviewer(office), "X-Ringfence-Label: injected"
    assert await bot.tries("GET", f"/forge{REPO}/pulls/7") == 200
    assert await bot.tries("PUT", f"{CONTENTS}/.github/workflows/ci.yml", injected) == 403
    assert await bot.tries("PUT", f"{CONTENTS}/src/main.py", injected) == 403
    assert await bot.tries("POST", f"/forge{REPO}/pulls/7/reviews") == 200
    assert bot.reached() == [("GET", f"{REPO}/pulls/7"), ("POST", f"{REPO}/pulls/7/reviews")]
    await bot.leaves(did("Read") + blocked("Update", WORKFLOW) + blocked("Update", CODE) + did("Create"))
    assert [(one.verb, one.resource, one.access, one.label) for one in await bot.actions()] == [
        ("read", "acme/shop", "read", None),
        ("workflow", "acme/shop", "write", "injected"),
        ("write", "acme/shop", "write", "injected"),
        ("review", "acme/shop", "write", None),
    ]


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("%2egithub/workflows/ci.yml", WORKFLOW),
        (".github%2fworkflows/ci.yml", "request_unmapped"),
        ("docs/../.github/workflows/ci.yml", "request_unmapped"),
        ("docs/%2e%2e/.github/workflows/ci.yml", "request_unmapped"),
        ("/.github/workflows/ci.yml", "request_unmapped"),
        (".github/workflows;x/ci.yml", "request_unmapped"),
        (".github/workflows%252fci.yml", "request_unmapped"),
        (".github\\workflows/ci.yml", "request_unmapped"),
        ("%c0%aegithub/workflows/ci.yml", "request_unmapped"),
        (".GitHub/workflows/ci.yml", CODE),
    ],
)
async def test_no_other_spelling_of_a_path_gets_there(office: Office, path: str, why: str) -> None:
    bot = await reviewer(office)
    assert await bot.tries("PUT", f"{CONTENTS}/{path}") == 403
    assert bot.reached() == []
    await bot.leaves(blocked("Update", why))


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ("Content-Length: 4\r\nTransfer-Encoding: chunked\r\n", "malformed_http"),
        ("Transfer-Encoding: chunked\r\nTransfer-Encoding: x\r\n", "malformed_http"),
        ("Host: forge.example\r\nContent-Length: 0\r\n", "malformed_http"),
    ],
)
async def test_a_request_that_hides_another_is_not_read_and_told_as_the_tasks(
    office: Office, fields: str, code: str
) -> None:
    bot = await reviewer(office)
    hidden = f"PUT {CONTENTS}/.github/workflows/ci.yml HTTP/1.1\r\nHost: gateway\r\nContent-Length: 0\r\n\r\n"
    shown = f"POST /forge{REPO}/pulls/7/reviews HTTP/1.1\r\nHost: gateway\r\n{fields}\r\n0\r\n\r\n"
    assert await bot.sends((shown + hidden).encode()) == 400
    assert bot.reached() == []
    await bot.leaves(blocked("Call", code))


async def test_a_host_that_the_request_line_does_not_name_gets_nobody_anywhere(office: Office) -> None:
    bot = await reviewer(office)
    forge = f"127.0.0.1:{office.target.port}"
    path = f"http://{forge}{REPO}/contents/README.md"
    assert await bot.tries("GET", path, host="elsewhere.example") == 400
    assert bot.reached() == []
    await bot.leaves(blocked("Read", "host_disagrees"))


async def test_a_planning_agent_that_explores_sees_nothing_but_its_task(office: Office) -> None:
    bot = await worker(office, ("read",), ("read", "review"))
    metadata = "http://169.254.169.254/latest/meta-data"
    for method, path, status in (
        ("GET", f"{CONTENTS}/README.md", 200),
        ("GET", "/forge/repos/acme/payroll/contents/salaries.csv", 403),
        ("GET", "/forge/repos/other/shop/contents/README.md", 403),
        ("GET", "/forge/user/repos", 403),
        ("GET", "/staging/env/a", 403),
        ("GET", "/nothing/env/a", 403),
        ("POST", f"/forge{REPO}/pulls/7/reviews", 403),
        ("DELETE", f"/forge{REPO}", 403),
    ):
        assert await bot.tries(method, path) == status, path
    assert await bot.tries("GET", metadata, host="169.254.169.254") == 403
    assert bot.reached() == [("GET", f"{REPO}/contents/README.md")]
    # What is another organisation's, nobody here allows.
    nobodys = (
        "beyond_scope task, beyond_scope ceiling:bot, beyond_scope entitlements:maria, beyond_lease lease"
    )
    await bot.leaves(
        did("Read")
        + blocked("Read", CODE)
        + blocked("Read", nobodys)
        + blocked("Read", "request_unmapped") * 2
        + blocked("Read", "target_unknown")
        + blocked("Create", CODE)
        + blocked("Delete", "request_unmapped")
        + blocked("Read", "target_unknown")
    )


async def test_a_handle_in_other_hands_is_told_of_whoever_showed_it(office: Office) -> None:
    """The agent's own story has nothing of it; that of the lease has all."""
    bot, thief = await reviewer(office), await worker(office, ("read",), ("read",))
    stranger = bot.desk.world.party("agent", bot.desk.bot.name)
    url = f"http://127.0.0.1:{office.target.port}{REPO}/pulls/7"
    answer = await office.proxy.as_agent(thief.desk.bot.key, bot.lease, "GET", url)
    assert (answer.status_code, answer.json()["code"]) == (403, "handle_other_agent")
    answer = await office.proxy.as_agent(stranger.key, bot.lease, "GET", url)
    assert (answer.status_code, answer.json()["code"]) == (401, "proof_by_stranger")
    answer = await office.proxy.ask("GET", url, authorization=f"DPoP {bot.lease}")
    assert (answer.status_code, answer.json()["code"]) == (401, "proof_missing")
    await bot.leaves("")
    tried = """
        3003 Assign Privileges: Success/Allowed credential.issued by issuer for bot
        6003 Read: Failure/Denied action.by_another [handle_other_agent] by thief
        6003 Read: Failure/Denied action.by_another [proof_by_stranger] by unknown
        6003 Read: Failure/Denied action.denied [proof_missing] by unknown
    """
    names = {"bot": bot.desk.bot.name, "thief": thief.desk.bot.name}
    await is_told(bot.desk.world, tried, {"lease": bot.lease}, **names)
