"""The console's questions whether a person seconds or withdraws a proposal, and the evidence that goes with them."""

from __future__ import annotations

from typing import Any, cast

import pytest

from ringfence.client.errors import ApiError
from ringfence.console.commands import Commands
from ringfence.console.questions import Questions
from ringfence.console.security import SealedValues, Session
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import AgentSetCeiling, CommandSecond, CommandWithdraw
from tests.support.dual_control import DualControl, Proposed
from tests.support.in_memory_registry import TD, permission

WEB = permission("env/web")


class Reads:
    """What the registry and policy serve about one proposal of olga."""

    def __init__(self, org: DualControl, proposed: Proposed, *, policy: bool) -> None:
        self.id = digest(parse(proposed.jws).signing_input)
        self._org, self._proposed, self._policy = org, proposed, policy
        self.asked: list[tuple[str, Any, list[str]]] = []

    async def proposals(self) -> list[dict[str, Any]]:
        return [
            {
                "id": self.id, "typ": "agent.set-ceiling", "subject": "agent bot", "author": "olga",
                "at_ms": self._proposed.at_ms, "revision": 1, "command": self._proposed.jws,
            }
        ]  # fmt: skip

    async def proposal_evidence(self, id: str) -> dict[str, Any]:
        assert id == self.id
        agent = self._org.directory.agent("bot")
        assert agent is not None
        return {"trust": "t", "records": [agent.compact.decode()], "commands": [self._proposed.jws]}

    async def ceiling_report(self, agent_id: str, ceiling: Any, people: set[str]) -> str:
        if not self._policy:
            raise ApiError("policy is down", status=503)
        self.asked.append((agent_id, ceiling, sorted(people)))
        return "report"


async def draft(kind: str, *, policy: bool = True, id: str | None = None) -> tuple[Reads, Any]:
    org = DualControl()
    proposed = org.propose(org.claims(AgentSetCeiling, "olga", agent_id="bot", ceiling=(WEB,)))
    reads = Reads(org, proposed, policy=policy)
    key = SigningKey.generate(f"spiffe://{TD}/service/console")
    questions = Questions(SealedValues(lambda: key), org.trust, org.clock, TD, cast(Any, None))
    commands = Commands(questions, org.trust, cast(Any, None))
    session = Session("otto", "a.b.c", ends_at=questions.now_s() + 60, cookie_digest="c")
    form = {"id": id or reads.id}
    question = await commands.ask(kind, cast(Any, reads), session, form, "/proposals")
    return reads, await commands.draft(question, cast(Any, reads))


async def test_second_names_the_command_and_the_revision_that_was_listed() -> None:
    reads, asked = await draft("second")
    assert isinstance(asked.claims, CommandSecond)
    (named,) = asked.claims.commands
    assert (named.proposal, named.revision) == (reads.id, 1)
    assert asked.key == reads.id
    assert asked.evidence["report"] == "report"
    assert reads.asked[-1] == ("bot", (WEB,), ["olga", "sam"])


async def test_second_without_policy_has_no_report() -> None:
    _, asked = await draft("second", policy=False)
    assert "report" not in asked.evidence


async def test_withdrawal_names_the_proposal() -> None:
    reads, asked = await draft("withdraw-proposal")
    assert isinstance(asked.claims, CommandWithdraw)
    assert asked.claims.proposal == asked.key == reads.id


async def test_proposal_that_is_not_listed_is_no_question() -> None:
    with pytest.raises(ApiError, match="no such change"):
        await draft("second", id="0" * 64)
