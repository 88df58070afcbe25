"""Key files that agents renew: when, what is on disk at each moment, and what comes of copies of a file."""

from __future__ import annotations

import asyncio
import fcntl
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence import Agent, Permission, RequestDeniedError, RequestRule, RequestTimeoutError
from ringfence.client.agent.key_renewal import KeyRenewal
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.codes import Code
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import AgentRenewKey
from ringfence.messages.topics import REGISTRY_COMMAND, SERVICE_EVENT
from ringfence.model.records.agent_keys import DAY_S
from ringfence.testing import InMemoryRingfence
from ringfence.testing.parts import InMemoryConnection

READ: dict[str, Any] = {
    "target": "staging", "verbs": ["read"], "resources": ["env/x"], "reason": "to look",
}  # fmt: skip
SCOPE = [Permission(target="staging", verbs=("read",), resources=("env/**",))]


@pytest.fixture
def broker() -> InMemoryRingfence:
    made = InMemoryRingfence()
    made.target("staging", verbs={"read": "none"})
    made.answer_all("approved")
    return made


@pytest.fixture
def file(broker: InMemoryRingfence, tmp_path: Path) -> Path:
    """The key file of the registered agent bot."""
    file = tmp_path / "bot.json"
    broker.agent("bot", key_file=file)
    return file


def kid(file: Path) -> str:
    return SigningKey.load(file).kid


def beside(file: Path) -> list[str]:
    return sorted(path.name for path in file.parent.iterdir() if path != file)


async def connect(broker: InMemoryRingfence, file: Path) -> None:
    async with broker.agent("bot", key_file=file):
        pass


async def gets_credential(broker: InMemoryRingfence, agent: Agent, timeout_s: float = 5.0) -> bool:
    broker.user("uma", entitlements=SCOPE)  # of now: old ones do not count
    try:
        await agent.request(task=broker.task("bot", SCOPE), timeout_s=timeout_s, **READ)
    except (RequestDeniedError, RequestTimeoutError):
        return False
    return True


def state(broker: InMemoryRingfence) -> Any:
    entry = broker._services.directory.agent("bot")
    assert entry is not None
    return entry.state


def events(broker: InMemoryRingfence) -> list[ServiceEvent]:
    """The registry's events about the agent."""
    found = [parse(record.value).unverified_claims(ServiceEvent) for record in broker._bus.of(SERVICE_EVENT)]
    return [one for one in found if one.agent_id == "bot"]


def findings(broker: InMemoryRingfence) -> list[str]:
    """The codes of the registry's findings about the agent."""
    return [one.reasons[0].code for one in events(broker) if one.kind == "finding"]


def answers(broker: InMemoryRingfence) -> list[str]:
    """The registry's answers to renewals."""
    return [one.kind for one in events(broker) if one.subject == AgentRenewKey.typ and one.kind != "finding"]


def lost(broker: InMemoryRingfence, file: Path) -> list[str]:
    """Have the next answer to a renewal be lost, after the registry took it. Returns the keys that were on disk."""
    seen: list[str] = []

    async def send(agent: Agent, old: SigningKey, new: SigningKey) -> int:
        seen.append(kid(file.with_name("bot.json.next")))
        await Agent._send_renewal(agent, old, new)
        raise UnavailableError("the answer was lost")

    agent = broker.agent("bot", key_file=file)
    renewal = KeyRenewal(file, broker.clock)

    async def run() -> None:
        await agent.connection.start()
        await renewal.run(lambda old, new: send(agent, old, new))
        await agent.connection.close()

    asyncio.run(run())
    return seen


async def test_key_file_is_renewed_when_it_is_older_than_a_day(broker: InMemoryRingfence, file: Path):
    first = kid(file)
    await connect(broker, file)
    assert kid(file) == first
    broker.clock.advance(DAY_S + 60)
    async with broker.agent("bot", key_file=file) as agent:
        assert kid(file) != first
        assert agent.connection.key.kid == kid(file)
        assert await gets_credential(broker, agent)
    assert file.stat().st_mode & 0o777 == 0o600
    assert beside(file) == ["bot.json.lock"]


async def test_agent_that_stays_connected_renews_before_a_request(broker: InMemoryRingfence, file: Path):
    async with broker.agent("bot", key_file=file) as agent:
        first = kid(file)
        broker.clock.advance(29 * DAY_S)
        assert await gets_credential(broker, agent)
        assert kid(file) != first


async def test_renewed_key_is_renewed_after_a_quarter_of_its_life(broker: InMemoryRingfence, file: Path):
    broker.clock.advance(2 * DAY_S)
    await connect(broker, file)
    second = kid(file)
    broker.clock.advance(7 * DAY_S)
    await connect(broker, file)
    assert kid(file) == second
    broker.clock.advance(DAY_S)
    await connect(broker, file)
    assert kid(file) != second


async def test_agent_lives_through_a_year_without_a_person(broker: InMemoryRingfence, file: Path):
    for _ in range(73):
        broker.clock.advance(5 * DAY_S)
        await connect(broker, file)
    assert len(state(broker).keys) < 50
    async with broker.agent("bot", key_file=file) as agent:
        assert await gets_credential(broker, agent)


def test_lost_answer_is_repeated_with_the_same_key(broker: InMemoryRingfence, file: Path):
    """Also what a crash between sending and writing leaves behind."""
    first = kid(file)
    broker.clock.advance(2 * DAY_S)
    sent = lost(broker, file)
    assert kid(file) == first
    assert state(broker).keys[0].kid == sent[0]
    broker.clock.advance(DAY_S)
    asyncio.run(connect(broker, file))
    assert kid(file) == sent[0]
    assert state(broker).compromised == ()
    assert beside(file) == ["bot.json.lock"]


async def test_two_processes_with_one_file_renew_once(broker: InMemoryRingfence, file: Path):
    broker.clock.advance(2 * DAY_S)
    one, other = (broker.agent("bot", key_file=file) for _ in range(2))
    with file.with_name("bot.json.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        starting = asyncio.gather(one.start(), other.start())
        await asyncio.sleep(0)
    await starting
    assert len(state(broker).renewed) == 1
    assert answers(broker) == ["accepted"]
    assert one.connection.key.kid == other.connection.key.kid == kid(file)
    await asyncio.gather(one.close(), other.close())


async def test_key_file_that_cannot_be_replaced_is_not_renewed(
    broker: InMemoryRingfence, file: Path, caplog: pytest.LogCaptureFixture
):
    mounted = file.rename(file.with_name("secret.json"))
    file.symlink_to(mounted)
    broker.clock.advance(2 * DAY_S)
    with caplog.at_level(logging.WARNING):
        async with broker.agent("bot", key_file=file) as agent:
            assert await gets_credential(broker, agent)
    assert state(broker).renewed == ()
    assert "cannot be replaced (it is a symbolic link)" in caplog.text
    assert "--key-days" in caplog.text


async def test_suspended_agent_keeps_its_key_file(broker: InMemoryRingfence, file: Path):
    first = kid(file)
    await broker.administrator("sam").suspend_agent("bot", reason="x")
    broker.clock.advance(2 * DAY_S)
    await connect(broker, file)
    assert kid(file) == first
    assert beside(file) == ["bot.json.lock"]


@pytest.mark.parametrize(("who", "code"), [("agent", Code.KEY_REUSED), ("thief", Code.KEY_REUSED)])
async def test_use_of_a_copied_key_file_ends_the_line_whoever_renews_first(
    broker: InMemoryRingfence, file: Path, who: str, code: Code
):
    copy = file.with_name("copy.json")
    shutil.copy2(file, copy)
    first, second = (file, copy) if who == "agent" else (copy, file)
    broker.clock.advance(2 * DAY_S)
    await connect(broker, first)
    assert kid(first) != kid(second)
    broker.clock.advance(600)
    await connect(broker, second)
    assert set(state(broker).compromised) == {key.kid for key in state(broker).keys}
    assert findings(broker) == [code]
    async with broker.agent("bot", key_file=first) as agent:
        assert not await gets_credential(broker, agent, timeout_s=1.0)


async def test_request_by_a_copied_key_ends_the_line(broker: InMemoryRingfence, file: Path):
    stolen = SigningKey.load(file)
    broker.clock.advance(2 * DAY_S)
    await connect(broker, file)
    thief = Agent(InMemoryConnection(broker._bus, stolen, broker.settings, broker.clock))
    async with thief:
        broker.clock.advance(240)
        assert not await gets_credential(broker, thief, timeout_s=1.0)
        assert state(broker).compromised == ()
        broker.clock.advance(120)
        assert not await gets_credential(broker, thief, timeout_s=1.0)
    assert set(state(broker).compromised) == {key.kid for key in state(broker).keys}


async def test_lease_of_a_renewed_key_is_proved_by_that_key_until_it_ends(
    broker: InMemoryRingfence, file: Path
):
    served = httpx.MockTransport(lambda request: httpx.Response(200, text="served"))
    rule = RequestRule(method="GET", path="/env/{name}", verb="read", resource="env/{name}")
    broker.target("staging", verbs={"read": "none"}, requests=[rule], server=served)
    task = broker.task("bot", SCOPE)
    through = httpx.AsyncClient(
        transport=broker.gateway(), base_url=f"{broker.gateway_url}/staging", timeout=60
    )
    async with broker.agent("bot", key_file=file) as agent, through:
        lease = await agent.request(task=task, delivery="gateway", ttl_s=3000, **READ)
        former = agent.connection.key
        os.utime(file, (0, 0))
        broker.clock.advance(60)
        other = await agent.request(task=task, delivery="gateway", ttl_s=3000, **READ)
        assert agent.connection.key.kid != former.kid
        for one in (lease, other):
            assert (await through.get("/env/x", auth=one.auth())).text == "served"
        renewals = AgentRenewKey(
            **agent.connection.stamp(60),
            agent_id="bot",
            key=SigningKey.generate(agent.connection.key.id).public,
        )
        broker.clock.advance(600)
        late = renewals.model_copy(update={"iat": renewals.iat + 600, "exp": renewals.exp + 600})
        await agent.connection.publish(REGISTRY_COMMAND, "bot", late, compact=sign(late, former))
        for one in (lease, other):
            assert (await through.get("/env/x", auth=one.auth())).status_code in (401, 403)


async def test_restored_key_file_ends_the_line(broker: InMemoryRingfence, file: Path, tmp_path: Path):
    backup = Path(shutil.copy2(file, tmp_path / "backup.json"))
    for _ in range(2):
        broker.clock.advance(9 * DAY_S)
        await connect(broker, file)
    shutil.copy2(backup, file)
    await connect(broker, file)
    assert state(broker).compromised


async def test_restored_key_file_after_its_end_ends_nothing(broker: InMemoryRingfence, file: Path):
    backup = Path(shutil.copy2(file, file.with_name("backup.json")))
    for _ in range(4):
        broker.clock.advance(9 * DAY_S)
        await connect(broker, file)
    await connect(broker, backup)
    assert state(broker).compromised == ()
    assert findings(broker) == ["key_reused_late"]
    async with broker.agent("bot", key_file=file) as agent:
        assert await gets_credential(broker, agent)
