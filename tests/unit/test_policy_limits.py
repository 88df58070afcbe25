"""Who asks too often, or waited for too long, is told so, and told when to ask again."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from ringfence.kernel.crypto.jws import Signed
from ringfence.messages.credential import Coordinates, CredentialRequest
from ringfence.model.records.command_chain import ChainError
from ringfence.model.verdict import ALLOWED, Allowed
from ringfence.policy.domain import Case, RequestRefused
from ringfence.policy.incoming.admission import (
    PENDING_RETRY_S,
    AdmissionControl,
    AdmissionLimits,
    PendingApprovalLimit,
    PendingLimits,
)
from tools.schemas.examples import EXAMPLES

MINUTE = 60_000
START = 1_800_000_000_000 - 1_800_000_000_000 % MINUTE


@dataclass
class Agents:
    """Which agent has which sponsor; an agent of None has a record that is not believed."""

    sponsors: dict[str, str | None] = field(default_factory=lambda: {"a": "sam", "b": "sam", "c": "sue"})

    def agent(self, agent_id: str) -> Any:
        sponsor = self.sponsors[agent_id]
        if sponsor is None:
            raise ChainError("not believed")
        return SimpleNamespace(state=SimpleNamespace(sponsor=sponsor))


def gatekeeper(agent: int = 0, sponsor: int = 0, wait_s: int = 0) -> AdmissionControl:
    return AdmissionControl(cast(Any, Agents()), AdmissionLimits(agent, sponsor, wait_s))


def case(agent: str = "a", at_ms: int = START) -> Case:
    claims = cast(CredentialRequest, EXAMPLES[CredentialRequest])
    place = Coordinates(topic="t", partition=0, offset=0, appended_at_ms=at_ms)
    return Case(Signed(claims, "a.b.c"), "5b0a4d7e-6c0f-5d39-9b5e-0a4d7e6c0f5d", agent, place, None)


def codes(admissions: list[Allowed | RequestRefused]) -> list[str | None]:
    return [one.reasons[0].code if isinstance(one, RequestRefused) else None for one in admissions]


def test_each_agent_has_its_own_number_a_minute():
    gate = gatekeeper(agent=2)
    asked = [gate.admit(case(agent), START) for agent in "aaabba"]
    assert codes(asked) == [None, None, "rate_limited", None, None, "rate_limited"]


def test_the_agents_of_a_sponsor_share_one():
    gate = gatekeeper(sponsor=2)
    assert codes([gate.admit(case(agent), START) for agent in "abac"]) == [None, None, "rate_limited", None]


def test_the_next_minute_counts_anew_and_the_refusal_says_when_it_begins():
    gate = gatekeeper(agent=1)
    assert gate.admit(case(at_ms=START + 1), START + 1) == ALLOWED
    refused = gate.admit(case(at_ms=START + 17_500), START + 17_500)
    assert isinstance(refused, RequestRefused)
    assert refused.outcome == "denied"
    assert refused.retry_after_s == 43
    assert gate.admit(case(at_ms=START + MINUTE), START + MINUTE) == ALLOWED


def test_refused_request_does_not_use_up_the_rate():
    gate = gatekeeper(agent=1, sponsor=2)
    assert codes([gate.admit(case(agent), START) for agent in "aaaab"]) == [
        None, "rate_limited", "rate_limited", "rate_limited", None,
    ]  # fmt: skip


def test_a_backlog_is_counted_by_the_time_when_it_was_sent():
    gate = gatekeeper(agent=1)
    late = START + 10 * MINUTE
    assert codes([gate.admit(case(at_ms=START + n * MINUTE), late) for n in range(3)]) == [None] * 3


def test_a_partition_that_is_read_a_little_later_begins_no_new_minute():
    gate = gatekeeper(agent=1)
    times = [START + MINUTE, START + MINUTE - 1, START + MINUTE + 1]
    assert codes([gate.admit(case(at_ms=at), at) for at in times]) == [None, "rate_limited", "rate_limited"]


@pytest.mark.parametrize(("age_ms", "refused"), [(5000, False), (5001, True)])
def test_request_waiting_too_long_is_refused_with_retry_after(age_ms: int, refused: bool):
    admission = gatekeeper(wait_s=5).admit(case(), START + age_ms)
    assert isinstance(admission, RequestRefused) == refused
    if isinstance(admission, RequestRefused):
        assert (admission.reasons[0].code, admission.retry_after_s) == ("overloaded", 5)


def test_0_is_without_limit():
    gate = gatekeeper()
    assert codes([gate.admit(case(), START + 10**9) for _ in range(1000)]) == [None] * 1000


def test_an_agent_that_is_not_believed_is_counted_all_the_same():
    gate = AdmissionControl(cast(Any, Agents({"x": None})), AdmissionLimits(1, 1, 0))
    assert codes([gate.admit(case("x"), START) for _ in range(2)]) == [None, "rate_limited"]


# --- what waits for people ---


class Waiting:
    """The memory of policy, as far as it tells what waits; requests are known from their claim on."""

    def __init__(self) -> None:
        self.known: dict[str, SimpleNamespace] = {}

    def claim(self, request_id: str, agent_id: str, outcome: str | None = None) -> None:
        self.known[request_id] = SimpleNamespace(request_id=request_id, agent_id=agent_id, outcome=outcome)

    def get(self, request_id: str) -> Any:
        return self.known.get(request_id)

    def waiting(self) -> Any:
        return Counter(one.agent_id for one in self.known.values() if one.outcome == "approval_required")


def doorkeeper(agent: int = 0, sponsor: int = 0) -> tuple[PendingApprovalLimit, Waiting]:
    waiting = Waiting()
    return PendingApprovalLimit(
        cast(Any, Agents()), cast(Any, waiting), PendingLimits(agent, sponsor)
    ), waiting


def ask(door: PendingApprovalLimit, waiting: Waiting, *agents: str) -> list[str | None]:
    """One request of each agent, one after the other, none decided meanwhile."""
    found = []
    for agent in agents:
        id = f"{agent}-{len(waiting.known)}"
        waiting.claim(id, agent)
        sponsor = Agents().sponsors[agent]
        admission = door.admit(replace(case(agent), request_id=id), sponsor or "")
        if isinstance(admission, RequestRefused):
            waiting.known[id].outcome = "denied"
            assert admission.retry_after_s == PENDING_RETRY_S
        found.append(admission)
    return codes(found)


def test_an_agent_has_so_many_requests_wait_and_no_more():
    door, waiting = doorkeeper(agent=2)
    # Also of those that are decided at the same time.
    assert ask(door, waiting, *"aaab") == [None, None, "approvals_pending_limit", None]
    for one in waiting.known.values():
        one.outcome = one.outcome or "approval_required"
    assert ask(door, waiting, *"abb") == ["approvals_pending_limit", None, "approvals_pending_limit"]
    next(one for one in waiting.known.values() if one.agent_id == "a").outcome = "allowed"
    assert ask(door, waiting, *"aa") == [None, "approvals_pending_limit"]


def test_the_agents_of_one_sponsor_leave_the_next_sponsor_in_peace():
    door, waiting = doorkeeper(agent=2, sponsor=3)
    assert ask(door, waiting, *"aabbcc") == [None, None, None, "approvals_pending_limit", None, None]


def test_a_request_that_is_tried_again_counts_once():
    door, waiting = doorkeeper(agent=1)
    waiting.claim("one", "a")
    again = [door.admit(replace(case("a"), request_id="one"), "sam") for _ in range(3)]
    assert codes(again) == [None, None, None]


def test_0_lets_any_number_wait():
    door, waiting = doorkeeper()
    assert ask(door, waiting, *"aaaaaa") == [None] * 6
