"""Keys of agents, and agents that wait for their sponsor: what commands do, and what no registry can make of them."""

from __future__ import annotations

import uuid
from typing import Any

import pytest
from pydantic import ValidationError

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import Signed, parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Claims, KeyRecord
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import Delegator, Lease
from ringfence.messages.registry import (
    AgentActivate,
    AgentDecommission,
    AgentResume,
    AgentRotateKey,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    UserDisable,
    VerbFloor,
)
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.model.records.agent_keys import DAY_S, endings, is_lost
from ringfence.model.records.command_chain import ChainError
from ringfence.model.requests.facts import load_context, violations
from ringfence.registry.domain import MAX_RECORD_BYTES
from tests.support import leases
from tests.support.in_memory_registry import START_MS, InMemoryRegistry, permission

START_S = START_MS // 1000
BOT = "spiffe://test.example/agent/bot"


@pytest.fixture
def ledger() -> InMemoryRegistry:
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.register("sam", "bot", "sam"))
    return ledger


def agent(ledger: InMemoryRegistry, id: str = "bot") -> AgentState:
    entry = ledger.directory.agent(id)
    assert entry is not None
    return entry.state


def refused(ledger: InMemoryRegistry, claims: Claims, **when: Any) -> str:
    with pytest.raises(CommandRefusedError) as caught:
        ledger.give(claims, **when)
    return caught.value.code


def fresh(ledger: InMemoryRegistry) -> KeyRecord:
    return ledger.key_record(SigningKey.generate(BOT))


def rotation(ledger: InMemoryRegistry, by: str = "sam", **fields: Any) -> AgentRotateKey:
    return ledger.claims(AgentRotateKey, by, **{"agent_id": "bot", "key": fresh(ledger), **fields})


def rotate(ledger: InMemoryRegistry, by: str = "sam", **fields: Any) -> KeyRecord:
    claims = rotation(ledger, by, **fields)
    ledger.give(claims)
    assert claims.key is not None
    return claims.key


def counts(ledger: InMemoryRegistry, key: KeyRecord | SigningKey, at_ms: int) -> bool:
    return ledger.directory.agent_key(BOT, key.kid, at_ms / 1000) is not None


# --- rotation ---------------------------------------------------------------------------------------------------------


def test_old_keys_count_on_for_the_overlap_and_no_longer(ledger: InMemoryRegistry):
    old, at_ms = ledger.key("bot", "agent"), ledger.clock.ms
    new = rotate(ledger, overlap_s=3600)
    assert counts(ledger, new, at_ms)
    assert counts(ledger, old, at_ms + 3_599_000)
    assert not counts(ledger, old, at_ms + 3_600_000)
    assert (agent(ledger).replaced, agent(ledger).compromised) == ((old.kid,), ())


@pytest.mark.parametrize("how", [{}, {"compromised": True}])
def test_without_an_overlap_old_keys_end_at_once(ledger: InMemoryRegistry, how: dict[str, Any]):
    old, at_ms = ledger.key("bot", "agent"), ledger.clock.ms
    new = rotate(ledger, **how)
    assert counts(ledger, old, at_ms - 1)
    assert not counts(ledger, old, at_ms)
    assert counts(ledger, new, at_ms)
    assert agent(ledger).compromised == ((old.kid,) if how else ())


def test_an_overlap_makes_no_key_live_longer(ledger: InMemoryRegistry):
    soon = rotate(ledger, key=SigningKey.generate(BOT).record(START_S + 60))
    rotate(ledger, overlap_s=3600)
    rotate(ledger, overlap_s=7200)
    assert {key.kid: key.not_after for key in agent(ledger).keys}[soon.kid] == START_S + 60


def test_only_the_keys_that_are_named_are_replaced(ledger: InMemoryRegistry):
    first, second = ledger.key("bot", "agent"), rotate(ledger, overlap_s=3600)
    third = rotate(ledger, replaces=(first.kid,), compromised=True)
    at_ms = ledger.clock.ms
    assert [counts(ledger, key, at_ms) for key in (first, second, third)] == [False, True, True]
    assert agent(ledger).compromised == (first.kid,)
    assert refused(ledger, rotation(ledger, replaces=("nobody's",))) == "unknown_key"


@pytest.mark.parametrize("by", ["suzy", "uma", "adam"])
def test_others_give_an_agent_no_key(ledger: InMemoryRegistry, by: str):
    assert refused(ledger, rotation(ledger, by)) == "not_sponsor"


def test_an_agent_gives_itself_no_key(ledger: InMemoryRegistry):
    claims = rotation(ledger, iss=BOT)
    with pytest.raises(InvalidMessageError, match="no valid key"):
        ledger.give(claims, ledger.key("bot", "agent"))


def test_an_ended_key_is_never_given_again_to_nobody(ledger: InMemoryRegistry):
    old = ledger.key_record(ledger.key("bot", "agent"))
    rotate(ledger)
    assert refused(ledger, rotation(ledger, key=old)) == "key_known"
    ledger.give(ledger.register("suzy", "other", "suzy"))
    taken = rotation(ledger, "suzy", agent_id="other", key=old)
    assert refused(ledger, taken) == "key_taken"
    assert refused(ledger, ledger.user_set("olga", "uma", keys=(old,))) == "key_taken"


@pytest.mark.parametrize("whose", ["sam", "uma"])
def test_no_agent_is_given_a_key_of_somebody_else(ledger: InMemoryRegistry, whose: str):
    assert refused(ledger, rotation(ledger, key=ledger.key_record(ledger.key(whose)))) == "key_taken"


def test_a_key_that_counts_for_nothing_now_is_no_new_key(ledger: InMemoryRegistry):
    over = SigningKey.generate(BOT).record(ledger.clock.ms // 1000)
    assert refused(ledger, rotation(ledger, key=over)) == "no_valid_key"
    to_come = SigningKey.generate(BOT).record(START_S + DAY_S, not_before=START_S + 3600)
    assert refused(ledger, rotation(ledger, key=to_come)) == "no_valid_key"


def test_compromised_rotation_allows_no_overlap(ledger: InMemoryRegistry):
    with pytest.raises(ValidationError, match="ends at once"):
        rotation(ledger, compromised=True, overlap_s=1)
    with pytest.raises(ValidationError):
        rotation(ledger, overlap_s=7 * DAY_S + 1)


def test_a_rotation_that_was_kept_back_is_refused(ledger: InMemoryRegistry):
    """It would make a key count that somebody had given up meanwhile."""
    kept_back = rotation(ledger, overlap_s=3600)
    ledger.clock.ms += 1000
    rotate(ledger, compromised=True)
    assert refused(ledger, kept_back) == "overtaken"


def test_a_suspended_agent_may_have_another_key_and_stays_suspended(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="x"))
    rotate(ledger)
    assert (agent(ledger).status, agent(ledger).suspended_by_operator) == ("suspended", True)


def test_a_decommissioned_agent_has_no_other_key(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(AgentDecommission, "sam", agent_id="bot", reason="done"))
    assert refused(ledger, rotation(ledger)) == "decommissioned"


def test_an_operator_rotates_the_keys_of_an_orphan(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(UserDisable, "olga", user_id="sam", reason="left"))
    rotate(ledger, "otto", compromised=True)
    assert len(agent(ledger).keys) == 2


# --- what a registry that lies cannot do ------------------------------------------------------------------------------


def test_no_rotation_can_be_left_out(ledger: InMemoryRegistry):
    """Not even by later ones: the key that it ended would count again."""
    register = ledger.embed(ledger.register("sam", "robot", "sam"))
    key = SigningKey.generate(BOT)
    first = ledger.embed(
        ledger.claims(AgentRotateKey, "sam", agent_id="robot", key=ledger.key_record(key), compromised=True)
    )
    ledger.clock.ms += 1000
    second = ledger.embed(
        ledger.claims(AgentRotateKey, "sam", agent_id="robot", key=fresh(ledger), compromised=True)
    )
    reader = ledger.reader()
    for entry in ledger.directory.entries("user"):
        assert ledger.admit(entry.compact.decode(), reader) is None
    for commands, revision in (([register], 1), ([register, first], 2)):
        record = ledger.follow(commands, revision)
        assert ledger.admit(ledger.sign_record(record.state, commands, revision), reader) is None
    for commands in ([register], [register, second]):
        record = ledger.follow(commands, 3)
        problem = ledger.admit(ledger.sign_record(record.state, commands, 3), reader)
        assert problem is not None
        assert problem.startswith("history_changed")


@pytest.mark.parametrize("lie", ["the old key counts", "it is not compromised", "a key of its own"])
def test_registry_cannot_change_the_keys_of_an_agent(ledger: InMemoryRegistry, lie: str):
    rotate(ledger, compromised=True)
    state, commands = agent(ledger), ledger.directory.unverified("agent", "bot").commands  # type: ignore[union-attr]
    old = ledger.key_record(ledger.key("bot", "agent"))
    keys = {
        "the old key counts": (state.keys[0], old),
        "it is not compromised": state.keys,
        "a key of its own": (*state.keys, fresh(ledger)),
    }[lie]
    update = {"keys": keys, **({"compromised": ()} if "not" in lie else {})}
    with pytest.raises(ChainError, match="not what its commands say"):
        ledger.chains().verify(ledger.record(state.model_copy(update=update), commands, 2))


def test_registry_cannot_use_a_rotation_signed_by_the_agent(ledger: InMemoryRegistry):
    register = ledger.embed(ledger.register("sam", "robot", "sam"))
    stolen = ledger.key("robot", "agent")
    forged = ledger.claims(AgentRotateKey, "sam", iss=stolen.id, agent_id="robot", key=fresh(ledger))
    with pytest.raises(InvalidMessageError, match="no valid key"):
        ledger.follow([register, ledger.embed(forged, key=stolen)], 2)


def test_record_has_room_for_many_rotations(ledger: InMemoryRegistry):
    """Nothing of them is dropped, so a record grows with each."""
    sizes = []
    for _ in range(3):
        rotate(ledger)
        entry = ledger.directory.agent("bot")
        assert entry is not None
        sizes.append(len(ledger.sign_record(entry.state, entry.record.commands, entry.revision)))
    assert (MAX_RECORD_BYTES - sizes[0]) // (sizes[2] - sizes[1]) > 200, (sizes, MAX_RECORD_BYTES)


# --- agents that wait for their sponsor -------------------------------------------------------------------------------


@pytest.fixture
def waiting(ledger: InMemoryRegistry) -> InMemoryRegistry:
    ledger.give(ledger.register("olga", "sleeper", "suzy", inactive=True))
    assert agent(ledger, "sleeper").status == "registered"
    return ledger


def test_only_its_sponsor_takes_an_agent_on(waiting: InMemoryRegistry):
    for by in ("olga", "otto", "sam", "uma"):
        assert refused(waiting, waiting.claims(AgentActivate, by, agent_id="sleeper")) == "not_sponsor"
    waiting.give(waiting.claims(AgentActivate, "suzy", agent_id="sleeper"))
    assert agent(waiting, "sleeper").status == "active"
    assert refused(waiting, waiting.claims(AgentActivate, "suzy", agent_id="sleeper")) == "not_registered"


def test_an_operator_finds_no_way_around_the_sponsor(waiting: InMemoryRegistry):
    for command in (AgentSuspend, AgentResume):
        claims = waiting.claims(command, "olga", agent_id="sleeper", reason="x")
        assert refused(waiting, claims) in ("not_active", "not_suspended")
    waiting.give(waiting.transfer("olga", "sleeper", "sam"))
    waiting.give(waiting.claims(AgentSetCeiling, "olga", agent_id="sleeper", ceiling=(permission("a"),)))
    assert agent(waiting, "sleeper").status == "registered"
    assert refused(waiting, waiting.claims(AgentActivate, "suzy", agent_id="sleeper")) == "not_sponsor"
    waiting.give(waiting.claims(AgentActivate, "sam", agent_id="sleeper"))
    assert agent(waiting, "sleeper").status == "active"


def test_an_agent_that_nobody_took_on_has_no_task_and_can_be_ended(waiting: InMemoryRegistry):
    assert refused(waiting, waiting.assign("uma", "sleeper")) == "agent_registered"
    waiting.give(waiting.claims(AgentDecommission, "olga", agent_id="sleeper", reason="not wanted"))
    assert refused(waiting, waiting.claims(AgentActivate, "suzy", agent_id="sleeper")) == "decommissioned"


def test_an_agent_is_active_where_nothing_else_is_said(ledger: InMemoryRegistry):
    """Registrations that were signed before there was anything to say stay what they are."""
    claims = ledger.register("olga", "robot", "suzy")
    assert b"inactive" not in parse(ledger.signed(claims)).payload
    ledger.give(claims)
    assert agent(ledger, "robot").status == "active"


# --- keys that end, and leases of lost ones ---------------------------------------------------------------------------


def test_a_key_is_told_of_at_three_times_before_its_end(ledger: InMemoryRegistry):
    key = rotate(ledger, key=SigningKey.generate(BOT).record(START_S + 100 * DAY_S))
    state = agent(ledger)
    found = {
        days: [ending.warn_before_s // DAY_S for ending in endings(state, START_S + days * DAY_S)]
        for days in (85, 86, 96, 97, 98, 99, 100)
    }
    assert found == {85: [], 86: [14], 96: [14], 97: [3], 98: [3], 99: [1], 100: []}
    (ending,) = endings(state, START_S + 99 * DAY_S)
    assert (ending.key.kid, ending.since_s) == (key.kid, START_S + 99 * DAY_S)


def test_a_key_that_was_replaced_is_not_told_of(ledger: InMemoryRegistry):
    rotate(ledger, key=SigningKey.generate(BOT).record(START_S + 5 * DAY_S))
    assert len(endings(agent(ledger), START_S + DAY_S)) == 1
    rotate(ledger, overlap_s=7 * DAY_S)
    assert endings(agent(ledger), START_S + DAY_S) == ()


def test_neither_are_keys_of_those_who_are_gone_or_that_are_short_lived(ledger: InMemoryRegistry):
    rotate(ledger, key=SigningKey.generate(BOT).record(START_S + 8 * 3600, not_before=START_S))
    assert endings(agent(ledger), START_S + 3600) == ()
    ledger.give(ledger.user_set("olga", "uma", keys=(SigningKey.generate(BOT).record(START_S + DAY_S),)))
    uma = ledger.directory.user("uma")
    assert uma is not None
    assert [ending.warn_before_s for ending in endings(uma.state, START_S + 60)] == [DAY_S]
    ledger.give(ledger.claims(UserDisable, "olga", user_id="uma", reason="left"))
    rotate(ledger, key=SigningKey.generate(BOT).record(START_S + DAY_S))
    ledger.give(ledger.claims(AgentDecommission, "sam", agent_id="bot", reason="done"))
    uma = ledger.directory.user("uma")
    assert uma is not None
    assert endings(uma.state, START_S + 60) == endings(agent(ledger), START_S + 60) == ()


def test_leases_lost_with_a_compromised_key(ledger: InMemoryRegistry):
    old = ledger.key("bot", "agent")
    ended_ms = ledger.clock.ms // 1000 * 1000
    new = rotate(ledger, compromised=True)

    def lease(kid: str | None, at_ms: int = ended_ms - 60_000) -> Lease:
        return leases.lease(agent_id="bot", key_thumbprint=kid, requested_at_ms=at_ms).claims

    def below(kid: str | None, at_ms: int = ended_ms - 60_000) -> Lease:
        by = Delegator(agent_id="bot", task_id=str(uuid.uuid4()), sponsor="sam", key_thumbprint=kid)
        other = leases.lease(agent_id="other", key_thumbprint="others", requested_at_ms=at_ms).claims
        return other.model_copy(update={"act": ("other", "bot"), "delegators": (by,)})

    state = agent(ledger)
    for way in (lease, below):
        assert is_lost(way(old.kid), state)
        assert not is_lost(way(new.kid), state)
        assert is_lost(way(None), state)
        assert not is_lost(way(None, ended_ms), state)
    assert is_lost(lease(old.kid), state)
    assert is_lost(lease(old.kid, ended_ms + 60_000), state)
    assert not is_lost(lease(new.kid), state)
    assert is_lost(lease(None), state)
    assert not is_lost(lease(None, ended_ms), state)
    other = state.model_copy(update={"compromised": ()})
    assert not is_lost(lease(old.kid), other)


def test_request_of_a_compromised_key_is_denied_whenever_it_was_made(ledger: InMemoryRegistry):
    """Policy and issuer weigh it by the same rule."""
    allowed = permission("env/**")
    ledger.give(ledger.target_set("olga", "staging", verbs=(VerbFloor(verb="deploy"),)))
    ledger.give(ledger.user_set("olga", "uma", entitlements=ledger.entitlements(allowed)))
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(allowed,)))
    change = ledger.give(ledger.assign("uma", "bot"))
    assert change is not None
    old, new = ledger.key("bot", "agent"), SigningKey.generate(BOT)
    claims = ledger.claims(
        CredentialRequest, "uma", iss=BOT, task_id=change.state.task_id,  # type: ignore[union-attr]
        scope=(permission("env/a"),), ttl_s=60, reason="x", reply_key=old.public,
    )  # fmt: skip

    def against(key: SigningKey) -> list[str]:
        facts = load_context(ledger.directory, Signed(claims, sign(claims, key)))
        return [reason.code for reason in violations(facts, ledger.clock.ms / 1000, 86_400)]

    assert against(old) == against(new) == []
    rotate(ledger, key=ledger.key_record(new), compromised=True)
    assert (against(old), against(new)) == (["key_compromised"], [])


def test_compromised_keys_end_without_another_in_their_place(ledger: InMemoryRegistry):
    old = ledger.key("bot", "agent")
    later = rotate(ledger, overlap_s=3600)
    end = rotation(ledger, key=None, replaces=(old.kid,), compromised=True, reason="it was in a log")
    ledger.give(end)
    entry = ledger.directory.agent("bot")
    assert entry is not None
    assert entry.state.compromised == (old.kid,)
    assert not counts(ledger, old, ledger.clock.ms)
    assert counts(ledger, later, ledger.clock.ms)
    with pytest.raises(ValidationError, match="give a key"):
        rotation(ledger, key=None)


def test_end_of_compromised_keys_is_not_overtaken_by_command_that_thief_dated_ahead(ledger: InMemoryRegistry):
    old, ahead_s = ledger.key("bot", "agent"), ledger.clock.ms // 1000 + 28
    rotate(ledger, overlap_s=3600, iat=ahead_s, exp=ahead_s + 300)
    assert refused(ledger, rotation(ledger, overlap_s=3600)) == "overtaken"
    ledger.give(rotation(ledger, key=None, replaces=(old.kid,), compromised=True))
    assert agent(ledger).compromised == (old.kid,)
