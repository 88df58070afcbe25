"""Keys that agents renew: what a renewal changes, until when it is taken, and what ends a line of keys."""

from __future__ import annotations

import uuid
from typing import Any

import pytest

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Claims
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import (
    AgentRenewKey,
    AgentReportReuse,
    AgentResume,
    AgentRotateKey,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
)
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.model.records.agent_keys import DAY_S, is_lost
from ringfence.model.verdict import Allowed
from tests.support import leases
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry
from tests.support.user_keys import end_key

BOT = f"spiffe://{TD}/agent/bot"
KEY_S = 30 * DAY_S


@pytest.fixture
def ledger() -> InMemoryRegistry:
    """An organisation whose agent bot was registered just now, with a key for 30 days."""
    ledger = InMemoryRegistry()
    ledger.organisation()
    key = ledger.key("bot", "agent").record(ledger.clock.ms // 1000 + KEY_S)
    ledger.give(ledger.register("sam", "bot", "sam", keys=(key,)))
    return ledger


def agent(ledger: InMemoryRegistry) -> AgentState:
    entry = ledger.directory.agent("bot")
    assert entry is not None
    return entry.state


def renew(
    ledger: InMemoryRegistry, old: SigningKey, new: SigningKey | None = None, **when: Any
) -> SigningKey:
    new = new or SigningKey.generate(BOT)
    ledger.give(ledger.claims(AgentRenewKey, "sam", iss=BOT, agent_id="bot", key=new.public), old, **when)
    return new


def refusal(ledger: InMemoryRegistry, claims: Claims, key: SigningKey) -> str:
    with pytest.raises(CommandRefusedError) as caught:
        ledger.give(claims, key)
    return caught.value.code


def renewal_refusal(ledger: InMemoryRegistry, old: SigningKey, new: SigningKey | None = None) -> str:
    with pytest.raises(CommandRefusedError) as caught:
        renew(ledger, old, new)
    return caught.value.code


def advance(ledger: InMemoryRegistry, seconds: float) -> None:
    ledger.clock.ms += round(seconds * 1000)


def signs(ledger: InMemoryRegistry, key: SigningKey) -> bool:
    return ledger.directory.agent_key(BOT, key.kid, ledger.clock.ms / 1000) is not None


def end_of(ledger: InMemoryRegistry, key: SigningKey) -> int:
    return next(one.not_after for one in agent(ledger).keys if one.kid == key.kid)


def release(ledger: InMemoryRegistry, key: SigningKey, iat: int | None = None) -> str:
    """A message of the agent, signed by one of its keys."""
    claims = ledger.claims(
        RevocationRequest, "sam", iss=BOT, kind="release", lease_id=str(uuid.uuid4()), reason="x"
    )
    return sign(claims.model_copy(update={"iat": iat or claims.iat}), key)


def report(ledger: InMemoryRegistry, message: str) -> AgentReportReuse:
    return ledger.claims(AgentReportReuse, "sam", iss=ledger.policy.id, agent_id="bot", message=message)


# --- renewal ----------------------------------------------------------------------------------------------------------


def test_renewed_key_signs_for_as_long_as_the_first_key_lived_and_the_former_one_no_more(
    ledger: InMemoryRegistry,
):
    first = ledger.key("bot", "agent")
    advance(ledger, 20 * DAY_S)
    at_s = ledger.clock.ms // 1000
    second = renew(ledger, first)
    assert [signs(ledger, one) for one in (first, second)] == [False, True]
    assert abs(end_of(ledger, second) - (at_s + KEY_S)) <= 1
    assert agent(ledger).replaced == (first.kid,)


def test_renewal_of_a_key_without_a_near_end_lives_for_90_days(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "old", "sam"))  # by a key of ten years
    new = SigningKey.generate(f"spiffe://{TD}/agent/old")
    claims = ledger.claims(AgentRenewKey, "sam", iss=new.id, agent_id="old", key=new.public)
    ledger.give(claims, ledger.key("old", "agent"))
    entry = ledger.directory.agent("old")
    assert entry is not None
    assert entry.state.keys[0].not_after <= ledger.clock.ms // 1000 + 90 * DAY_S


def test_repeated_renewal_for_the_same_key_changes_nothing(ledger: InMemoryRegistry):
    first = ledger.key("bot", "agent")
    second = renew(ledger, first)
    before = agent(ledger)
    advance(ledger, 3600)  # long after the time in which another process might not know the new key
    renew(ledger, first, second)
    assert agent(ledger) == before
    assert signs(ledger, second)


def test_second_renewal_within_a_day_is_refused(ledger: InMemoryRegistry):
    second = renew(ledger, ledger.key("bot", "agent"))
    advance(ledger, DAY_S - 60)
    assert renewal_refusal(ledger, second) == "renewal_early"
    advance(ledger, 60)
    assert signs(ledger, renew(ledger, second))


def test_suspended_agent_renews_nothing(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    assert renewal_refusal(ledger, ledger.key("bot", "agent")) == "not_active"


@pytest.mark.parametrize("by", ["sam", "olga"])
def test_renewal_signed_by_a_person_is_refused(ledger: InMemoryRegistry, by: str):
    claims = ledger.claims(AgentRenewKey, by, agent_id="bot", key=SigningKey.generate(BOT).public)
    assert refusal(ledger, claims, ledger.key(by)) == "not_the_agent"


def test_renewal_by_another_agent_or_a_stranger_is_refused(ledger: InMemoryRegistry):
    ledger.give(ledger.register("suzy", "other", "suzy"))
    other, new = ledger.key("other", "agent"), SigningKey.generate(BOT)
    foreign = ledger.claims(AgentRenewKey, "sam", iss=other.id, agent_id="bot", key=new.public)
    assert refusal(ledger, foreign, other) == "not_the_agent"
    own = ledger.claims(AgentRenewKey, "sam", iss=BOT, agent_id="bot", key=new.public)
    with pytest.raises(InvalidMessageError, match="no valid key"):
        ledger.give(own, new)


def test_key_that_a_person_replaced_is_not_renewed_during_its_overlap(ledger: InMemoryRegistry):
    given = ledger.key_record(SigningKey.generate(BOT))
    ledger.give(ledger.claims(AgentRotateKey, "sam", agent_id="bot", key=given, overlap_s=3600))
    assert renewal_refusal(ledger, ledger.key("bot", "agent")) == "key_ended"


def test_key_that_ended_is_not_renewed(ledger: InMemoryRegistry):
    advance(ledger, KEY_S)
    assert renewal_refusal(ledger, ledger.key("bot", "agent")) == "key_ended"


def test_line_ends_400_days_after_the_last_signature_of_a_person(ledger: InMemoryRegistry):
    key = ledger.key("bot", "agent")
    for _ in range(19):
        advance(ledger, 21 * DAY_S)
        key = renew(ledger, key)
    advance(ledger, 2 * DAY_S)  # 401 days
    assert renewal_refusal(ledger, key) == "key_line_ended"
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()), passing_ms=1000)
    given = SigningKey.generate(BOT)
    record = given.record(ledger.clock.ms // 1000 + KEY_S)
    ledger.give(ledger.claims(AgentRotateKey, "sam", agent_id="bot", key=record))
    assert signs(ledger, renew(ledger, given))


def test_record_of_a_line_of_400_days_is_read_by_a_new_reader(ledger: InMemoryRegistry):
    """Also where a person's command, on which a renewal rested, was followed by others of its kind."""
    key = ledger.key("bot", "agent")
    for number in range(60):
        advance(ledger, 8 * DAY_S)
        if number % 20 == 10:
            ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
            ledger.give(ledger.claims(AgentResume, "sam", agent_id="bot", reason="x"))
        key = renew(ledger, key)
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    record = ledger.directory.unverified("agent", "bot")
    assert record is not None
    reader = ledger.reader()
    for kind, id in (("user", "olga"), ("user", "sam"), ("agent", "bot")):
        entry = ledger.directory.entry(kind, id)  # type: ignore[arg-type]
        assert entry is not None
        assert isinstance(reader.admit(kind, kind, 0, entry.compact, ledger.clock.ms), Allowed)  # type: ignore[arg-type]
    read = reader.agent("bot")
    assert read is not None
    assert read.state == agent(ledger)
    assert len(read.compact) < 120_000


def test_renewal_keeps_the_revision_that_approvals_name(ledger: InMemoryRegistry):
    def named() -> int:
        entry = ledger.directory.agent("bot")
        assert entry is not None
        return entry.named_revision

    first, before = ledger.key("bot", "agent"), named()
    renew(ledger, first)
    assert named() == before
    advance(ledger, 600)
    renew(ledger, first)  # reuse
    assert named() == before + 1


def test_key_renewed_from_a_compromised_persons_key_signs_nothing(ledger: InMemoryRegistry):
    second = renew(ledger, ledger.key("bot", "agent"))
    ledger.give(end_key(ledger, "olga", "sam", ledger.key("sam").kid, compromised=True, since_ms=START_MS))
    assert not signs(ledger, second)


# --- reuse ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("days", [0.01, 29])
def test_renewal_by_a_renewed_key_ends_the_whole_line(ledger: InMemoryRegistry, days: float):
    """A thief renews an old copy, or the agent does after a thief renewed first: both look the same."""
    first = ledger.key("bot", "agent")
    second = renew(ledger, first)
    advance(ledger, days * DAY_S - 60)
    third = renew(ledger, second) if days > 1 else second
    renew(ledger, first, SigningKey.generate(BOT))
    assert set(agent(ledger).compromised) == {first.kid, second.kid, third.kid}
    assert not any(signs(ledger, one) for one in (first, second, third))
    lease = leases.lease(agent_id="bot", key_thumbprint=third.kid).claims
    assert is_lost(lease, agent(ledger))
    assert renewal_refusal(ledger, third) == "key_compromised"


def test_two_renewals_at_once_leave_the_first(ledger: InMemoryRegistry):
    first = ledger.key("bot", "agent")
    second = renew(ledger, first)
    advance(ledger, 290)
    assert renewal_refusal(ledger, first) == "key_ended"
    assert signs(ledger, second)


def test_renewal_by_a_key_after_its_first_end_is_only_a_finding(ledger: InMemoryRegistry):
    first = ledger.key("bot", "agent")
    second = renew(ledger, first)
    advance(ledger, 20 * DAY_S)
    third = renew(ledger, second)
    advance(ledger, 11 * DAY_S)
    assert renewal_refusal(ledger, first) == "key_reused_late"
    assert signs(ledger, third)


def test_reported_message_of_a_renewed_key_ends_the_whole_line(ledger: InMemoryRegistry):
    first = ledger.key("bot", "agent")
    second = renew(ledger, first)
    advance(ledger, 3600)
    ledger.give(report(ledger, release(ledger, first)), ledger.policy)
    assert set(agent(ledger).compromised) == {first.kid, second.kid}
    assert ledger.give(report(ledger, release(ledger, first)), ledger.policy) is None


def test_report_without_proof_changes_nothing(ledger: InMemoryRegistry):
    first = ledger.key("bot", "agent")
    second = renew(ledger, first)
    soon = release(ledger, first)
    advance(ledger, 3600)
    stranger = SigningKey.generate(BOT)
    forged = release(ledger, first).rpartition(".")[0] + "." + soon.rpartition(".")[2]
    for message, code in (
        (release(ledger, second), "reuse_unproven"),
        (release(ledger, stranger), "reuse_unproven"),
        (forged, "reuse_unproven"),
        (release(ledger, first, iat=ledger.clock.ms // 1000 + 3600), "reuse_unproven"),
        (soon, "key_ended"),
    ):
        assert refusal(ledger, report(ledger, message), ledger.policy) == code
    with pytest.raises(InvalidMessageError, match="no valid key"):
        ledger.give(report(ledger, release(ledger, first)), ledger.key("sam"))
    assert signs(ledger, second)


def test_rotation_of_a_compromised_key_ends_its_descendants(ledger: InMemoryRegistry):
    first = ledger.key("bot", "agent")
    second = renew(ledger, first)
    advance(ledger, DAY_S)
    third = renew(ledger, second)
    given = SigningKey.generate(BOT)
    ledger.give(
        ledger.claims(
            AgentRotateKey, "sam", agent_id="bot", key=ledger.key_record(given), replaces=(second.kid,),
            compromised=True,
        )
    )  # fmt: skip
    assert set(agent(ledger).compromised) == {second.kid, third.kid}
    assert [signs(ledger, one) for one in (third, given)] == [False, True]
