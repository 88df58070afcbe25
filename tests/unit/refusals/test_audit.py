"""Why audit rejects a review of break glass, and why a lease or an action does not lead back to a person."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

import pytest

from ringfence.audit.events.break_glass import check_review
from ringfence.audit.index.coverage import LeaseBasis, action_fault, lease_fault
from ringfence.audit.index.store import ISSUED, _position
from ringfence.audit.trail.proofs import ProofStore
from ringfence.audit.trail.unauthorised_records import rejection_of
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import BreakGlassReview
from ringfence.messages.codes import Code
from ringfence.messages.topics import AUDIT
from ringfence.model.leases.lifecycle import CLOCKS_S
from tests.support.verdicts import code_of, refusal_code

REQUEST: Final = "0c6f2f2e-55a3-5f0e-8f4e-2f2e55a35f0e"
REVIEW: Final = BreakGlassReview(
    iss="spiffe://acme.example/user/adam", aud="acme.example", iat=1, jti="r1", request_id=REQUEST,
    decision_digest="0" * 64, agent_id="bot", note="seen",
)  # fmt: skip
USE: Final = {
    "decision_digest": "0" * 64,
    "approvers": ["olga", "otto"],
    "sponsor": "sam",
    "on_behalf_of": "uma",
}

REVIEWS: Final[dict[Code, dict[str, Any]]] = {
    Code.NOT_REVIEWER: {"roles": ("sponsor",)},
    Code.BREAK_GLASS_UNKNOWN: {"use": None},
    Code.REVIEWER_APPROVED: {"reviewer": "olga"},
    Code.REVIEWER_INVOLVED: {"reviewer": "sam"},
}


def review(**changed: Any) -> str | None:
    given: dict[str, Any] = {"reviewer": "adam", "roles": ("auditor",), "use": USE, **changed}
    return code_of(check_review(REVIEW, **given))


@pytest.mark.parametrize(("code", "changed"), REVIEWS.items(), ids=REVIEWS)
def test_review_is_rejected(code: Code, changed: dict[str, Any]) -> None:
    assert review() is None
    assert review(**changed) == code


def test_review_of_another_decision_is_rejected() -> None:
    assert review(use={**USE, "decision_digest": "1" * 64}) == "break_glass_unknown"


# --- coverage ---------------------------------------------------------------------------------------------------------

END_S: Final = 1000
FIELDS: Final[dict[str, Any]] = {
    "lease": "l", "request": "r", "task": "t", "agent": "bot", "on_behalf_of": "uma", "deadline": END_S,
    "decision": "d", "decision_digest": "0", "verified": {"by": "issuer", "embedded": ["credential.request"]},
}  # fmt: skip


def event(**changed: Any) -> dict[str, Any]:
    """An event with everything that a lease, its decision and its task have; without the fields that are None."""
    fields = {name: value for name, value in {**FIELDS, **changed}.items() if value is not None}
    return {"metadata": {"event_code": ISSUED, "uid": "u"}, "unmapped": fields, "time": END_S * 1000}


UNVERIFIED: Final[dict[str, Any]] = {"verified": {}}
LEASES: Final[dict[Code, dict[str, Any]]] = {
    Code.UNREADABLE: {"lease": event(deadline=None)},
    Code.LEASE_UNVERIFIED: {"lease": event(**UNVERIFIED)},
    Code.DECISION_MISSING: {"decisions": []},
    Code.DECISION_DIFFERS: {"decisions": [event(decision_digest="1")]},
    Code.REQUEST_UNVERIFIED: {"decisions": [event(verified={"by": "policy"})]},
    Code.TASK_MISSING: {"task": event(**UNVERIFIED)},
    Code.TASK_DIFFERS: {"task": event(on_behalf_of="sam")},
    Code.HUMAN_UNKNOWN: {"people": ()},
}
ACTIONS: Final[dict[Code, dict[str, Any]]] = {
    Code.NO_LEASE: event(lease=None),
    Code.LEASE_UNKNOWN: event(lease="other"),
    Code.OTHER_AGENT: event(agent="other"),
    Code.AFTER_END: {**event(), "time": (END_S + CLOCKS_S) * 1000 + 1},
    Code.DECISION_MISSING: event(),
}


def fault(
    lease: dict[str, Any] | None = None,
    decisions: list[Mapping[str, Any]] | None = None,
    task: dict[str, Any] | None = None,
    people: tuple[str, ...] = ("uma",),
) -> Code | None:
    allowed: list[Mapping[str, Any]] = [event()] if decisions is None else decisions
    basis = LeaseBasis(allowed={"r": allowed}, tasks={"t": task or event()})
    return lease_fault(lease or event(), basis, lambda user: user in people)


@pytest.mark.parametrize(("code", "changed"), LEASES.items(), ids=LEASES)
def test_lease_does_not_lead_to_a_person(code: Code, changed: dict[str, Any]) -> None:
    assert fault() is None
    assert fault(**changed) == code


@pytest.mark.parametrize(("code", "action"), ACTIONS.items(), ids=ACTIONS)
def test_action_does_not_lead_to_a_person(code: Code, action: dict[str, Any]) -> None:
    assert action_fault(action, LeaseBasis(issued={"l": event()}), lambda user: True) == code


# --- questions --------------------------------------------------------------------------------------------------------

QUESTIONS: Final[dict[Code, Callable[[], object]]] = {
    Code.NO_PROOF: lambda: ProofStore(TrustStore("acme.example", "root"), None).inclusion(b"{}"),
    Code.NOT_JSON: lambda: rejection_of(Received(AUDIT, "ringfence.audit.v1", 0, 0, 1, "k", b"x")),
    Code.CURSOR_LOST: lambda: _position("no cursor"),
}


@pytest.mark.parametrize(("code", "ask"), QUESTIONS.items(), ids=QUESTIONS)
def test_question_has_no_answer(code: Code, ask: Callable[[], object]) -> None:
    assert refusal_code(ask) == code
