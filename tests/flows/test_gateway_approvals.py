"""Actions that wait for a person, with all services: the agent's request, the sponsor's yes, the target, audit."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.action_approvals import PendingAction
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.errors import NotYoursError, RefusedError, StaleApprovalError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.approval import ActionApproval, ActionRequest
from ringfence.messages.registry import (
    AgentSuspend,
    BackendSettings,
    RequestRule,
    VerbFloor,
)
from ringfence.messages.topics import APPROVAL_REQUEST, APPROVAL_RESPONSE, AUDIT, DEAD_LETTER
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.flows.test_cli import Shell
from tests.flows.test_notices import Receiver, receiving, verified
from tests.flows.test_notices import settings as webhooks
from tests.gateway.certificates import Certificates
from tests.gateway.target import Target
from tests.support.benches.gateway_flows import action, gateway
from tests.support.benches.policy_bench import claims_of
from tests.support.benches.sdk_clients import client
from tests.support.passkeys import SESSION_ORIGIN, SoftwarePasskey, add_passkey
from tests.support.user_keys import give_key
from tests.support.world import WITHIN_S, Party, World, scope

RULES = (
    RequestRule(method="GET", path="/{path*}", verb="read", resource="path/{path*}"),
    RequestRule(method="PUT", path="/{path*}", verb="merge", resource="path/{path*}"),
    RequestRule(method="DELETE", path="/{path*}", verb="wipe", resource="path/{path*}"),
)
VERBS = (
    VerbFloor(verb="read"), VerbFloor(verb="merge", ask="sponsor"), VerbFloor(verb="wipe", ask="operator"),
)  # fmt: skip
WIDE = scope("hub", ("read", "merge", "wipe"), ("path/**",))


@dataclass
class Stage:
    """All services, a gateway that listens for tasks, and a target behind it."""

    world: World
    target: Target
    sockets: Path
    sam: Party
    petra: Party
    maria: Party
    chat: Receiver
    """Where sam is told of what waits."""

    async def actor(self, user: Party | None = None) -> Actor:
        """An agent with a task, on behalf of maria or `user`, and a lease for everything at the target."""
        bot = await self.world.agent(f"bot-{uuid.uuid4().hex[:8]}", self.sam, WIDE)
        task = await self.world.task(bot, by=user or self.maria, scope=WIDE)
        async with Agent.connect(bot.key, client(self.world)) as agent:
            await agent.request(
                task=task, target="hub", verbs=["read", "merge", "wipe"], resources=["path/dev/**"], reason="to merge",
                ttl_s=600, delivery="gateway", timeout_s=WITHIN_S,
            )  # fmt: skip
        actor = Actor(self, bot, task)
        async with asyncio.timeout(WITHIN_S):
            while not actor.socket.exists() or (await actor.send("GET", "/dev/a")).status_code != 200:
                await asyncio.sleep(0.05)
        return actor

    def sponsor(self, who: Party | None = None) -> Sponsor:
        return Sponsor.connect((who or self.sam).key, client(self.world))

    def puts(self) -> list[tuple[str, bytes]]:
        return [(one.target, bytes(one.body)) for one in self.target.requests if one.method != "GET"]


@dataclass
class Actor:
    """An agent that acts through its task's socket."""

    stage: Stage
    bot: Party
    task: str

    @property
    def socket(self) -> Path:
        return self.stage.sockets / f"{self.task}.sock"

    async def send(
        self, method: str, path: str, body: bytes | None = None, headers: Sequence[tuple[str, str]] = ()
    ) -> httpx.Response:
        transport = httpx.AsyncHTTPTransport(uds=str(self.socket))
        async with httpx.AsyncClient(transport=transport, timeout=WITHIN_S, trust_env=False) as http:
            return await http.request(
                method, f"http://gateway/hub{path}", content=body, headers=list(headers)
            )


async def waits(sponsor: Sponsor, actor: Actor, *, everyone: bool = False) -> PendingAction:
    """The action of an agent that is shown to somebody."""
    async with asyncio.timeout(WITHIN_S):
        async for pending in sponsor.watch_actions(everyone=everyone):
            if pending.agent == actor.bot.name:
                return pending
    raise AssertionError("the watch ended")


@pytest.fixture(scope="module")
def receivers() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


@pytest.fixture(scope="module")
async def stage(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory, receivers: ExitStack
) -> AsyncIterator[Stage]:
    folder = tmp_path_factory.mktemp("asking")
    certificates, receiver = Certificates(folder), receivers.enter_context(receiving())
    own = {"sockets": folder / "tasks", "targets_ca_file": certificates.file}
    async with (
        Target().serving(certificates.server("localhost")) as target,
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        world.running("registry"),
        world.running(
            "policy",
            "issuer",
            "revoker",
            "audit",
            own=webhooks(folder, sam=receiver),
        ),
        gateway(world, **own),
    ):
        sam = await world.user("sam", ("sponsor",), WIDE)
        petra = await world.user("petra", ("sponsor",))
        maria = await world.user("maria", (), WIDE)
        backend = BackendSettings.model_validate({"kind": "jwt", "url": f"https://localhost:{target.port}"})
        await world.target("hub", backend=backend, requests=RULES, verbs=VERBS)
        yield Stage(world, target, folder / "tasks", sam, petra, maria, receiver)


async def told(world: World, code: str, holds: Callable[[Any], bool]) -> Any:
    """The event for the SIEM with this code that says so."""

    def is_it(record: Any) -> bool:
        event = json.loads(record.value)
        return event["metadata"]["event_code"] == code and holds(event["unmapped"])

    return json.loads((await world.consume_until(AUDIT, is_it)).value)


async def test_an_action_waits_for_the_sponsor_and_goes_on_as_it_was_approved(stage: Stage) -> None:
    actor, body = await stage.actor(), b'{"sha": "' + secrets.token_hex(70_000).encode() + b'"}'
    async with stage.sponsor() as sam, stage.sponsor(stage.petra) as petra:
        sending = asyncio.create_task(actor.send("PUT", "/dev/shop/7?squash=1", body))
        pending = await waits(sam, actor)
        assert (pending.method, pending.verb, pending.resource) == ("PUT", "merge", "path/dev/shop/7")
        assert pending.url == f"https://localhost:{stage.target.port}/dev/shop/7?squash=1"
        assert (pending.body_bytes, pending.mine, pending.purpose) == (len(body), True, "made by a test")
        assert pending.gateway == stage.world.key("gateway").id
        assert not sending.done()
        assert ("/dev/shop/7?squash=1", body) not in stage.puts()
        with pytest.raises(NotYoursError):
            await petra.approve_action(await waits(petra, actor, everyone=True))
        await sam.approve_action(pending, "looks right")
        answer = await sending
        assert answer.status_code == 200
        with pytest.raises(StaleApprovalError):
            await sam.approve_action(pending)
        assert pending not in sam.actions()
    assert stage.puts()[-1] == ("/dev/shop/7?squash=1", body)
    event = await action(stage.world, agent_id=actor.bot.name, verb="merge")
    assert event.asked is not None
    assert (event.allowed, event.asked.by) == (True, "sam")
    assert event.asked.request_digest == pending.digest
    for code in ("action.approval_requested", "action.approved"):
        said = await told(stage.world, code, lambda words: words.get("question") == pending.request_id)
        assert said["unmapped"]["task"] == actor.task
        assert said["unmapped"]["sponsor"] == "sam"
    done = await told(
        stage.world, "action.allowed", lambda words: words.get("question") == pending.request_id
    )
    assert done["unmapped"]["approvers"] == ["sam"]
    letters = [json.loads(record.value) for record in await stage.world.records(DEAD_LETTER)]
    assert not any("approval" in letter["source"]["topic"] for letter in letters), letters


async def test_an_action_is_approved_by_a_passkey(stage: Stage) -> None:
    actor, world = await stage.actor(), stage.world
    sam = await add_passkey(world, stage.sam)
    assert isinstance(sam.key, SoftwarePasskey)
    async with stage.sponsor() as watching:
        sending = asyncio.create_task(actor.send("PUT", "/dev/by-passkey", b"x"))
        pending = await waits(watching, actor)

    def answer(key: SigningKey, **fields: Any) -> str:
        given = {
            "verdict": "approved",
            "agent_id": actor.bot.name,
            "request": pending.request,
            "request_digest": pending.digest,
        }
        return sign(world.claims(ActionApproval, sam, **{**given, **fields}), key)

    now_s = int(time.time())
    for nothing in (
        answer(sam.key.but(origin=SESSION_ORIGIN)),
        answer(sam.key.plain()),
        answer(sam.key, iat=now_s - 605, exp=now_s + 300),
        f"{answer(sam.key).rpartition('.')[0]}.{answer(sam.key, verdict='denied').rpartition('.')[2]}",
    ):
        await world.send(APPROVAL_RESPONSE, actor.bot.name, nothing)
    once = answer(sam.key)
    await world.send(APPROVAL_RESPONSE, actor.bot.name, once)
    assert (await sending).status_code == 200
    assert [one for one in stage.puts() if one[0] == "/dev/by-passkey"] == [("/dev/by-passkey", b"x")]
    event = await told(world, "action.approved", lambda words: words.get("agent") == actor.bot.name)
    assert event["unmapped"]["verified"]["kid"] == sam.key.kid
    assert event["unmapped"]["verified"]["sign_count"] == 0
    # A second use opens nothing: the same request asks anew.
    again = asyncio.create_task(actor.send("PUT", "/dev/by-passkey", b"x"))
    async with stage.sponsor() as watching:
        assert (await waits(watching, actor)).digest != pending.digest
    await world.send(APPROVAL_RESPONSE, actor.bot.name, once)
    await world.event_where(lambda e: e.kind == "refused" and e.ref == claims_of(once)["jti"])
    assert not again.done()
    again.cancel()


async def test_a_key_that_an_operator_lent_the_sponsor_lets_nothing_pass(stage: Stage) -> None:
    actor, lent = await stage.actor(), await give_key(stage.world, stage.world.operator, stage.sam)
    async with stage.sponsor(lent) as thief, stage.sponsor() as sam:
        sending = asyncio.create_task(actor.send("PUT", "/dev/shop/21", b"x"))
        pending = await waits(thief, actor)
        with pytest.raises(RefusedError, match="counts for approvals only from"):
            await thief.approve_action(pending)
        yes = stage.world.claims(
            ActionApproval, lent, verdict="approved", agent_id=actor.bot.name, request=pending.request,
            request_digest=pending.digest,
        )  # fmt: skip
        await stage.world.send(APPROVAL_RESPONSE, actor.bot.name, sign(yes, lent.key))
        refused = await stage.world.event_where(
            lambda e: e.kind == "refused" and e.agent_id == actor.bot.name
        )
        assert [reason.code for reason in refused.reasons] == ["key_too_new"]
        assert not sending.done()
        await sam.approve_action(await waits(sam, actor))
        assert (await sending).status_code == 200


async def test_the_sponsor_is_told_by_webhook(stage: Stage) -> None:
    actor = await stage.actor()
    async with stage.sponsor() as sam:
        own = [("Content-Type", "text/x-shown"), ("X-Secret", "s3cret-of-the-agent")]
        sending = asyncio.create_task(actor.send("PUT", "/dev/shop/14", b"x", own))
        pending = await waits(sam, actor)
        mine: list[tuple[dict[str, str], bytes]] = []

        def found() -> bool | None:
            mine[:] = [(heads, body) for _, heads, body in stage.chat.got if actor.bot.name.encode() in body]
            return True if mine else None

        await stage.world.until(found, "a notice")
        ((heads, body),) = mine
        assert verified(heads, body)
        assert heads["webhook-id"] == pending.request_id
        text = json.loads(body)["text"]
        for part in (
            pending.request_id,
            "PUT",
            "/dev/shop/14",
            "hub:merge:path/dev/shop/14",
            "made by a test",
            "content-type: text/x-shown",
            "accept, user-agent, x-secret",
        ):
            assert part in text
        assert "s3cret-of-the-agent" not in text
        await sam.deny_action(pending)
        assert (await sending).status_code == 403


async def test_a_no_and_a_request_that_nobody_sees_stay_away_from_the_target(stage: Stage) -> None:
    actor, before = await stage.actor(), len(stage.puts())
    async with stage.sponsor() as sam:
        sending = asyncio.create_task(actor.send("PUT", "/dev/shop/8", b"x"))
        await sam.deny_action(await waits(sam, actor), "not on a Friday")
        problem = (await sending).json()
        assert (problem["status"], problem["code"]) == (403, "approval_denied")
        assert "not on a Friday" in problem["detail"]
        assert (await actor.send("PUT", "/dev/shop/8", b"x")).json()["code"] == "approval_denied"
    assert len(stage.puts()) == before
    event = await action(stage.world, agent_id=actor.bot.name, verb="merge", allowed=False)
    assert event.asked is not None
    assert event.asked.by == "sam"


async def test_action_that_needs_an_operator_is_refused_to_the_sponsor(stage: Stage) -> None:
    actor = await stage.actor()
    async with stage.sponsor() as sam, stage.sponsor(stage.world.operator) as olga:
        sending = asyncio.create_task(actor.send("DELETE", "/dev/shop"))
        pending = await waits(sam, actor)
        assert (pending.required, pending.mine, pending.body_bytes) == ("operator", False, 0)
        # Signed all the same, by somebody whose own client would not have: the gateway does not go by it.
        forced = stage.world.claims(
            ActionApproval, stage.sam, verdict="approved", agent_id=actor.bot.name, request=pending.request,
            request_digest=pending.digest,
        )  # fmt: skip
        await stage.world.send(APPROVAL_RESPONSE, actor.bot.name, sign(forced, stage.sam.key))
        refused = await stage.world.event_where(lambda e: e.ref == forced.jti)
        assert (refused.kind, refused.reasons[0].code) == ("refused", "not_approver")
        by_agent = stage.world.claims(
            ActionApproval, actor.bot, verdict="approved", agent_id=actor.bot.name, request=pending.request,
            request_digest=pending.digest,
        )  # fmt: skip
        await stage.world.send(APPROVAL_RESPONSE, actor.bot.name, sign(by_agent, actor.bot.key))
        assert not sending.done()
        await olga.approve_action(await waits(olga, actor))
        assert (await sending).status_code == 200
    event = await action(stage.world, agent_id=actor.bot.name, verb="wipe")
    assert event.asked is not None
    assert event.asked.by == stage.world.operator.name


async def test_action_not_signed_by_a_gateway_is_not_shown(stage: Stage) -> None:
    actor, world = await stage.actor(), stage.world
    async with stage.sponsor() as sam:
        sending = asyncio.create_task(actor.send("PUT", "/dev/shop/9", b"x"))
        pending = await waits(sam, actor)
        real = parse(pending.request).unverified_claims(ActionRequest)
        key = world.key("gateway")
        forged = real.model_copy(
            update={"url": "https://localhost/harmless", "jti": secrets.token_urlsafe(32)}
        )
        by_agent = forged.model_copy(update={"iss": actor.bot.id})
        by_policy = forged.model_copy(update={"iss": world.key("policy").id})
        over = forged.model_copy(update={"iat": int(time.time()) - 900, "exp": int(time.time()) - 600})
        for_ever = forged.model_copy(update={"exp": real.iat + 7 * 86_400})
        changed = sign(forged, SigningKey.generate(key.id))
        for compact in (
            sign(by_agent, actor.bot.key), sign(by_policy, world.key("policy")), changed, sign(over, key),
            sign(for_ever, key),
            changed.rpartition(".")[0] + "." + pending.request.rpartition(".")[2],
        ):  # fmt: skip
            await world.send(APPROVAL_REQUEST, "sam", compact)
        other = await stage.actor()
        later = asyncio.create_task(other.send("PUT", "/dev/shop/10", b"x"))
        await waits(sam, other)  # all that came before was looked at
        assert [one.digest for one in sam.actions() if one.agent == actor.bot.name] == [pending.digest]
        await sam.approve_action(pending)
        assert (await sending).status_code == 200
        await sam.deny_action(await waits(sam, other))
        await later


async def test_agent_that_left_during_a_hold_gets_the_approval_on_retry(stage: Stage) -> None:
    actor, before = await stage.actor(), len(stage.puts())
    async with stage.sponsor() as sam:
        sending = asyncio.create_task(actor.send("PUT", "/dev/shop/13", b"x"))
        pending = await waits(sam, actor)
        sending.cancel()
        left = await action(stage.world, agent_id=actor.bot.name, verb="merge", allowed=False)
        assert left.reasons[0].code == "client_gone"
        await sam.approve_action(pending)
        assert (await actor.send("PUT", "/dev/shop/13", b"x")).status_code == 200
        again = asyncio.create_task(actor.send("PUT", "/dev/shop/13", b"x"))
        await sam.deny_action(await waits(sam, actor))
        assert (await again).json()["code"] == "approval_denied", "the yes was for one"
    assert len(stage.puts()) == before + 1


async def test_the_headers_that_go_on_are_those_that_were_approved(stage: Stage) -> None:
    actor, path, before = await stage.actor(), "/dev/shop/15", len(stage.puts())
    json_body = (("Content-Type", "application/json"), ("X-Secret", "s3cret-of-the-agent"))
    async with stage.sponsor() as sam:

        async def leave_waiting(
            headers: Sequence[tuple[str, str]], digest: str | None = None
        ) -> PendingAction:
            sending = asyncio.create_task(actor.send("PUT", path, b"x", headers))
            async with asyncio.timeout(WITHIN_S):
                async for pending in sam.watch_actions(everyone=False):
                    if pending.agent == actor.bot.name and pending.digest != digest:
                        sending.cancel()
                        return pending
            raise AssertionError("the watch ended")

        approved = await leave_waiting([*json_body, ("traceparent", "00-1")])
        values = {one.name: one.value for one in approved.headers}
        assert values["content-type"] == "application/json"
        assert values["x-secret"] is None
        assert "traceparent" not in values
        assert "s3cret" not in str(parse(approved.request).unverified_claims(ActionRequest))
        await sam.approve_action(approved)
        for other in (
            (("Content-Type", "application/xml"), *json_body[1:]),
            (*json_body, ("Destination", "/elsewhere")),
            (json_body[0], ("X-Secret", "another")),
        ):
            pending = await leave_waiting(other, approved.digest)
            assert pending.headers_digest != approved.headers_digest
            await sam.deny_action(pending)
        assert len(stage.puts()) == before
        answer = await actor.send("PUT", path, b"x", [*json_body, ("traceparent", "00-2"), ("Date", "now")])
        assert answer.status_code == 200, "the very same but for what traces it"
    got = [one for one in stage.target.requests if one.target == path][-1]
    names = [name.lower() for name, _ in got.headers]
    assert {name.lower(): value for name, value in got.headers}["x-secret"] == "s3cret-of-the-agent"
    assert not {"traceparent", "date"} & set(names)
    assert [name for name in names if name in values] == [one.name for one in approved.headers]


@pytest.mark.parametrize("how", ["suspended", "transferred"])
async def test_agent_suspended_or_transferred_during_a_hold_is_denied(stage: Stage, how: str) -> None:
    actor, world, before = await stage.actor(), stage.world, len(stage.puts())
    async with stage.sponsor() as sam:
        sending = asyncio.create_task(actor.send("PUT", "/dev/shop/11", b"x"))
        pending = await waits(sam, actor)
        if how == "suspended":
            claims = world.claims(AgentSuspend, stage.sam, agent_id=actor.bot.name, reason="odd")
            await world.accepted(claims, stage.sam)
        else:
            await world.transfer(actor.bot.name, "petra")
        late = world.claims(
            ActionApproval, stage.sam, verdict="approved", agent_id=actor.bot.name, request=pending.request,
            request_digest=digest(pending.request),
        )  # fmt: skip
        await world.send(APPROVAL_RESPONSE, actor.bot.name, sign(late, stage.sam.key))
        problem = (await sending).json()
        assert problem["code"] in {"lease_cut", "lease_ended", "agent_suspended", "approval_stale"}
    assert len(stage.puts()) == before


async def test_by_commands(
    stage: Stage, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    actor, shared = await stage.actor(), stage.world.settings("registry")
    for name in [name for name in os.environ if name.startswith("RINGFENCE_")]:
        monkeypatch.delenv(name)
    for name in ("kafka", "topic_prefix", "trust_domain", "trust_root", "embedded_broker"):
        monkeypatch.setenv(f"RINGFENCE_{name.upper()}", str(getattr(shared, name)))
    for role, port in stage.world.ports.items():
        monkeypatch.setenv(f"RINGFENCE_{role.upper()}_URL", f"http://127.0.0.1:{port}")
    stage.sam.key.save(tmp_path / "sam.json")
    stage.world.operator.key.save(tmp_path / "olga.json")
    shell = Shell(tmp_path, capsys)
    # The policy engine of an earlier test must be dropped on the thread that made it; commands run on others.
    gc.collect()
    gc.disable()
    try:
        add = (
            "target", "add", "hub-2", "--description", "the hub", "--verb", "read", "--verb", "merge", "--verb", "wipe",
            "--setting", "url=https://hub.example", "--request", "GET /{path*} read {path*}",
            "--request", "PUT /{path*} merge {path*}",
        )  # fmt: skip
        await shell("olga", *add, "--ask", "merge", "--ask", "wipe=operator")
        verbs = (await shell.json("olga", "target", "show", "hub-2"))["state"]["verbs"]
        assert [one.get("ask") for one in verbs] == [None, "sponsor", "operator"]
        for wrong in ("unknown", "merge=nobody", "merge=none"):
            assert "--ask" in await shell("olga", *add, "--ask", wrong, status=2)
        own = [("Content-Type", "text/x-shown"), ("X-Secret", "s3cret-of-the-agent")]
        sending = asyncio.create_task(actor.send("PUT", "/dev/shop/12", b"x", own))
        async with asyncio.timeout(WITHIN_S):
            while not (found := await _listed(shell, actor)):
                pass
        (pending,) = found
        assert pending["kind"] == "action"
        shown = await shell("sam", "approvals", "show", pending["request_id"])
        for said in (
            "PUT", "/dev/shop/12", "merge on path/dev/shop/12", "this one alone, once", "content-type: text/x-shown",
            "values not shown: accept, user-agent, x-secret",
        ):  # fmt: skip
            assert said in shown
        assert "s3cret-of-the-agent" not in shown
        assert "ONE ACTION" in await shell("sam", "approvals", "list")
        short = ("approvals", "approve", pending["request_id"][:13], "--yes")
        assert "only how an id begins" in await shell("sam", "--json", *short, status=2)
        said = await shell.json("sam", "approvals", "approve", pending["request_id"], "--yes")
        assert (said["verdict"], said["digest"]) == ("approved", pending["digest"])
        assert (await sending).status_code == 200
        await shell("sam", "approvals", "show", pending["request_id"], status=1)
    finally:
        gc.enable()


async def _listed(shell: Shell, actor: Actor) -> list[Any]:
    every = await shell.json("sam", "approvals", "list")
    return [one for one in every if one["agent"] == actor.bot.name]
