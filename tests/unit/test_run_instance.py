"""The SDK inside a run: the key and the enrolment that init has put into a folder (`RINGFENCE_RUN_INSTANCE`)."""

from __future__ import annotations

from pathlib import Path

import pytest

from ringfence.client.agent.agent import Agent
from ringfence.client.errors import EnrolmentRefusedError, IdentityError, InvalidCallError
from ringfence.client.instance_enrolment import RUN_ENROLMENT_FILE, RUN_KEY_FILE, RunInstance
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey
from ringfence.messages.enrolment import InstanceEnrolment, RunRef
from ringfence.model.records.instances import is_same_requester
from tests.support.instance_enrolments import enrolment_of

AGENT = "spiffe://acme.example/agent/bot"
BEGINS_S, ENDS_S = 1_000_000, 1_000_600


class ClockAt(Clock):
    def __init__(self, now_s: int) -> None:
        self.now_s = now_s

    def now_ms(self) -> int:
        return self.now_s * 1000


def enrolment(key: SigningKey, agent: str = AGENT) -> str:
    return enrolment_of(key.public, agent, BEGINS_S, ENDS_S)


@pytest.fixture
def key() -> SigningKey:
    return SigningKey.generate(AGENT)


@pytest.fixture
def folder(tmp_path: Path, key: SigningKey) -> Path:
    key.save(tmp_path / RUN_KEY_FILE)
    (tmp_path / RUN_ENROLMENT_FILE).write_text(enrolment(key) + "\n")
    return tmp_path


def settings(folder: Path, **fields: object) -> ClientSettings:
    own = {"trust_domain": "acme.example", "trust_root": "x" * 43, "run_instance": folder, "agent": "bot"}
    return ClientSettings.model_validate({**own, **fields})


async def test_run_instance_has_the_key_and_enrolment_of_its_folder(folder: Path, key: SigningKey) -> None:
    enrolled = await RunInstance("bot", folder, settings(folder), ClockAt(BEGINS_S)).current()
    assert (enrolled.key.kid, enrolled.not_after) == (key.kid, ENDS_S)
    assert enrolled.enrolment == (folder / RUN_ENROLMENT_FILE).read_text().strip()


async def test_after_the_end_of_the_run_it_is_refused(folder: Path) -> None:
    clock = ClockAt(ENDS_S - 1)
    instance = RunInstance("bot", folder, settings(folder), clock)
    await instance.current()
    clock.now_s = ENDS_S
    with pytest.raises(EnrolmentRefusedError, match="start a new run"):
        await instance.current()


async def test_an_agent_connects_as_the_instance_without_other_settings(
    folder: Path, key: SigningKey
) -> None:
    own = settings(folder, door="unix:/run/ringfence/gateway.sock")
    agent = Agent.connect(settings=own, clock=ClockAt(BEGINS_S))
    await agent.connection.renew()
    assert agent.connection.key.kid == key.kid
    assert agent.connection.enrolment == (folder / RUN_ENROLMENT_FILE).read_text().strip()


async def test_a_key_that_is_given_wins(folder: Path) -> None:
    other = SigningKey.generate(AGENT)
    agent = Agent.connect(other, settings(folder, door="http://127.0.0.1:1"))
    await agent.connection.renew()
    assert agent.connection.key.kid == other.kid


def test_two_sources_of_a_key_are_refused(folder: Path) -> None:
    with pytest.raises(InvalidCallError, match="unset one"):
        Agent.connect(settings=settings(folder, attest="github", door="http://127.0.0.1:1"))


def test_without_the_agents_id_it_is_refused(folder: Path) -> None:
    with pytest.raises(IdentityError, match="RINGFENCE_AGENT"):
        Agent.connect(settings=settings(folder, agent=None, door="http://127.0.0.1:1"))


async def test_files_that_do_not_belong_together_are_refused(folder: Path, key: SigningKey) -> None:
    async def current(agent_id: str = "bot") -> None:
        await RunInstance(agent_id, folder, settings(folder), ClockAt(BEGINS_S)).current()

    with pytest.raises(IdentityError, match="RINGFENCE_AGENT"):
        await current("other")
    path = folder / RUN_ENROLMENT_FILE
    path.write_text(enrolment(SigningKey.generate(AGENT)))
    with pytest.raises(IdentityError):
        await current()
    path.write_text(enrolment(key, "spiffe://acme.example/agent/other"))
    with pytest.raises(IdentityError):
        await current()
    for text in ("", "a.b.c", "ä"):
        path.write_text(text)
        with pytest.raises(IdentityError, match="RINGFENCE_RUN_INSTANCE"):
            await current()
    path.unlink()
    with pytest.raises(IdentityError, match="RINGFENCE_RUN_INSTANCE"):
        await current()
    (folder / RUN_KEY_FILE).unlink()
    with pytest.raises(KeyFileError):
        await current()


def _enrolled(key: SigningKey, **fields: object) -> InstanceEnrolment:
    claims = parse(enrolment(key)).unverified_claims(InstanceEnrolment)
    return claims.model_copy(update=fields)


def test_requester_is_the_agent_the_run_or_the_platform_identity(key: SigningKey) -> None:
    task = "6b0e6a5e-61c5-4d4b-9f6a-5a1f6d7d3b52"
    one, other = (RunRef(run_id=f"{n}b0e6a5e-61c5-4d4b-9f6a-5a1f6d7d3b52", task_id=task) for n in (1, 2))
    pod = {"issuer": "https://pods.example", "subject": "pod-1", "run": None}
    requesters = {
        "the agent": None,
        "a run": _enrolled(key, run=one),
        "another run": _enrolled(key, run=other),
        "a pod": _enrolled(key, **pod),
        "another pod": _enrolled(key, **{**pod, "subject": "pod-2"}),
        "a pod of that name elsewhere": _enrolled(key, **{**pod, "issuer": "https://other.example"}),
    }
    renewed = SigningKey.generate(AGENT)
    for first, who in requesters.items():
        same = [second for second, by in requesters.items() if is_same_requester(who, by)]
        assert same == [first]
    assert is_same_requester(requesters["a pod"], _enrolled(renewed, **pod)), "it has renewed its key"
