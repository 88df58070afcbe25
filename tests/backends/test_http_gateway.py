"""What a static secret is for the gateway to do alone: inject it and hide it, and stop when it may no more."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.messages.base import Permission
from ringfence.messages.registry import BackendSettings, VerbFloor
from tests.backends.gated import SECRET, VERBS, Gated, gated
from tests.backends.insisting import MARK, WAIT
from tests.backends.kinds import TARGET, HttpKind, allow
from tests.backends.through import ThroughGateway
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support import secret_canary
from tests.support.world import WITHIN_S

GRACE_S = 2.0
NEXT = "canary-of-the-next-key"
BEARER = ("Authorization", f"Bearer {SECRET}")
BASIC = ("Authorization", f"Basic {base64.b64encode(f'ringfence:{SECRET}'.encode()).decode()}")
READS = (allow("read", "path/a"),)


@pytest.fixture(scope="module")
async def stage(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Gated]:
    folder = tmp_path_factory.mktemp("http-gateway")
    async with gated(kafka, redis_server, folder, TARGET, grace_s=GRACE_S) as stage:
        yield stage


@pytest.fixture
async def handle(stage: Gated) -> str:
    """Of a lease that reads `a`."""
    return await stage.leased(READS)


async def until(true: Callable[[], Awaitable[bool]], what: str) -> None:
    try:
        async with asyncio.timeout(WITHIN_S):
            while not await true():
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"not within {WITHIN_S:.0f} s: {what}") from None


# --- what is injected -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"auth": "basic", "username": "ringfence"}, BASIC),
        ({"auth": "header", "header": "X-Api-Key"}, ("X-Api-Key", SECRET)),
        ({"auth": "header", "header": "X-Auth", "scheme": "Key"}, ("X-Auth", f"Key {SECRET}")),
        ({}, BEARER),
    ],
)
async def test_the_api_has_it_once_and_the_agent_never(
    stage: Gated, handle: str, settings: dict[str, str], wanted: tuple[str, str]
) -> None:
    """The API sends back all that it is told, in its head and its body."""
    stage.api.wanted = {wanted}
    await _recorded(stage, settings)

    async def passes() -> bool:
        answer, mark = await stage.send(handle, "GET", "/a")
        assert len(stage.api.came(mark)) == 1
        return answer.status == 200

    await until(passes, "the gateway knows the record")
    name, value = wanted
    own = [(name, "the-agents-own"), (name.upper(), "another"), (name.replace("-", "_"), "a third")]
    own = [(key, said) for key, said in own if key.lower() != "authorization"]  # it says who the agent is
    answer, mark = await stage.send(handle, "GET", "/a", own)
    (came,) = stage.api.came(mark)
    assert came.all(name) == [value]
    assert "*" * len(SECRET) in answer.get("X-Shown")
    hidden = [line for line in answer.body.decode().splitlines() if "*****" in line]
    assert len(hidden) == 1
    assert value.rpartition(" ")[2] not in answer.body.decode()


async def _recorded(stage: Gated, settings: dict[str, str]) -> None:
    backend: dict[str, Any] = {"kind": "http", "url": stage.api.url, **settings}
    await stage.world.target(
        TARGET,
        backend=BackendSettings.model_validate(backend),
        verbs=[VerbFloor(verb=verb) for verb in VERBS],
        requests=TEMPLATES["http"].requests,
    )


async def test_stolen_handle_injects_nothing(stage: Gated, handle: str) -> None:
    """A handle is no secret, so whoever found one has nothing."""
    stranger = stage.world.party("agent", "a-stranger")
    other = await stage.world.agent("another-bot", sponsor=stage.desk.sam)
    for who, code in ((stranger, "proof_by_stranger"), (other, "handle_other_agent")):
        agent = ThroughGateway(who.key, stage.gateway.port)
        await until(lambda: _told(agent, handle, who.name, code), code)  # noqa: B023 - awaited here
        assert stage.api.came(who.name) == []


async def _told(agent: ThroughGateway, handle: str, mark: str, code: str) -> bool:
    answer = await agent.send(handle, "GET", f"/{TARGET}/a", [(MARK, mark)])
    assert answer.status in (401, 403)
    return bool(answer.json()["code"] == code)


async def test_names_that_no_lease_can_have_are_refused_before_there_is_one(stage: Gated) -> None:
    for resource in HttpKind.unsayable:
        wrong = Permission.model_construct(target=TARGET, verbs=("read",), resources=(resource,))
        asked = await stage.desk.ask(scope=(wrong,), delivery="gateway")
        await stage.desk.decide(asked)
        content = await stage.desk.answer(asked)
        assert content.lease is None, resource
        assert [reason.code for reason in stage.desk.refusal(content).reasons] == ["scope_invalid"], resource


# --- when it is replaced ----------------------------------------------------------------------------------------------


async def test_a_key_that_is_replaced_at_its_source_breaks_no_agent(stage: Gated, handle: str) -> None:
    """The lease lives on, no request fails, a stream goes on, and nobody starts anything again."""
    enough, statuses = asyncio.Event(), []

    async def asks() -> None:
        while not enough.is_set():
            answer, _ = await stage.send(handle, "GET", "/a")
            statuses.append(answer.status)

    after = ("Authorization", f"Bearer {NEXT}")
    async with stage.session(handle, "/a") as lives:
        asking = asyncio.create_task(asks())
        stage.api.wanted = {BEARER, after}
        stage.write_secret(NEXT)
        await until(lambda: _last(stage, after), "the new key is injected")
        stage.api.wanted = {after}
        seen = len(statuses)
        await until(lambda: _more(statuses, seen), "requests without the old key")
        enough.set()
        await asking
        assert await lives()
    assert set(statuses) == {200}
    # The other way round, the API says no, not Ringfence; and the next request is good.
    stage.api.wanted = {BEARER}
    answer, mark = await stage.send(handle, "GET", "/a")
    assert (answer.status, len(stage.api.came(mark))) == (401, 1)
    stage.write_secret(SECRET)
    assert await stage.may(handle, ("GET", "/a"))


async def _last(stage: Gated, wanted: tuple[str, str]) -> bool:
    return stage.api.received[-1].all(wanted[0]) == [wanted[1]]


async def _more(statuses: list[int], than: int) -> bool:
    return len(statuses) > than + 5


@pytest.mark.parametrize("secret", [None, "canary\r\nX-Admin: yes", "canary\x00", "canarý"])
async def test_missing_or_malformed_secret_forwards_nothing(
    stage: Gated, handle: str, secret: str | None
) -> None:
    if secret is None:
        stage.source.unlink()
    else:
        stage.source.write_text(secret)
    answer, mark = await stage.send(handle, "GET", "/a")
    stage.write_secret(SECRET)
    assert answer.status == 503
    assert b"canar" not in answer.body
    assert stage.api.came(mark) == []
    assert await stage.may(handle, ("GET", "/a"))


# --- how it ends ------------------------------------------------------------------------------------------------------


async def test_from_the_cut_on_nothing_is_injected(stage: Gated, handle: str) -> None:
    bystander = await stage.leased(READS)
    async with stage.session(handle, "/a") as lives, stage.session(bystander, "/a") as others:
        waiting = asyncio.create_task(stage.send(handle, "GET", "/a", [WAIT]))
        await until(lambda: _waits(stage), "the API has the request that it does not answer")
        await stage.cut(handle)
        assert not await lives()
        answer, _ = await waiting
        assert (answer.status, answer.json()["code"]) == (403, "lease_ended")
        stage.api.go_on.set()
        assert await others()
        for _ in range(5):
            status, code = await stage.refusal(handle)
            assert (status, code) in ((403, "lease_ended"), (403, "lease_cut"))
        assert await stage.may(bystander, ("GET", "/a"))


async def _waits(stage: Gated) -> bool:
    return any(one.all(WAIT[0]) for one in stage.api.received)


async def test_a_view_that_nobody_confirms_lets_nothing_pass_and_ends_what_is_open(
    stage: Gated, handle: str
) -> None:
    async with stage.session(handle, "/a") as lives:
        async with stage.alone():

            async def denied() -> bool:
                answer, mark = await stage.send(handle, "GET", "/a")
                if answer.status == 200:
                    return False
                assert (answer.status, answer.json()["code"]) == (503, "stale_view")
                assert stage.api.came(mark) == []
                return True

            await until(denied, "the view is older than its grace")
            assert await denied()
            await until(lambda: _over(lives), "what is open ends")

        async def passes() -> bool:
            return not await denied()

        await until(passes, "the lease, which lives, counts again")


async def _over(lives: Callable[[], Awaitable[bool]]) -> bool:
    return not await lives()


async def test_a_gateway_that_is_killed_leaves_nothing_and_comes_back_without_what_was_cut(
    stage: Gated, handle: str
) -> None:
    other = await stage.leased(READS)
    before = len(stage.api.received)
    stage.api.go_on.clear()
    waiting = asyncio.create_task(stage.send(handle, "GET", "/a", [WAIT]))
    await until(lambda: _longer(stage, before), "the API has the request")
    await stage.gateway.kill()
    answer, _ = await waiting
    assert answer.status == 0  # nobody is there to answer
    stage.api.go_on.set()
    await stage.cut(handle)  # while the gateway is away
    assert _left(stage) == []
    await stage.gateway.start()
    assert (await stage.refusal(handle))[0] in (401, 403)
    await stage.usable(other)
    assert await stage.may(other, ("GET", "/a"))
    assert _left(stage) == []
    assert secret_canary.in_files([stage.gateway.folder], [TARGET]), "a scan must be able to find something"


async def _longer(stage: Gated, than: int) -> bool:
    return len(stage.api.received) > than


def _left(stage: Gated) -> list[str]:
    """Spool, logs and temporary files of the gateway that have a secret; and what was told to the agent."""
    secrets = [*stage.secrets, *(base64.b64encode(one.encode()).decode() for one in stage.secrets)]
    return secret_canary.in_files([stage.gateway.folder], secrets) + secret_canary.in_texts(
        stage.told, secrets
    )
