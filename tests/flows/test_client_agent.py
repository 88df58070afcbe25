"""An agent and what comes back to it. Policy, issuer and revoker are played: each may say, and forge, anything."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.agent.replies import PendingRequest
from ringfence.client.errors import (
    IdentityError,
    InvalidCallError,
    NotAnsweredError,
    RefusedError,
    RequestDeniedError,
    RequestTimeoutError,
)
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Permission
from ringfence.messages.credential import Reason, RequestWithdraw
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.operations import DeadLetter, ServiceEvent
from ringfence.messages.topics import CREDENTIAL_REQUEST, DEAD_LETTER, REVOCATION_REQUEST, SERVICE_EVENT
from ringfence.model.scope.globs import ScopeError
from ringfence.policy.incoming.admission import is_request_withdrawal
from tests.support.benches.agent_api_bench import by_gateway
from tests.support.benches.sdk_clients import Played, client
from tests.support.world import WITHIN_S, Party, World

TASK = str(uuid.uuid4())


@pytest.fixture
async def agent(world: World, tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Agent]:
    """An agent that is connected to Kafka; with the parameter `http`, to a gateway alone."""
    if getattr(request, "param", "kafka") == "http":
        async with by_gateway(world, tmp_path) as behind:
            bot = await world.agent("bot", sponsor=await world.user("sam", roles=("sponsor",)))
            async with Agent.connect(bot.key, behind) as connected:
                yield connected
        return
    async with Agent.connect(world.party("agent", "bot").key, client(world)) as connected:
        yield connected


either_way = pytest.mark.parametrize("agent", ["kafka", "http"], indirect=True)
"""What an agent sees is the same by Kafka and by a gateway."""


def ask(agent: Agent, **options: Any) -> asyncio.Task[IssuedCredential]:
    given = {
        "task": TASK,
        "target": "staging",
        "verbs": ["deploy"],
        "resources": ["env/staging/web"],
        "reason": "release 41",
        "timeout_s": WITHIN_S,
    }
    return asyncio.create_task(agent.request(**{**given, **options}))


async def arrived(world: World, holds: Callable[[Played], bool] = lambda played: True) -> Played:
    """The first request on the topic for which `holds`."""

    def fits(record: Received) -> bool:
        return not is_request_withdrawal(record) and holds(Played(world, record))

    return Played(world, await world.consume_until(CREDENTIAL_REQUEST, fits))


async def withdrawal(world: World) -> tuple[Received, RequestWithdraw]:
    """The first withdrawal on the topic."""
    record = await world.consume_until(CREDENTIAL_REQUEST, is_request_withdrawal)
    return record, parse(record.value).unverified_claims(RequestWithdraw)


def revocation(record: Received) -> RevocationRequest:
    return parse(record.value).unverified_claims(RevocationRequest)


@either_way
async def test_a_request_says_exactly_what_was_asked_and_gets_its_credential(
    world: World, agent: Agent
) -> None:
    asked = ask(agent, ttl_s=90)
    played = await arrived(world)
    assert played.claims.iss == agent.connection.key.id
    assert played.claims.scope == (
        Permission(target="staging", verbs=("deploy",), resources=("env/staging/web",)),
    )
    assert (played.claims.ttl_s, played.claims.reason, played.claims.task_id) == (90, "release 41", TASK)
    assert played.record.key == "bot"
    lease_id = await played.issue("s3cret")
    credential = await asked
    assert (credential.lease_id, credential.value) == (lease_id, "s3cret")
    assert played.record.traceparent is not None
    assert credential.trace_id == played.record.traceparent.split("-")[1]


@either_way
async def test_forged_replies_are_ignored(world: World, agent: Agent) -> None:
    asked = ask(agent)
    played = await arrived(world)
    no = (Reason(code="no", message="no"),)
    await played.reply(played.decision("denied", by=world.key("issuer"), reasons=no))
    await played.reply(played.decision("denied", by=world.party("service", "policy").key, reasons=no))
    await played.issue("stolen", scope=(Permission(target="staging", verbs=("read",), resources=("**",)),))
    await played.issue("good")
    assert (await asked).value == "good"


@either_way
async def test_requests_side_by_side_get_their_own_answers(world: World, agent: Agent) -> None:
    asked = {name: ask(agent, reason=name) for name in ("one", "two", "three", "four")}
    for name in ("four", "two", "three"):
        await (await arrived(world, lambda p, name=name: p.claims.reason == name)).issue(f"for {name}")  # type: ignore[misc]
    denied = await arrived(world, lambda p: p.claims.reason == "one")
    await denied.reply(denied.decision("denied", reasons=(Reason(code="no", message="not this one"),)))
    for name in ("two", "three", "four"):
        assert (await asked[name]).value == f"for {name}"
    with pytest.raises(RequestDeniedError, match="not this one"):
        await asked["one"]


@either_way
async def test_approvals_are_told_once_and_then_the_credential_comes(world: World, agent: Agent) -> None:
    told: list[PendingRequest] = []
    asked = ask(agent, on_pending=told.append)
    played = await arrived(world)
    waits = played.decision("approval_required", required=("sponsor",))
    await played.reply(waits)
    await played.reply(waits)  # at least once
    await played.issue()
    await asked
    assert [str(pending) for pending in told] == ["waiting for the approval of the agent's sponsor"]


@either_way
async def test_on_pending_may_be_a_coroutine_and_its_failure_is_the_callers(
    world: World, agent: Agent
) -> None:
    async def fail(pending: PendingRequest) -> None:
        raise TimeoutError("the caller's own")

    asked = ask(agent, on_pending=fail)
    played = await arrived(world)
    await played.reply(played.decision("approval_required", required=("sponsor",)))
    with pytest.raises(TimeoutError, match="the caller's own"):
        await asked


async def timed_out(
    world: World, agent: Agent, says: str, play: Callable[[Played], Awaitable[None]]
) -> RequestTimeoutError:
    """The end of a request's time after something was played to it, with more time where that came too late."""
    for timeout_s in (1.0, 5.0, 25.0):
        asked = ask(agent, timeout_s=timeout_s, reason=f"{says} {timeout_s}")
        await play(await arrived(world, lambda p, t=timeout_s: p.claims.reason == f"{says} {t}"))  # type: ignore[misc]
        with pytest.raises(RequestTimeoutError) as late:
            await asked
        if says in str(late.value):
            return late.value
    raise AssertionError(f"never waited for: {says}")


@either_way
async def test_a_timeout_says_what_was_waited_for(world: World, agent: Agent) -> None:
    with pytest.raises(RequestTimeoutError, match="still waiting for policy's decision") as silent:
        await ask(agent, timeout_s=0.3)
    assert silent.value.waiting_for == "policy's decision"

    async def ask_people(played: Played) -> None:
        await played.reply(played.decision("approval_required", required=("sponsor", "operator")))

    await timed_out(world, agent, "the approval of the agent's sponsor and an operator", ask_people)

    async def allow(played: Played) -> None:
        await played.reply(played.decision())

    await timed_out(world, agent, "the issuer, after policy allowed it", allow)


async def test_a_timeout_says_why_the_request_counted_for_nothing(world: World, agent: Agent) -> None:
    async def bury(played: Played) -> None:
        letter = DeadLetter(
            source=played.record.coordinates,
            service="policy",
            code="key_unknown",
            reason="no such agent",
            at_ms=1,
        )
        await world.send(DEAD_LETTER, "t", letter.model_dump_json())

    await timed_out(world, agent, "the policy could not accept it (key_unknown: no such agent)", bury)


@either_way
async def test_a_credential_that_comes_too_late_is_given_back(world: World, agent: Agent) -> None:
    with pytest.raises(RequestTimeoutError):
        await ask(agent, timeout_s=2.0)
    lease_id = await (await arrived(world)).issue()
    released = revocation(await world.consume_until(REVOCATION_REQUEST, lambda r: True))
    assert (released.kind, released.lease_id, released.iss) == ("release", lease_id, agent.connection.key.id)


# --- what nobody waits for any more is withdrawn ----------------------------------------------------------------------


async def pending(world: World) -> Played:
    """The next request, with a reply that it waits for a person."""
    played = await arrived(world)
    await played.reply(played.decision("approval_required", required=("sponsor",)))
    return played


@either_way
@pytest.mark.parametrize("end", ["timeout", "cancelled", "the caller's own"])
async def test_abandoned_request_is_withdrawn_and_keeps_the_exception(
    world: World, agent: Agent, end: str
) -> None:
    waits = asyncio.Event()

    def told(_: PendingRequest) -> None:
        waits.set()
        if end == "the caller's own":
            raise ZeroDivisionError

    asked = ask(agent, on_pending=told, timeout_s=2.0 if end == "timeout" else WITHIN_S)
    played = await pending(world)
    if end == "cancelled":
        await waits.wait()
        asked.cancel()
    errors: dict[str, type[BaseException]] = {
        "timeout": RequestTimeoutError, "cancelled": asyncio.CancelledError, "the caller's own": ZeroDivisionError,
    }  # fmt: skip
    with pytest.raises(errors[end]):
        await asked
    record, claims = await withdrawal(world)
    assert (claims.request_id, claims.iss, record.key) == (played.request_id, agent.connection.key.id, "bot")
    assert (record.partition, record.offset) > (played.record.partition, played.record.offset)
    assert (record.traceparent or "").split("-")[1] == (played.record.traceparent or "").split("-")[1]
    # The final answer is taken for one to a request that was given up, and is no news to anybody.
    await played.reply(played.decision("denied", reasons=(Reason(code="withdrawn", message="given up"),)))
    await world.until(lambda: played.request_id not in agent._open_requests or None, "the late answer")


async def test_answered_or_allowed_request_is_not_withdrawn(world: World) -> None:
    async with Agent.connect(world.party("agent", "bot").key, client(world)) as agent:
        issued = ask(agent, reason="issued")
        first = await arrived(world, lambda p: p.claims.reason == "issued")
        await first.issue()
        await issued
        denied = ask(agent, reason="denied")
        second = await arrived(world, lambda p: p.claims.reason == "denied")
        await second.reply(second.decision("denied", reasons=(Reason(code="no", message="no"),)))
        with pytest.raises(RequestDeniedError):
            await denied

        async def allow(played: Played) -> None:
            await played.reply(played.decision())

        late = await timed_out(world, agent, "the issuer, after policy allowed it", allow)
    given_up = [
        parse(record.value).unverified_claims(RequestWithdraw).request_id
        for record in await world.records(CREDENTIAL_REQUEST)
        if is_request_withdrawal(record)
    ]
    # Attempts that timed out before the reply came were withdrawn.
    assert not {late.request_id, first.request_id, second.request_id} & set(given_up)


@pytest.mark.parametrize("broken", ["refuses", "hangs"])
async def test_a_withdrawal_that_fails_hides_no_exception_and_holds_up_nobody(
    world: World, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, broken: str
) -> None:
    monkeypatch.setattr("ringfence.client.agent.agent._WITHDRAW_TIMEOUT_S", 0.2)
    async with asyncio.timeout(WITHIN_S):
        async with Agent.connect(world.party("agent", "bot").key, client(world)) as agent:
            publish = agent.connection.publish

            async def fail(topic: Any, key: str, claims: Any, **options: Any) -> Any:
                if not isinstance(claims, RequestWithdraw):
                    return await publish(topic, key, claims, **options)
                if broken == "refuses":
                    raise UnavailableError("Kafka is away")
                return await asyncio.Event().wait()

            monkeypatch.setattr(agent.connection, "publish", fail)
            with pytest.raises(RequestTimeoutError):
                await ask(agent, timeout_s=0.3)
    assert "was given up and not withdrawn" in caplog.text


@either_way
async def test_a_request_that_kafka_did_not_take_is_not_withdrawn(
    world: World, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[Any] = []

    async def fail(topic: Any, key: str, claims: Any, **options: Any) -> Any:
        tried.append(claims)
        raise UnavailableError("Kafka is away")

    monkeypatch.setattr(agent.connection, "publish", fail)
    with pytest.raises(UnavailableError):
        await ask(agent)
    await agent.close()
    assert [claims.typ for claims in tried] == ["credential.request"]


@either_way
async def test_the_block_releases_however_it_ends(world: World, agent: Agent) -> None:
    async def play() -> str:
        return await (await arrived(world)).issue()

    playing = asyncio.create_task(play())
    with pytest.raises(ZeroDivisionError):
        async with agent.credential(
            task=TASK,
            target="staging",
            verbs=["deploy"],
            resources=["env/staging/web"],
            reason="x",
            timeout_s=WITHIN_S,
        ) as credential:
            assert credential.lease_id == await playing
            raise ZeroDivisionError
    released = revocation(await world.consume_until(REVOCATION_REQUEST, lambda r: True))
    assert (released.kind, released.lease_id) == ("release", credential.lease_id)


@pytest.mark.parametrize("kind", ["accepted", "refused"])
async def test_a_release_may_wait_for_the_revokers_word(world: World, agent: Agent, kind: str) -> None:
    lease_id = str(uuid.uuid4())
    releasing = asyncio.create_task(agent.release(lease_id, timeout_s=WITHIN_S))
    record = await world.consume_until(REVOCATION_REQUEST, lambda r: revocation(r).lease_id == lease_id)
    revoker = world.key("revoker")
    event = world.claims(
        ServiceEvent, Party("revoker", revoker), kind=kind, subject="revocation.request", actor=revocation(record).iss,
        ref=revocation(record).jti, reasons=(Reason(code="not_yours", message="not yours"),), at_ms=1,
    )  # fmt: skip
    await world.send(SERVICE_EVENT, "revoker", sign(event, revoker))
    if kind == "accepted":
        await releasing
    else:
        with pytest.raises(RefusedError, match="not yours"):
            await releasing


async def test_a_release_that_nobody_answers(world: World, agent: Agent) -> None:
    with pytest.raises(NotAnsweredError, match="the revoker did not answer"):
        await agent.release(str(uuid.uuid4()), timeout_s=0.3)


async def test_invalid_request_is_not_sent(world: World, agent: Agent) -> None:
    invalid: tuple[dict[str, Any], ...] = (
        {"task": "not-a-uuid"}, {"ttl_s": 0}, {"reason": ""}, {"verbs": []}, {"target": "No Target"},
        {"resources": [f"{'ü' * 500}/{number}" for number in range(64)]},
    )  # fmt: skip
    for wrong in invalid:
        with pytest.raises(InvalidCallError):
            await ask(agent, **wrong)
    with pytest.raises(ScopeError):
        await ask(agent, resources=["../prod"])
    assert list(await world.records(CREDENTIAL_REQUEST)) == []


# --- keys that change -------------------------------------------------------------------------------------------------


async def test_a_running_agent_takes_up_the_key_that_its_file_holds_by_now(
    world: World, tmp_path: Path
) -> None:
    old, new = world.party("agent", "bot").key, world.party("agent", "bot").key
    old.save(tmp_path / "bot.json")
    async with Agent.connect(tmp_path / "bot.json", client(world)) as agent:
        asked = ask(agent, reason="before")
        played = await arrived(world, lambda p: p.claims.reason == "before")
        new.save(tmp_path / "new.json")
        (tmp_path / "new.json").replace(tmp_path / "bot.json")
        later = ask(agent, reason="after")
        after = await arrived(world, lambda p: p.claims.reason == "after")
        assert [parse(p.compact).header.kid for p in (played, after)] == [old.kid, new.kid]
        # The one that was under way is answered, and goes on with the key that it was asked for with.
        for one in (played, after):
            await one.issue()
        held = [await asked, await later]
        assert [credential.key.kid for credential in held if credential.key] == [old.kid, new.kid]
        await agent.release(held[0])
        record = await world.consume_until(REVOCATION_REQUEST, lambda r: True)
        assert (parse(record.value).header.kid, revocation(record).iss) == (new.kid, new.id)


async def test_key_file_without_a_key_of_the_agent_is_ignored(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    old, other = world.party("agent", "bot").key, world.party("agent", "other").key
    file = tmp_path / "bot.json"
    old.save(file)
    async with Agent.connect(file, client(world)) as agent:
        for wrong in ("nothing", "half a key", "another's"):
            file.unlink()
            if wrong == "half a key":
                file.write_text('{"id": "spiffe://')
                file.chmod(0o600)
            elif wrong == "another's":
                other.save(file)
            asked = ask(agent, reason=wrong)
            played = await arrived(world, lambda p, wrong=wrong: p.claims.reason == wrong)  # type: ignore[misc]
            assert parse(played.compact).header.kid == old.kid, wrong
            await played.issue()
            await asked
            if wrong == "nothing":
                file.write_text("")
        assert "no key" in caplog.text
        assert other.id in caplog.text


async def test_a_key_can_be_handed_over(world: World, agent: Agent) -> None:
    new = world.party("agent", "bot").key
    with pytest.raises(IdentityError, match="stays it"):
        agent.use_key(world.party("agent", "other").key)
    agent.use_key(new)
    asked = ask(agent)
    played = await arrived(world)
    assert parse(played.compact).header.kid == new.kid
    await played.issue()
    assert (await asked).key == new
