"""The life of a lease, as records: which may follow which, and what they are found by."""

from __future__ import annotations

from typing import Any, cast, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import TERMINAL, Delegator, EndCause, EndKind, Lease, LeaseStatus, Selector
from ringfence.model.leases.lifecycle import (
    ALL_LEASES,
    FOLLOWING,
    LeaseStateError,
    after_minting,
    agent_selector_key,
    before_minting,
    comes_after,
    cut_before,
    cut_key,
    delegator_selector_keys,
    end_status,
    follow,
    has_origin,
    has_terms_of,
    is_covered,
    is_cut_key,
    is_over,
    is_short_lived,
    is_task_bound,
    matches,
    origin_of,
    own_selector_keys,
    record_id,
    restated,
    selector_key_of,
    selector_keys,
    shared_selector_keys,
    statement,
)
from ringfence.revoker.domain import deadline_cause, next_status
from tools.schemas.examples import EXAMPLES

STATUSES: tuple[LeaseStatus, ...] = get_args(LeaseStatus)
KINDS: tuple[EndKind, ...] = get_args(EndKind)
REVOKER = "spiffe://acme.example/service/revoker"
AT = Coordinates(
    topic="ringfence.credential.decision.v1", partition=2, offset=41, appended_at_ms=1_790_000_000_123
)
CAUSE = EndCause(
    kind="release", at_ms=1_790_000_001_000, by="spiffe://acme.example/agent/deploy-bot", ref="r"
)


def lease(status: LeaseStatus = "active", seq: int = 1, **fields: Any) -> Lease:
    claims = cast(Lease, EXAMPLES[Lease])
    origin = origin_of(claims.lease_id, AT)
    return claims.model_copy(
        update={"status": status, "seq": seq, "jti": record_id(origin, seq), "cause": None, **fields}
    )


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", STATUSES)
def test_only_a_terminal_lease_has_nothing_to_follow(status: LeaseStatus) -> None:
    assert (not FOLLOWING[status]) == (status in TERMINAL) == is_over(lease(status))


def test_only_these_statuses_follow_each_other() -> None:
    assert {(before, after) for before, following in FOLLOWING.items() for after in following} == {
        ("minting", "active"),
        ("minting", "aborted"),
        ("active", "ending"),
        ("active", "expired"),
        ("ending", "released"),
        ("ending", "revoked"),
        ("ending", "expired"),
    }


@given(st.lists(st.sampled_from(STATUSES), max_size=8))
def test_a_life_never_goes_back_and_ends_once(wanted: list[LeaseStatus]) -> None:
    one = lease("minting")
    life = [one]
    for status in wanted:
        if status in FOLLOWING[one.status]:
            one = follow(one, status, by=REVOKER, cause=CAUSE)
            life.append(one)
            continue
        with pytest.raises(LeaseStateError) as refused:
            follow(one, status, by=REVOKER, cause=CAUSE)
        assert refused.value.code == "lease_state"
    assert [record.seq for record in life] == list(range(1, len(life) + 1))
    assert len({record.jti for record in life}) == len(life)
    assert len({record.status for record in life}) == len(life)
    assert sum(is_over(record) for record in life) <= 1
    assert not any(is_over(record) for record in life[:-1])


def test_a_following_record_keeps_everything_but_its_step() -> None:
    before = lease(from_a_newer_writer={"kept": True})
    after = follow(before, "ending", by=REVOKER, cause=CAUSE)
    assert (after.iss, after.iat, after.seq, after.status, after.cause) == (
        REVOKER, 1_790_000_001, 2, "ending", CAUSE,
    )  # fmt: skip
    same = {
        "iss": before.iss,
        "iat": before.iat,
        "jti": before.jti,
        "seq": 1,
        "status": "active",
        "cause": None,
    }
    assert after.model_copy(update=same) == before
    assert after.model_extra == {"from_a_newer_writer": {"kept": True}}


@pytest.mark.parametrize("kind", KINDS)
def test_every_cause_leads_an_active_lease_to_one_end_by_legal_steps(kind: EndKind) -> None:
    cause = EndCause(kind=kind, at_ms=1)
    one = lease("minting" if kind == "mint_failed" else "active")
    steps = []
    while (status := next_status(one, cause, frozenset({"jwt"}))) is not None:
        one = follow(one, status, by=REVOKER, cause=cause)
        steps.append(status)
    assert is_over(one)
    assert one.status == end_status(kind)
    # Only a pure token whose time is over needs no cut: nobody accepts it any more.
    assert ("ending" in steps) == (kind not in ("deadline", "mint_failed"))


def test_session_credential_past_its_deadline_is_ended_and_removed() -> None:
    assert next_status(lease(), deadline_cause(lease(), 0), frozenset()) == "ending"


def test_an_end_that_has_begun_keeps_its_cause() -> None:
    released = follow(lease(), "ending", by=REVOKER, cause=CAUSE)
    assert next_status(released, deadline_cause(released, 0), frozenset({"jwt"})) == "released"


# --- what it springs from ---------------------------------------------------------------------------------------------


def test_a_redelivery_is_told_from_a_replay_by_any_record_of_the_lease() -> None:
    one = lease()
    ended = follow(follow(one, "ending", by=REVOKER, cause=CAUSE), "released", by=REVOKER, cause=CAUSE)
    again = origin_of(one.lease_id, AT.model_copy(update={"appended_at_ms": 1}))  # the place is what counts
    assert has_origin(one, again)
    assert has_origin(ended, again)
    for elsewhere in ({"offset": 42}, {"partition": 3}, {"topic": "other"}):
        origin = origin_of(one.lease_id, AT.model_copy(update=elsewhere))
        assert not has_origin(one, origin)
        assert not has_origin(ended, origin)
    assert not has_origin(one, origin_of("0c6f2f2e-55a3-5f0e-8f4e-2f2e55a35f0f", AT))


# --- what covers it ---------------------------------------------------------------------------------------------------


def test_every_selector_names_a_mark_that_its_leases_bear() -> None:
    one = lease()
    by_selector = {
        selector_key_of(Selector(agent_id=one.agent_id)),
        selector_key_of(Selector(task_id=one.task_id)),
        selector_key_of(Selector(sponsor=one.sponsor)),
        selector_key_of(Selector(target_id=one.target_id)),
        selector_key_of(Selector(user_id=one.on_behalf_of)),
    }
    assert by_selector == set(selector_keys(one))
    assert selector_key_of(Selector(all=True)) == ALL_LEASES == "all"
    # A user who sponsors is not covered as one on whose behalf, and no id can be taken for another kind's.
    assert (
        selector_key_of(Selector(sponsor="x"))
        != selector_key_of(Selector(user_id="x"))
        != selector_key_of(Selector(agent_id="x"))
    )


def test_a_selector_covers_what_was_asked_for_by_then() -> None:
    one = lease(requested_at_ms=1000)
    assert [is_covered(one, at_ms) for at_ms in (999, 1000, 1001)] == [False, True, True]


# --- epochs -----------------------------------------------------------------------------------------------------------


def test_a_record_said_again_in_another_epoch_says_the_same() -> None:
    ending = follow(lease(), "ending", by=REVOKER, cause=CAUSE, epoch="1.aaaaaaaa")
    again = restated(ending, by="spiffe://acme.example/service/revoker-2", epoch="2.bbbbbbbb")
    assert (ending.epoch, again.epoch) == ("1.aaaaaaaa", "2.bbbbbbbb")
    assert (again.iss, again.model_copy(update={"iss": ending.iss, "epoch": ending.epoch})) == (
        "spiffe://acme.example/service/revoker-2",
        ending,
    )
    assert statement(ending) == statement(again)
    assert has_origin(again, again.jti.rpartition(".")[0])
    other = CAUSE.model_copy(update={"ref": "another"})
    assert statement(ending) != statement(follow(lease(), "ending", by=REVOKER, cause=other))


def test_the_next_record_bears_its_own_epoch_and_not_that_of_the_one_before() -> None:
    ending = follow(lease(), "ending", by=REVOKER, cause=CAUSE, epoch="1.aaaaaaaa")
    assert follow(ending, "revoked", by=REVOKER, cause=CAUSE).epoch is None


def test_the_cut_before_an_end_is_the_one_that_was_written() -> None:
    ending = follow(lease(), "ending", by=REVOKER, cause=CAUSE, epoch="1.aaaaaaaa")
    revoked = follow(ending, "revoked", by=REVOKER, cause=CAUSE, epoch="1.aaaaaaaa")
    assert cut_before(revoked) == ending
    assert cut_before(ending) is None
    expired = follow(lease(), "expired", by=REVOKER, cause=CAUSE)
    assert cut_before(expired) is None
    aborted = follow(lease("minting"), "aborted", by=REVOKER, cause=CAUSE)
    assert cut_before(aborted) is None


def test_redis_record_follows_the_kafka_record_or_is_rejected() -> None:
    active = lease()
    ending = follow(active, "ending", by=REVOKER, cause=CAUSE, epoch="1.aaaaaaaa")
    revoked = follow(ending, "revoked", by=REVOKER, cause=CAUSE)
    expired = follow(active, "expired", by=REVOKER, cause=CAUSE)
    assert comes_after(None, revoked)
    assert comes_after(active, ending)
    assert comes_after(active, revoked)
    assert comes_after(ending, revoked)
    assert not comes_after(revoked, ending)
    assert not comes_after(ending, ending)
    assert not comes_after(expired, revoked), "it has ended"
    elsewise = EndCause(kind="deadline", at_ms=2)
    cut = follow(active, "ending", by=REVOKER, cause=elsewise)
    assert not comes_after(cut, revoked), "it was cut for another cause, and ends for that"


# --- the terms of a lease ---------------------------------------------------------------------------------------------

ONE_STEP = {
    "iss": "spiffe://acme.example/service/another",
    "iat": 1,
    "jti": "j.2",
    "seq": 2,
    "status": "ending",
    "cause": CAUSE,
    "epoch": "1.aaaaaaaa",
    "traceparent": "00-a-b-01",
}
"""What the next record of a lease may have otherwise."""


@pytest.mark.parametrize("field", sorted(Lease.model_fields))
def test_a_later_record_with_other_terms_is_of_another_lease(field: str) -> None:
    before = lease()
    changed = {field: ONE_STEP.get(field, "changed")}
    assert has_terms_of(before, before.model_copy(update=changed)) == (field in ONE_STEP)


def test_minting_announces_the_lease_and_ends_in_its_first_active_record() -> None:
    announced = before_minting(lease())
    assert (announced.status, announced.seq) == ("minting", 1)
    active = after_minting(announced, epoch="3.cccccccc")
    assert (active.status, active.seq, active.epoch) == ("active", 2, "3.cccccccc")
    assert active.jti == record_id(origin_of(active.lease_id, AT), 2)
    assert has_terms_of(announced, active)


def test_a_record_is_as_old_as_its_cause_or_as_the_record_before() -> None:
    before = lease(iat=1_790_000_005)
    assert follow(before, "ending", by=REVOKER, cause=CAUSE).iat == 1_790_000_005
    later = CAUSE.model_copy(update={"at_ms": 1_790_000_009_999})
    assert follow(before, "ending", by=REVOKER, cause=later).iat == 1_790_000_009


@pytest.mark.parametrize(
    ("kind", "status"),
    [("deadline", "expired"), ("release", "released"), ("mint_failed", "aborted")]
    + [(kind, "revoked") for kind in KINDS if kind not in ("deadline", "release", "mint_failed")],
)
def test_each_kind_of_end_has_its_status(kind: EndKind, status: LeaseStatus) -> None:
    assert end_status(kind) == status


@pytest.mark.parametrize(
    ("status", "seq", "cut"),
    [("revoked", 3, True), ("ending", 3, False), ("revoked", 2, False), ("aborted", 3, False)],
)
def test_only_an_end_behind_a_cut_has_a_record_of_one(status: LeaseStatus, seq: int, cut: bool) -> None:
    before = cut_before(lease(status, seq))
    assert (before is not None) is cut
    if before is not None:
        assert (before.status, before.seq) == ("ending", seq - 1)
        assert before.jti == record_id(origin_of(before.lease_id, AT), seq - 1)


def test_a_lease_that_is_cut_ends_by_a_terminal_record_of_the_same_cause_only() -> None:
    ending = follow(lease(), "ending", by=REVOKER, cause=CAUSE)
    later = {"seq": 3, "status": "active", "cause": CAUSE}
    assert not comes_after(ending, ending.model_copy(update=later))
    assert comes_after(ending, ending.model_copy(update={**later, "status": "revoked"}))
    assert not comes_after(lease(seq=2), lease(seq=2))
    assert comes_after(lease(seq=2), lease(seq=3))


# --- selector keys ----------------------------------------------------------------------------------------------------

PART = Delegator(agent_id="lead", task_id="5f7f9a0e-0000-4000-8000-000000000001", sponsor="suzy")


def test_a_lease_of_a_handed_on_task_matches_the_keys_of_those_who_handed_it_on() -> None:
    one = lease(delegators=(PART,))
    theirs = ("agent:lead", f"task:{PART.task_id}", "sponsor:suzy")
    assert delegator_selector_keys(one) == theirs
    assert selector_keys(one) == (*own_selector_keys(one), *theirs)
    assert shared_selector_keys(one) == (f"sponsor:{one.sponsor}", f"user:{one.on_behalf_of}")
    assert delegator_selector_keys(lease(delegators=None)) == ()


@pytest.mark.parametrize(
    ("key", "matching"),
    [
        (ALL_LEASES, True),
        ("agent:lead", True),
        ("agent:other", False),
        ("user:lead", False),
        ("cut:all", False),
    ],
)
def test_a_lease_matches_all_and_its_own_keys_only(key: str, matching: bool) -> None:
    assert matches(lease(delegators=(PART,)), key) is matching


def test_the_key_of_a_cut_is_told_from_a_selector_key() -> None:
    key = agent_selector_key("cut")
    assert not is_cut_key(key)
    assert is_cut_key(cut_key(key))
    assert cut_key(key) == "cut:agent:cut"


# --- standing privileges ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("since_s", "until_s", "most_s", "short"),
    [(100, 3760, 3600, True), (100, 3761, 3600, False), (100, 220, 60, True), (100, 221, 60, False)],
)
def test_a_credential_is_short_lived_up_to_the_limit_and_a_minute_of_clocks(
    since_s: int, until_s: int, most_s: int, short: bool
) -> None:
    assert is_short_lived(since_s, until_s, most_s) is short


@pytest.mark.parametrize(
    ("until_s", "task_end_s", "bound"),
    [(160, 100, True), (161, 100, False), (50, 100, True), (50, None, False)],
)
def test_a_credential_is_task_bound_until_the_end_of_its_task_and_a_minute_of_clocks(
    until_s: int, task_end_s: int | None, bound: bool
) -> None:
    assert is_task_bound(until_s, task_end_s) is bound


def test_the_default_of_a_short_life_is_an_hour() -> None:
    assert is_short_lived(0, 3660)
    assert not is_short_lived(0, 3661)
