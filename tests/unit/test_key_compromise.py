"""The ends of keys that rest on a compromised one, as `ringfence user end-key` sends them, without Kafka."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.cli.commands.user_keys import _end_resting, _given_meanwhile
from ringfence.client.admin.administrator import Administrator
from ringfence.client.admin.key_compromise import MAX_KEYS_AT_ONCE, KeyCompromise
from ringfence.client.errors import RefusedError
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import Reason
from ringfence.messages.registry import AgentRotateKey
from tests.support.in_memory_registry import TD, InMemoryRegistry
from tests.support.user_keys import end_key


@dataclass
class Otto:
    """otto's administrator, over a registry in memory."""

    ledger: InMemoryRegistry
    refuses: frozenset[str] = frozenset()
    """Agents whose commands the registry refuses."""
    sent: list[str] = field(default_factory=list)
    """The agent or user of each command."""
    id: str = "otto"
    is_root: bool = False

    @property
    def connection(self) -> Any:
        return SimpleNamespace(
            current_directory=self.directory, key=self.ledger.key("otto"), passkey_user=None
        )

    async def directory(self) -> Any:
        return self.ledger.directory

    async def end_user_key(self, user: str, kid: str, **fields: Any) -> None:
        self.give(user, end_key(self.ledger, "otto", user, kid, **fields))

    async def rotate_key(self, agent: str, key: None, *, replaces: Sequence[str], **fields: Any) -> None:
        command = self.ledger.claims(
            AgentRotateKey, "otto", agent_id=agent, replaces=tuple(replaces), **fields
        )
        self.give(agent, command)

    def give(self, id: str, command: Any) -> None:
        self.sent.append(id)
        if id in self.refuses:
            raise RefusedError(command.typ, [Reason(code="any", message="no room")], "registry")
        self.ledger.give(command)


@pytest.fixture
def ledger() -> InMemoryRegistry:
    ledger = InMemoryRegistry()
    ledger.organisation()
    return ledger


def give_keys(ledger: InMemoryRegistry, agent: str, count: int) -> None:
    for _ in range(count):
        key = ledger.key_record(SigningKey.generate(f"spiffe://{TD}/agent/{agent}"))
        ledger.give(ledger.claims(AgentRotateKey, "sam", agent_id=agent, key=key, overlap_s=3600))


async def ended_by(otto: Otto, user: str) -> tuple[list[tuple[str, bool]], KeyCompromise]:
    kid = otto.ledger.key(user).kid
    await otto.end_user_key(user, kid, compromised=True)
    otto.sent.clear()
    found = KeyCompromise(otto.ledger.directory, user, kid)
    ends = await _end_resting(cast(Administrator, otto), found, "stolen")
    return [(key.id, is_ended) for key, is_ended in ends], found


async def test_many_keys_of_an_agent_end_by_few_commands(ledger: InMemoryRegistry) -> None:
    ledger.give(ledger.register("sam", "bot", "sam"))
    give_keys(ledger, "bot", MAX_KEYS_AT_ONCE)
    otto = Otto(ledger)
    ended, found = await ended_by(otto, "sam")
    assert ended == [("bot", True)] * (MAX_KEYS_AT_ONCE + 1)
    assert otto.sent == ["bot", "bot"]
    assert found.keys() == []


async def test_refused_end_leaves_those_of_others_and_is_told(
    ledger: InMemoryRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.give(ledger.register("sam", "full", "sam"))
    ledger.give(ledger.register("sam", "bot", "sam"))
    otto = Otto(ledger, refuses=frozenset({"full"}))
    ended, _ = await ended_by(otto, "sam")
    assert ended == [("bot", True), ("full", False)]
    assert otto.sent == ["full", "bot"]
    assert "full" in capsys.readouterr().err


async def test_rights_given_between_question_and_end_are_told(
    ledger: InMemoryRegistry, capsys: pytest.CaptureFixture[str]
) -> None:
    ledger.give(ledger.register("sam", "bot", "sam"))
    found = KeyCompromise(ledger.directory, "sam", ledger.key("sam").kid)
    known = found.rights(ledger.clock.ms / 1000)
    assert [one.id for one in known] == ["bot"]
    ledger.give(ledger.register("sam", "night-bot", "sam"))
    later = _given_meanwhile(found, known, ledger.clock.ms / 1000)
    assert [(one.id, one.what) for one in later] == [("night-bot", "registered this agent")]
    told = capsys.readouterr().err
    assert "night-bot" in told
    assert "agent bot" not in told
