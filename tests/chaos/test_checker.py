"""The checker against clean histories, which pass, and histories with one planted fault, which it finds."""

from __future__ import annotations

import uuid
from dataclasses import replace

import pytest

from ringfence.kernel.base.clock import MAX_SKEW_MS
from ringfence.messages.lease import EndCause
from ringfence.model.audit_log.verification import Fault
from tests.chaos.checker import GRACE_MS, KINDS, check, tally
from tests.chaos.history import History, Leftover
from tests.chaos.made_histories import (
    DEADLINE,
    HOLD,
    REVOKER,
    SAM,
    T0,
    T0_S,
    TD,
    TTL_S,
    Past,
    Plant,
    clean,
    user,
)


def stopped_by_its_sponsor(past: Past) -> None:
    lease = past.issue()
    cause = past.order(T0 + 500, by=user(lease.sponsor), agent_id=lease.agent_id)
    past.end(lease, cause, T0 + 510)
    past.follow(cause, T0 + 520)


def stopped_by_who_sponsors_its_agent_now(past: Past) -> None:
    """A lease that was issued under another is the new one's, too."""
    lease = past.issue()
    past.user("petra", "sponsor")
    past.agent(lease.agent_id, "petra", T0 + 300)
    past.end(lease, past.order(T0 + 500, lease, by=user("petra")), T0 + 510)


def stopped_by_who_gave_it_away_a_moment_later(past: Past) -> None:
    lease = past.issue()
    past.agent(lease.agent_id, "petra", T0 + 505)
    past.end(lease, past.order(T0 + 500, by=user(lease.sponsor), agent_id=lease.agent_id), T0 + 510)


def stopped_by_who_gave_it_away_a_moment_ago(past: Past) -> None:
    """The revoker's tables may be as old as its grace."""
    lease = past.issue()
    past.agent(lease.agent_id, "petra", T0 + 100)
    past.end(lease, past.order(T0 + 500, by=user(lease.sponsor), agent_id=lease.agent_id), T0 + 510)


def stopped_by_who_was_given_it_before_a_gateway_gave_its_word(past: Past) -> None:
    """Nothing was left that could end, so nothing else says that the order was followed."""
    lease = past.issue()
    past.end(lease, past.order(T0 + 300, lease), T0 + 310)
    past.user("petra", "sponsor")
    order = past.order(T0 + 500, by=user("petra"), agent_id=lease.agent_id)
    past.agent(lease.agent_id, "petra", T0 + 521)
    past.give_word(order, T0 + 800)


def stopped_by_who_it_is_for(past: Past) -> None:
    lease, other = past.issue(), past.issue()
    past.end(lease, past.order(T0 + 500, lease, by=user("maria")), T0 + 510)
    past.end(other, past.order(T0 + 500, by=user("maria"), task_id=other.task_id), T0 + 510)


def stopped_by_who_assigned_its_task(past: Past) -> None:
    lease = past.issue()
    past.user("mike")
    past.task(lease, T0 + 50, by="mike")
    past.end(lease, past.order(T0 + 500, lease, by=user("mike")), T0 + 510)


def ended_with_its_task(past: Past) -> None:
    lease = past.issue()
    ended = past.task(lease, T0 + 490, status="ended")
    past.end(lease, past.derived(T0 + 500, "task_ended", ended, task_id=lease.task_id), T0 + 510)


def ended_as_its_agent_was_suspended_and_resumed(past: Past) -> None:
    lease = past.issue()
    suspended = past.agent(lease.agent_id, lease.sponsor, T0 + 480, status="suspended")
    past.agent(lease.agent_id, lease.sponsor, T0 + 490)
    past.end(lease, past.derived(T0 + 500, "agent_suspended", suspended, agent_id=lease.agent_id), T0 + 510)


def ended_as_its_agent_had_no_sponsor_any_more(past: Past) -> None:
    lease = past.issue()
    gone = past.user(lease.sponsor, "sponsor", ms=T0 + 490, status="disabled")
    past.end(lease, past.derived(T0 + 500, "user_disabled", gone, agent_id=lease.agent_id), T0 + 510)


def ended_beyond_a_ceiling(past: Past) -> None:
    lease = past.issue()
    narrowed = past.agent(lease.agent_id, lease.sponsor, T0 + 480, verb="write")
    past.end(lease, past.derived(T0 + 500, "scope_narrowed", narrowed, lease), T0 + 510)


def ended_as_its_agent_was_held(past: Past) -> None:
    lease = past.issue()
    held = past.agent(lease.agent_id, lease.sponsor, T0 + 490, holds=(HOLD,))
    past.end(lease, past.derived(T0 + 500, "key_compromised", held, agent_id=lease.agent_id), T0 + 510)


def issued_within_the_grace_after_a_hold(past: Past) -> None:
    lease = past.issue()
    past.agent(lease.agent_id, lease.sponsor, T0 - 2_000, holds=(HOLD,))
    past.expire(lease)


def issued_after_a_hold_was_lifted(past: Past) -> None:
    lease = past.issue()
    past.agent(lease.agent_id, lease.sponsor, T0 - 20_000, holds=(HOLD,))
    past.agent(lease.agent_id, lease.sponsor, T0 - 1_000)
    past.expire(lease)


def refused_to_who_had_no_say(past: Past) -> None:
    """Nothing comes of it, and the lease is good to its deadline."""
    lease = past.issue()
    past.user("petra", "sponsor")
    past.order(T0 + 500, by=user("petra"), agent_id=lease.agent_id)
    past.order(T0 + 500, lease, kind="release", by=f"spiffe://{TD}/agent/other")
    past.probe(lease, T0 + 9_000, worked=True)
    past.expire(lease)


TRUE: list[Plant] = [
    stopped_by_its_sponsor, stopped_by_who_sponsors_its_agent_now, stopped_by_who_gave_it_away_a_moment_later,
    stopped_by_who_gave_it_away_a_moment_ago, stopped_by_who_was_given_it_before_a_gateway_gave_its_word,
    stopped_by_who_it_is_for, stopped_by_who_assigned_its_task,
    ended_with_its_task, ended_as_its_agent_was_suspended_and_resumed, ended_as_its_agent_had_no_sponsor_any_more,
    ended_beyond_a_ceiling, ended_as_its_agent_was_held,
    issued_within_the_grace_after_a_hold, issued_after_a_hold_was_lifted,
    refused_to_who_had_no_say,
]  # fmt: skip


@pytest.mark.parametrize("story", TRUE, ids=lambda one: one.__name__)
def test_entitled_history_is_no_problem(story: Plant) -> None:
    past = clean()
    story(past)
    assert check(past.history) == []


def test_a_clean_history_passes() -> None:
    assert check(clean().history) == []
    assert check(History()) == []


def no_end(past: Past) -> None:
    past.issue()


def cut_and_never_undone(past: Past) -> None:
    lease = past.issue()
    past.next(lease, "ending", T0 + 600, past.order(T0 + 500, lease))


def minted_and_forgotten(past: Past) -> None:
    past.issue(backend="redis", status="minting")


def replied_before_kafka_had_it(past: Past) -> None:
    past.history.received.add(str(uuid.uuid4()))


def two_ends(past: Past) -> None:
    lease = past.issue()
    past.expire(lease)
    past.end(lease, past.order(DEADLINE - 20, lease), DEADLINE + 40)


def the_same_end_of_another_moment(past: Past) -> None:
    end = past.expire(past.issue())
    past.record(
        end.model_copy(update={"cause": EndCause(kind="deadline", at_ms=DEADLINE + 1)}), DEADLINE + 60
    )


def a_second_end_of_an_older_epoch_that_came_in_time(past: Past) -> None:
    """Nothing but its place makes a record void."""
    lease = past.issue()
    past.next(lease, "expired", DEADLINE + 30, EndCause(kind="deadline", at_ms=DEADLINE), epoch="1.aaaaaaaa")
    past.next(
        lease, "expired", DEADLINE + 40, EndCause(kind="deadline", at_ms=DEADLINE + 1), epoch="2.bbbbbbbb"
    )


def issued_twice(past: Past) -> None:
    lease = past.issue()
    past.record(lease.model_copy(update={"iat": lease.iat + 1}), T0 + 200)
    past.expire(lease)


def two_leases_of_one_request(past: Past) -> None:
    lease, other = past.issue(), past.issue()
    past.history.leases[-1] = replace(
        past.history.leases[-1], claims=other.model_copy(update={"request_id": lease.request_id})
    )
    past.expire(lease)
    past.expire(other.model_copy(update={"request_id": lease.request_id}))


def expired_early(past: Past) -> None:
    past.expire(past.issue(), DEADLINE - 1)


def cut_early(past: Past) -> None:
    lease = past.issue(backend="redis")
    ending = past.next(lease, "ending", DEADLINE - 400, EndCause(kind="deadline", at_ms=DEADLINE))
    past.next(ending, "expired", DEADLINE + 10)


def refused_by_a_gateway_whose_clock_was_far_off(past: Past) -> None:
    lease = past.issue(delivery="gateway")
    past.probe(lease, DEADLINE - MAX_SKEW_MS - 10, worked=False)
    past.expire(lease)


def refused_unasked(past: Past) -> None:
    lease = past.issue()
    past.probe(lease, T0 + 5_000, worked=False)
    past.expire(lease)


def refused_before_it_was_asked(past: Past) -> None:
    lease = past.issue()
    past.probe(lease, T0 + 480, worked=False)
    past.end(lease, past.order(T0 + 500, lease), T0 + 510)


def left_at_its_target(past: Past) -> None:
    lease = past.expire(past.issue(backend="redis"))
    past.history.leftovers.append(Leftover("cache", lease.lease_id, "an ACL user"))


def accepted_after_its_cut(past: Past) -> None:
    lease = past.issue()
    past.end(lease, past.order(T0 + 500, lease), T0 + 510)
    past.probe(lease, T0 + 511, worked=True)


def accepted_after_its_deadline(past: Past) -> None:
    lease = past.issue()
    past.probe(lease, DEADLINE + 1, worked=True)
    past.expire(lease)


def session_alive_after_its_end(past: Past) -> None:
    lease = past.issue(backend="redis")
    past.end(lease, past.order(T0 + 500, lease), T0 + 510)
    past.probe(lease, T0 + 600, worked=True)


def forwarded_by_a_view_that_is_too_old(past: Past) -> None:
    lease = past.issue(delivery="gateway")
    past.end(lease, past.order(T0 + 500, lease), T0 + 510)
    past.probe(lease, T0 + 511 + GRACE_MS, worked=True)


def forwarded_long_after_its_deadline(past: Past) -> None:
    lease = past.issue(delivery="gateway")
    past.expire(lease, DEADLINE + 2 * GRACE_MS)
    past.probe(lease, DEADLINE + 1 + GRACE_MS, worked=True)


def delivered_and_behind_a_kill_switch(past: Past) -> None:
    lease = past.issue(delivery="gateway")
    cause = past.order(T0 + 500, sponsor=lease.sponsor)
    past.follow(cause, T0 + 600)
    past.probe(lease, T0 + 501 + GRACE_MS, worked=True)
    past.end(lease, cause, T0 + 502 + GRACE_MS)


def behind_a_kill_switch(past: Past) -> None:
    lease = past.issue()
    cause = past.order(T0 + 500, sponsor=lease.sponsor)
    past.follow(cause, T0 + 600)
    past.probe(lease, T0 + 650, worked=True)
    past.end(lease, cause, T0 + 700)


def missed_by_a_kill_switch(past: Past) -> None:
    lease = past.issue()
    past.follow(past.order(T0 + 500, task_id=lease.task_id), T0 + 600)
    past.expire(lease)


def ended_for_no_reason(past: Past) -> None:
    lease = past.issue()
    past.end(lease, EndCause(kind="revocation", at_ms=T0 + 500, by=SAM, ref="none"), T0 + 510)


def ended_by_what_came_later(past: Past) -> None:
    lease = past.issue()
    cause = past.order(T0 + 600, lease)
    past.end(lease, cause, T0 + 590)


def ended_by_an_order_about_others(past: Past) -> None:
    lease = past.issue()
    past.end(lease, past.order(T0 + 500, agent_id="another"), T0 + 510)


def ended_by_an_order_from_before_its_request(past: Past) -> None:
    lease = past.issue()
    past.end(lease, past.order(T0 - 1, agent_id=lease.agent_id), T0 + 510)


def released_by_another_agent(past: Past) -> None:
    lease = past.issue()
    cause = past.order(T0 + 500, lease, kind="release", by=f"spiffe://{TD}/agent/other")
    past.end(lease, cause, T0 + 510)


def stopped_by_another_sponsor(past: Past) -> None:
    lease = past.issue()
    past.user("petra", "sponsor")
    past.end(lease, past.order(T0 + 500, lease, by=user("petra")), T0 + 510)


def stopped_by_a_sponsor_who_gave_it_away_long_ago(past: Past) -> None:
    lease = past.issue()
    past.agent(lease.agent_id, "petra", T0 + 499 - GRACE_MS)
    past.end(lease, past.order(T0 + 500, by=user(lease.sponsor), agent_id=lease.agent_id), T0 + 510)


def stopped_by_a_sponsor_who_took_it_over_later(past: Past) -> None:
    lease = past.issue()
    past.user("petra", "sponsor")
    past.end(lease, past.order(T0 + 500, by=user("petra"), agent_id=lease.agent_id), T0 + 510)
    past.agent(lease.agent_id, "petra", T0 + 511)


def stopped_by_a_sponsor_who_was_disabled(past: Past) -> None:
    lease = past.issue()
    past.user(lease.sponsor, "sponsor", ms=T0 - GRACE_MS, status="disabled")
    past.end(lease, past.order(T0 + 500, by=user(lease.sponsor), sponsor=lease.sponsor), T0 + 510)


def stopped_by_who_was_an_operator_once(past: Past) -> None:
    past.user("olga", "operator")
    past.user("olga", ms=T0 - 30_000)
    past.follow(past.order(T0 + 500, by=user("olga"), target_id="another"), T0 + 520)


def stopped_by_nobody_in_particular(past: Past) -> None:
    past.follow(past.order(T0 + 500, by=user("maria"), sponsor="another"), T0 + 520)


def cut_by_a_gateway_for_somebody_without_a_say(past: Past) -> None:
    past.give_word(past.order(T0 + 500, by=user("maria"), target_id="another"), T0 + 520)


def asked_for_by_an_agent_that_may_only_give_back(past: Past) -> None:
    lease = past.issue()
    cause = past.order(T0 + 500, by=f"spiffe://{TD}/agent/{lease.agent_id}", agent_id=lease.agent_id)
    past.end(lease, cause, T0 + 510)


def ended_with_a_task_that_goes_on(past: Past) -> None:
    lease = past.issue()
    going_on = past.task(lease, T0 + 490)
    past.end(lease, past.derived(T0 + 500, "task_ended", going_on, task_id=lease.task_id), T0 + 510)


def ended_with_its_task_before_that_was_ended(past: Past) -> None:
    lease = past.issue()
    ended = past.task(lease, T0 + 501, status="ended")
    past.end(lease, past.derived(T0 + 500, "task_ended", ended, task_id=lease.task_id), T0 + 510)


def ended_by_a_revoker_for_no_record(past: Past) -> None:
    lease = past.issue()
    past.end(lease, past.order(T0 + 500, kind="task_ended", by=REVOKER, task_id=lease.task_id), T0 + 510)


def ended_with_somebody_elses_task(past: Past) -> None:
    lease, other = past.issue(), past.expire(past.issue())
    ended = past.task(other, T0 + 490, status="ended")
    past.end(lease, past.derived(T0 + 500, "task_ended", ended, task_id=lease.task_id), T0 + 510)


def ended_with_the_sponsor_of_another_agent(past: Past) -> None:
    lease, other = past.issue(), past.expire(past.issue())
    gone = past.user(other.sponsor, "sponsor", ms=T0 + 490, status="disabled")
    past.end(lease, past.derived(T0 + 500, "user_disabled", gone, agent_id=lease.agent_id), T0 + 510)


def ended_within_its_ceiling(past: Past) -> None:
    lease = past.issue()
    same = past.agent(lease.agent_id, lease.sponsor, T0 + 480)
    past.end(lease, past.derived(T0 + 500, "scope_narrowed", same, lease), T0 + 510)


def revoked_by_a_service_of_its_own_accord(past: Past) -> None:
    lease = past.issue()
    past.end(lease, past.order(T0 + 500, lease, by=REVOKER), T0 + 510)


def refused_as_somebody_without_a_say_asked(past: Past) -> None:
    lease = past.issue()
    past.order(T0 + 500, by=user("maria"), sponsor=lease.sponsor)
    past.probe(lease, T0 + 600, worked=False)
    past.expire(lease)


def of_another_kind_than_asked(past: Past) -> None:
    lease = past.issue()
    cause = past.order(T0 + 500, lease).model_copy(update={"kind": "task_ended"})
    past.end(lease, cause, T0 + 510)


def aborted_by_a_deadline_that_has_not_come(past: Past) -> None:
    lease = past.issue(backend="redis", status="minting")
    past.next(lease, "aborted", T0 + 400, EndCause(kind="deadline", at_ms=DEADLINE))


def issued_on_what_was_held(past: Past) -> None:
    lease = past.issue()
    past.agent(lease.agent_id, lease.sponsor, T0 - 20_000, holds=(HOLD,))
    past.expire(lease)


def revoked_and_said_to_have_expired(past: Past) -> None:
    lease = past.issue(backend="redis")
    ending = past.next(lease, "ending", T0 + 510, past.order(T0 + 500, lease))
    past.next(ending, "expired", T0 + 520)


def expired_and_said_to_be_given_back(past: Past) -> None:
    lease = past.issue(backend="redis")
    ending = past.next(lease, "ending", DEADLINE + 10, EndCause(kind="deadline", at_ms=DEADLINE))
    past.next(ending, "released", DEADLINE + 20)


def caused_earlier_than_it_was_asked_for(past: Past) -> None:
    lease = past.issue()
    past.end(lease, past.order(T0 + 500, lease).model_copy(update={"at_ms": T0 + 150}), T0 + 510)


def given_another_reason_than_was_asked_with(past: Past) -> None:
    lease = past.issue()
    past.end(lease, past.order(T0 + 500, lease).model_copy(update={"reason": "y"}), T0 + 510)


def ended_for_another_reason_than_it_was_cut_for(past: Past) -> None:
    lease = past.issue(backend="redis")
    ending = past.next(lease, "ending", T0 + 510, past.order(T0 + 500, lease))
    past.next(ending, "revoked", T0 + 530, past.order(T0 + 505, lease))


def a_session_that_expired_without_a_cut(past: Past) -> None:
    lease = past.issue(backend="redis")
    past.next(lease, "expired", DEADLINE + 30, EndCause(kind="deadline", at_ms=DEADLINE))


def forwarded_by_a_gateway_that_gave_no_word(past: Past) -> None:
    lease = past.issue()
    past.end(lease, past.order(T0 + 500, lease), T0 + 510)
    past.at_gateway(lease, T0 + 511 + GRACE_MS, forwards=True)


def woken_late_and_published(past: Past) -> None:
    lease = past.issue()
    past.expire(lease)
    past.record(lease, DEADLINE + 900)


def a_seq_is_missing(past: Past) -> None:
    lease = past.issue()
    cause = past.order(T0 + 500, lease)
    past.next(lease.model_copy(update={"seq": 2}), "revoked", T0 + 510, cause)


def active_after_its_cut(past: Past) -> None:
    lease = past.issue(backend="redis")
    ending = past.next(lease, "ending", DEADLINE + 10, EndCause(kind="deadline", at_ms=DEADLINE))
    again = past.next(ending, "active", DEADLINE + 20)
    past.expire(again, DEADLINE + 30)


def two_records_with_one_seq(past: Past) -> None:
    lease = past.issue(backend="redis")
    cause = past.order(T0 + 500, lease)
    past.next(lease, "ending", T0 + 505, past.order(T0 + 501, lease))
    past.end(lease, cause, T0 + 510)


def its_deadline_moved(past: Past) -> None:
    past.expire(past.issue().model_copy(update={"deadline": T0_S + TTL_S - 5}))


def forged(past: Past) -> None:
    past.history.forged.append("lease/0@7: signed by nobody of authority")


def never_replied_to(past: Past) -> None:
    past.history.requests[str(uuid.uuid4())] = T0


def not_told_by_audit(past: Past) -> None:
    past.history.audited.discard(next(iter(past.history.audited)))


def forked_by_audit(past: Past) -> None:
    past.history.trail.append(Fault("duplicated", "0", "another event 7 stands there as well", 7))


def forwarded_behind_a_gateways_word(past: Past) -> None:
    lease = past.issue()
    cause = past.order(T0 + 500, lease)
    past.end(lease, cause, T0 + 510)
    past.give_word(cause, T0 + 505)
    past.at_gateway(lease, T0 + 506, forwards=True)


def its_only_end_is_void(past: Past) -> None:
    lease = past.issue()
    past.next(lease, "expired", DEADLINE + 30, EndCause(kind="deadline", at_ms=DEADLINE), void=True)
    past.record(lease, DEADLINE + 40)


def a_void_record_is_the_last(past: Past) -> None:
    lease = past.issue()
    past.expire(lease)
    past.next(lease, "ending", DEADLINE + 60, past.order(DEADLINE - 20, lease), void=True)


PLANTED: list[tuple[str, Plant]] = [
    ("lost", no_end),
    ("lost", cut_and_never_undone),
    ("lost", minted_and_forgotten),
    ("lost", its_only_end_is_void),
    ("lost", replied_before_kafka_had_it),
    ("double", two_ends),
    ("double", the_same_end_of_another_moment),
    ("double", a_second_end_of_an_older_epoch_that_came_in_time),
    ("double", issued_twice),
    ("double", two_leases_of_one_request),
    ("early", expired_early),
    ("early", cut_early),
    ("early", refused_unasked),
    ("early", refused_by_a_gateway_whose_clock_was_far_off),
    ("early", refused_before_it_was_asked),
    ("leaked", left_at_its_target),
    ("worked", accepted_after_its_cut),
    ("worked", accepted_after_its_deadline),
    ("worked", session_alive_after_its_end),
    ("worked", forwarded_by_a_view_that_is_too_old),
    ("worked", forwarded_long_after_its_deadline),
    ("escaped", delivered_and_behind_a_kill_switch),
    ("escaped", behind_a_kill_switch),
    ("escaped", missed_by_a_kill_switch),
    ("forwarded", forwarded_behind_a_gateways_word),
    ("forwarded", forwarded_by_a_gateway_that_gave_no_word),
    ("uncaused", ended_for_no_reason),
    ("uncaused", ended_by_what_came_later),
    ("uncaused", ended_by_an_order_about_others),
    ("uncaused", ended_by_an_order_from_before_its_request),
    ("resting", issued_on_what_was_held),
    ("unentitled", released_by_another_agent),
    ("unentitled", stopped_by_another_sponsor),
    ("unentitled", stopped_by_a_sponsor_who_gave_it_away_long_ago),
    ("unentitled", stopped_by_a_sponsor_who_took_it_over_later),
    ("unentitled", stopped_by_a_sponsor_who_was_disabled),
    ("unentitled", stopped_by_who_was_an_operator_once),
    ("unentitled", stopped_by_nobody_in_particular),
    ("unentitled", cut_by_a_gateway_for_somebody_without_a_say),
    ("unentitled", asked_for_by_an_agent_that_may_only_give_back),
    ("unentitled", ended_with_a_task_that_goes_on),
    ("unentitled", ended_with_its_task_before_that_was_ended),
    ("unentitled", ended_by_a_revoker_for_no_record),
    ("unentitled", ended_with_somebody_elses_task),
    ("unentitled", ended_with_the_sponsor_of_another_agent),
    ("unentitled", ended_within_its_ceiling),
    ("unentitled", revoked_by_a_service_of_its_own_accord),
    ("early", refused_as_somebody_without_a_say_asked),
    ("uncaused", of_another_kind_than_asked),
    ("uncaused", aborted_by_a_deadline_that_has_not_come),
    ("uncaused", revoked_and_said_to_have_expired),
    ("uncaused", expired_and_said_to_be_given_back),
    ("uncaused", caused_earlier_than_it_was_asked_for),
    ("uncaused", given_another_reason_than_was_asked_with),
    ("revived", woken_late_and_published),
    ("revived", a_void_record_is_the_last),
    ("broken", a_seq_is_missing),
    ("broken", active_after_its_cut),
    ("broken", two_records_with_one_seq),
    ("broken", its_deadline_moved),
    ("broken", ended_for_another_reason_than_it_was_cut_for),
    ("broken", a_session_that_expired_without_a_cut),
    ("broken", forged),
    ("unanswered", never_replied_to),
    ("unaudited", not_told_by_audit),
    ("tampered", forked_by_audit),
]


@pytest.mark.parametrize(
    ("kind", "plant"), PLANTED, ids=lambda one: one if isinstance(one, str) else one.__name__
)
def test_a_planted_fault_is_found(kind: str, plant: Plant) -> None:
    past = clean()
    plant(past)
    problems = check(past.history)
    assert kind in {problem.kind for problem in problems}
    assert tally(problems)[kind] == 1


def test_every_kind_of_problem_is_planted() -> None:
    assert {kind for kind, _ in PLANTED} == set(KINDS)
