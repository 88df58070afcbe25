"""The gateway's table of leases: which may be used, what ends one, and who is told."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.gateway.state.leases import (
    ENDED_KEPT_MS,
    LEASES_SINCE_MS,
    REVOCATIONS_KEPT_MS,
    SLACK_MS,
    LeaseTable,
)
from ringfence.kernel.base.clock import MAX_SKEW_MS
from ringfence.messages.enrolment import InstanceRef, RunRef
from ringfence.messages.lease import EndCause, Lease
from ringfence.model.leases.lifecycle import follow
from ringfence.model.verdict import ALLOWED, Refused
from tests.support import leases
from tests.support.in_memory_registry import START_MS, FixedClock, permission
from tests.support.verdicts import code_of

NOW_S = START_MS // 1000
AGENT, TARGET = "bot", "hub"


@pytest.fixture
def clock() -> FixedClock:
    return FixedClock()


@pytest.fixture
def table(clock: FixedClock) -> LeaseTable:
    return LeaseTable(clock)


def lease(**fields: Any) -> Lease:
    given = {
        "agent_id": AGENT, "target_id": TARGET, "delivery": "gateway", "deadline": NOW_S + 600,
        "requested_at_ms": START_MS, **fields,
    }  # fmt: skip
    return leases.lease(**given).claims


def usable(table: LeaseTable, task_id: str | None = None) -> set[str]:
    return {one.lease_id for one in table.usable(AGENT, task_id, TARGET)}


@pytest.mark.parametrize(
    "terms",
    [
        {"deadline": NOW_S + 1200},
        {"scope": (permission("**"),)},
        {"target_id": "elsewhere"},
        {"agent_id": "another", "act": ("another",)},
        {"task_id": "11111111-1111-4111-8111-111111111111"},
        {"on_behalf_of": "olga"},
        {"key_thumbprint": "x" * 43},
        {"delivery": "agent"},
    ],
    ids=lambda terms: next(iter(terms)),
)
def test_no_later_record_changes_the_terms_of_a_lease(
    table: LeaseTable, clock: FixedClock, terms: dict[str, Any]
) -> None:
    """A revoker that is taken over signs a further record of a lease that a gateway knows already."""
    one = lease()
    table.apply(one)
    table.apply(one.model_copy(update={"seq": 2, "jti": "a-later-record", **terms}))
    assert table.get(one.lease_id) == one
    assert usable(table) == {one.lease_id}
    clock.ms = one.deadline * 1000
    table.sweep()
    assert usable(table) == set()
    cause = EndCause(kind="deadline", at_ms=clock.ms)
    table.apply(follow(one, "ending", by=leases.REVOKER, cause=cause))
    found = table.get(one.lease_id)
    assert found is not None
    assert found.status == "ending", "a true record still counts"


def test_no_later_record_revives_a_lease(table: LeaseTable, clock: FixedClock) -> None:
    one = lease()
    ending = follow(one, "ending", by=leases.REVOKER, cause=leases.CAUSE)
    ended = follow(ending, "revoked", by=leases.REVOKER, cause=leases.CAUSE)
    table.apply(one)
    for record in (ending, ended):
        table.apply(record)
        table.apply(one.model_copy(update={"seq": record.seq + 5}))
        assert usable(table) == set()
    clock.ms += ENDED_KEPT_MS
    table.sweep()
    assert table.get(one.lease_id) is None
    table.apply(one.model_copy(update={"seq": 9}))
    assert usable(table) == set(), "also after it has been forgotten"


class Told:
    def __init__(self) -> None:
        self.times = 0

    def __call__(self) -> None:
        self.times += 1


@pytest.mark.parametrize(
    ("ahead_ms", "past_ms", "code"),
    [
        (0, 0, "lease_ended"),
        (MAX_SKEW_MS, 0, "lease_ended"),  # as far off as clocks are, nothing is said of them
        (MAX_SKEW_MS + 1, 0, "stale_view"),
        (3000, 2999, "stale_view"),
        (3000, 3000, "lease_ended"),
    ],
)
def test_lease_ended_only_by_a_fast_clock_is_refused_as_stale(
    clock: FixedClock, ahead_ms: int, past_ms: int, code: str
) -> None:
    table = LeaseTable(clock, lambda: clock.ms - ahead_ms)
    mine = lease(deadline=NOW_S + 10)
    table.apply(mine)
    clock.ms = (NOW_S + 10) * 1000 - 1
    assert table.check_live(mine) == ALLOWED
    clock.ms += 1 + past_ms
    live = table.check_live(mine)
    assert isinstance(live, Refused)
    assert live.reason.code == code
    assert ("try again" in live.reason.message) == (code == "stale_view")
    assert usable(table) == set(), "it is denied by whatever clock"


def test_only_live_leases_for_gateways_of_this_agent_task_and_target(table: LeaseTable) -> None:
    mine = lease()
    for other in (
        lease(agent_id="other"), lease(target_id="other"), lease(delivery="agent"), lease(status="minting"),
        lease(status="ending"), lease(status="released"),
    ):  # fmt: skip
        table.apply(other)
    table.apply(mine)
    elsewhere = lease()
    table.apply(elsewhere)
    assert usable(table, mine.task_id) == {mine.lease_id}
    assert usable(table) == {mine.lease_id, elsewhere.lease_id}
    assert usable(table, "another") == set()


@pytest.mark.parametrize("task_id", ["one task", "another"])
def test_a_lease_that_ends_leaves_others_of_its_task_and_agent_usable(
    table: LeaseTable, task_id: str
) -> None:
    ended, other = lease(task_id="one task"), lease(task_id=task_id)
    for one in (ended, other):
        table.apply(one)
    version = table.version((AGENT, TARGET))
    table.apply(follow(ended, "ending", by=leases.REVOKER, cause=leases.CAUSE))
    assert usable(table) == {other.lease_id}
    assert table.version((AGENT, TARGET)) == version
    assert table.tasks() == {task_id}


def test_the_highest_seq_counts_in_whatever_order(table: LeaseTable, clock: FixedClock) -> None:
    one = lease(seq=2, status="revoked")
    table.apply(one)
    table.apply(one.model_copy(update={"seq": 1, "status": "active"}))
    assert usable(table) == set()
    clock.ms += ENDED_KEPT_MS
    table.sweep()
    table.apply(one.model_copy(update={"seq": 1, "status": "active"}))
    assert usable(table) == set(), "an older record that came late revived it"


def test_a_lease_ends_at_its_deadline_by_itself(table: LeaseTable, clock: FixedClock) -> None:
    one, told = lease(), Told()
    table.apply(one)
    table.watch(one.lease_id, told)
    clock.ms = one.deadline * 1000 - 1
    table.sweep()
    assert (usable(table), told.times) == ({one.lease_id}, 0)
    clock.ms += 1
    assert usable(table) == set(), "also before anybody swept"
    table.sweep()
    assert told.times == 1


@pytest.mark.parametrize("mark", ["agent:bot", "task:T", "target:hub", "sponsor:sam", "user:maria", "all"])
def test_a_fence_cuts_what_was_requested_by_then_and_nothing_later(table: LeaseTable, mark: str) -> None:
    fields = {"sponsor": "sam", "on_behalf_of": "maria", "task_id": "T"}
    before, after = lease(**fields), lease(**fields, requested_at_ms=START_MS + 1)
    told, not_told = Told(), Told()
    for one, by in ((before, told), (after, not_told)):
        table.apply(one)
        table.watch(one.lease_id, by)
    table.fence(mark, START_MS, revocation_id="an order")
    assert usable(table) == {after.lease_id}
    assert (told.times, not_told.times) == (1, 0)
    assert code_of(table.check_live(before)) == "lease_cut"
    late = lease(**fields)
    table.apply(late)
    assert late.lease_id not in usable(table), "a record that came after the order"
    table.fence(mark, START_MS - 1000, revocation_id="another")
    assert usable(table) == {after.lease_id}, "an older order took a younger one back"


@pytest.mark.parametrize("first_read", ["first", "second"])
def test_an_order_that_is_sent_again_cuts_nothing_more(table: LeaseTable, first_read: str) -> None:
    """Whoever may write to the topic has the true order of before, and no key."""
    before, after = lease(), lease(requested_at_ms=START_MS + 5000)
    watching = Told()
    for one in (before, after):
        table.apply(one)
    table.watch(after.lease_id, watching)
    said = [START_MS, START_MS + 9000]
    for at_ms in said if first_read == "first" else reversed(said):  # partitions are read in any order
        table.fence("agent:bot", at_ms, revocation_id="one order")
    assert usable(table) == {after.lease_id}
    assert watching.times == (0 if first_read == "first" else 1)
    table.fence("agent:bot", START_MS + 6000, revocation_id="another order")
    assert usable(table) == set()


def test_a_revoked_lease_is_cut_before_its_record_says_so(table: LeaseTable) -> None:
    one, told = lease(), Told()
    over: list[str] = []
    table.on_lease_end(over.append)
    table.apply(one)
    table.watch(one.lease_id, told)
    table.revoke(one.lease_id, START_MS)
    assert usable(table) == set()
    assert (told.times, over) == (1, [one.lease_id])
    table.apply(one.model_copy(update={"seq": 2, "status": "ending"}))
    table.apply(one.model_copy(update={"seq": 3, "status": "revoked"}))
    assert told.times == 1, "told once"


def test_watcher_of_an_ended_lease_is_called_at_once(table: LeaseTable) -> None:
    told = Told()
    table.watch("unknown", told)
    one = lease()
    table.apply(one)
    table.revoke(one.lease_id, START_MS)
    table.watch(one.lease_id, told)
    assert told.times == 2


def test_removed_watcher_is_not_called(table: LeaseTable) -> None:
    one, first, second = lease(), Told(), Told()
    table.apply(one)
    back = table.watch(one.lease_id, first)
    table.watch(one.lease_id, second)
    back()
    back()
    table.end_all_watched()
    assert (first.times, second.times) == (0, 1)
    back()
    table.watch(one.lease_id, first)()
    assert not table._watchers


def test_all_who_watch_a_lease_are_told_of_its_end(table: LeaseTable) -> None:
    one, first, second = lease(), Told(), Told()
    table.apply(one)
    for told in (first, second):
        table.watch(one.lease_id, told)
    table.revoke(one.lease_id, START_MS)
    assert (first.times, second.times) == (1, 1)


def test_a_record_that_ends_a_lease_tells_who_watches_it(table: LeaseTable) -> None:
    one, told = lease(), Told()
    over: list[str] = []
    table.on_lease_end(over.append)
    table.apply(one)
    table.watch(one.lease_id, told)
    table.apply(one.model_copy(update={"seq": 2, "status": "ending"}))
    assert (told.times, over) == (1, [one.lease_id])


def test_a_fence_tells_nobody_who_watches_a_lease_that_it_does_not_cover(table: LeaseTable) -> None:
    other, told = lease(agent_id="other"), Told()
    table.apply(other)
    table.watch(other.lease_id, told)
    table.fence("agent:bot", START_MS, revocation_id="an order")
    assert told.times == 0


def test_an_order_of_another_selector_makes_no_fence_wider(table: LeaseTable) -> None:
    later = lease(requested_at_ms=START_MS + 5000)
    table.apply(later)
    table.fence("agent:bot", START_MS + 3000, revocation_id="an order")
    table.fence("agent:other", START_MS + 9000, revocation_id="another")
    table.fence("agent:bot", START_MS, revocation_id="an order")
    assert usable(table) == {later.lease_id}


def test_watcher_of_a_forgotten_lease_is_not_called_for_others(table: LeaseTable, clock: FixedClock) -> None:
    """A gateway may watch what it has seen, and the table has forgotten."""
    forgotten, told = lease(status="revoked"), Told()
    table.apply(forgotten)
    clock.ms += ENDED_KEPT_MS
    table.sweep()
    assert code_of(table.check_live(forgotten)) == "lease_ended"
    for lease_id in (forgotten.lease_id, "unknown"):
        table.watch_live(lease_id, told)
    table.fence("all", clock.ms, revocation_id="order")
    table.end_run(RUN)
    assert told.times == 0


def test_ended_leases_and_fences_are_swept(table: LeaseTable, clock: FixedClock) -> None:
    for number in range(100):
        one = lease(task_id=f"task-{number}")
        table.apply(one)
        if number % 2:
            table.apply(one.model_copy(update={"seq": 2, "status": "released"}))
        table.revoke(one.lease_id, START_MS)
        table.fence(f"task:task-{number}", START_MS, revocation_id=f"order-{number}")
    assert len(table) == 100
    clock.ms = (NOW_S + 600) * 1000 + SLACK_MS + ENDED_KEPT_MS
    for _ in range(3):
        table.sweep()
    assert len(table) == 0
    assert not table._usable
    assert not table._due
    clock.ms += REVOCATIONS_KEPT_MS + ENDED_KEPT_MS
    table.sweep()
    assert not table._revoked
    assert not table._fences
    assert not table._revocations


def test_an_order_about_what_has_just_ended_finds_its_lease(table: LeaseTable, clock: FixedClock) -> None:
    one = lease()
    table.apply(one)
    table.apply(one.model_copy(update={"seq": 2, "status": "revoked"}))
    table.sweep()
    assert table.get(one.lease_id) is not None
    clock.ms += ENDED_KEPT_MS
    table.sweep()
    assert table.get(one.lease_id) is None


def test_a_lease_and_the_number_of_its_record_are_kept_for_their_times(
    table: LeaseTable, clock: FixedClock
) -> None:
    live, released = lease(), lease()
    table.apply(live)
    table.apply(released)
    table.apply(released.model_copy(update={"seq": 2, "status": "released"}))
    deadline_ms = live.deadline * 1000
    kept: list[tuple[bool, bool, int]] = []
    for at_ms in (
        START_MS + ENDED_KEPT_MS - 1, START_MS + ENDED_KEPT_MS, deadline_ms, deadline_ms + SLACK_MS - 1,
        deadline_ms + SLACK_MS, deadline_ms + ENDED_KEPT_MS + SLACK_MS,
    ):  # fmt: skip
        clock.ms = at_ms
        table.sweep()
        kept.append(
            (table.get(live.lease_id) is not None, table.get(released.lease_id) is not None, len(table))
        )
    assert kept == [
        (True, True, 2),
        (True, False, 2),
        (True, False, 2),
        (True, False, 2),
        (False, False, 0),
        (False, False, 0),
    ]


@pytest.mark.parametrize(("over_ms", "kept"), [(0, True), (1, False)])
def test_revocations_fences_and_ended_runs_are_kept_for_three_days(
    table: LeaseTable, clock: FixedClock, over_ms: int, kept: bool
) -> None:
    table.revoke("one", START_MS)
    table.fence("agent:bot", START_MS, revocation_id="order")
    table.end_run(RUN)
    clock.ms += REVOCATIONS_KEPT_MS + over_ms
    table.sweep()
    assert [bool(one) for one in (table._revoked, table._fences, table._revocations, table._ended_runs)] == (
        [kept] * 4
    )


@pytest.mark.parametrize("fences", [1, 2])
def test_a_fence_after_old_ones_were_dropped_cuts_all_the_same(
    table: LeaseTable, clock: FixedClock, fences: int
) -> None:
    one = lease()
    table.apply(one)
    for number in range(fences):
        table.fence(f"agent:other-{number}", START_MS, revocation_id=f"order-{number}")
    assert usable(table) == {one.lease_id}
    clock.ms += ENDED_KEPT_MS
    table.sweep()
    table.fence("agent:bot", START_MS, revocation_id="order")
    assert usable(table) == set()


def test_times_for_which_things_are_kept() -> None:
    hour_ms = 3_600_000
    times_ms = [ENDED_KEPT_MS, SLACK_MS, REVOCATIONS_KEPT_MS, LEASES_SINCE_MS]
    assert times_ms == [60_000, 60_000, 72 * hour_ms, 25 * hour_ms]


# --- runs, and look-ups -----------------------------------------------------------------------------------------------

RUN, OTHER_RUN = "5f7f9a0e-0000-4000-8000-00000000000a", "5f7f9a0e-0000-4000-8000-00000000000b"


def of_run(run_id: str | None, **fields: Any) -> Lease:
    """A lease whose credential the instance of a run has itself; None for an instance of a platform."""
    run = RunRef(run_id=run_id, task_id=RUN) if run_id is not None else None
    instance = InstanceRef(
        instance_id=RUN,
        issuer="https://x.example",
        subject="s",
        selector="0" * 64,
        not_after=NOW_S + 900,
        run=run,
    )
    return lease(**{"delivery": "agent", "instance": instance, **fields})


def test_the_end_of_a_run_cuts_its_leases_and_no_others(table: LeaseTable) -> None:
    ended, injected = of_run(RUN), of_run(RUN, delivery="gateway")
    others = [of_run(OTHER_RUN), of_run(None), lease()]
    told = {one.lease_id: Told() for one in (ended, injected, *others)}
    for one in (ended, injected, *others):
        table.apply(one)
        table.watch(one.lease_id, told[one.lease_id])
    assert table.delivered_to_run(RUN) == [ended]
    table.end_run(RUN)
    assert [told[one.lease_id].times for one in (ended, injected, *others)] == [1, 1, 0, 0, 0]
    for one in (ended, injected):
        live = table.check_live(one)
        assert isinstance(live, Refused)
        assert (live.reason.code, live.reason.side) == ("run_ended", "lease")
    assert [table.check_live(one) for one in others] == [ALLOWED, ALLOWED, ALLOWED]
    assert table.delivered_to_run(RUN) == []
    assert table.delivered_to_run(OTHER_RUN) == [others[0]]
    late = of_run(RUN)
    table.apply(late)
    assert table.delivered_to_run(RUN) == [], "a record that came after the end of the run"
    assert table.delivered_to_run("unknown") == []


def test_a_lease_of_a_run_that_the_gateway_injects_leaves_the_table_with_its_end(table: LeaseTable) -> None:
    injected = of_run(RUN, delivery="gateway")
    table.apply(injected)
    assert usable(table) == {injected.lease_id}
    table.apply(follow(injected, "ending", by=leases.REVOKER, cause=leases.CAUSE))
    assert usable(table) == set()


def test_a_lease_of_a_run_leaves_the_table_with_its_end(table: LeaseTable, clock: FixedClock) -> None:
    first, second = of_run(RUN), of_run(RUN)
    for one in (first, second):
        table.apply(one)
    table.apply(follow(first, "ending", by=leases.REVOKER, cause=leases.CAUSE))
    assert table.delivered_to_run(RUN) == [second]
    clock.ms = second.deadline * 1000 + ENDED_KEPT_MS
    table.end_run(RUN)
    for _ in range(2):
        table.sweep()
    assert not table._of_runs
    clock.ms += REVOCATIONS_KEPT_MS + ENDED_KEPT_MS
    table.sweep()
    assert not table._ended_runs


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda table, one: table.revoke(one.lease_id, START_MS), "lease_cut"),
        (lambda table, one: table.fence("all", START_MS, revocation_id="x"), "lease_cut"),
        (
            lambda table, one: table.apply(one.model_copy(update={"seq": 2, "status": "ending"})),
            "lease_ended",
        ),
        (lambda table, one: None, None),
    ],
    ids=["revoked", "fenced", "cut by its record", "live"],
)
def test_a_lease_is_live_unless_something_ended_it(table: LeaseTable, make: Any, code: str | None) -> None:
    one = lease()
    assert code_of(table.check_live(one)) == "lease_ended"
    table.apply(one)
    make(table, one)
    assert code_of(table.check_live(one)) == code
    assert table.is_live(one.lease_id, START_MS) == (code is None)
    assert not table.is_live(one.lease_id, one.deadline * 1000)
    assert table.is_live(one.lease_id, one.deadline * 1000 - 1) == (code is None)


def test_the_version_changes_with_each_lease_of_an_agent_at_a_target(table: LeaseTable) -> None:
    key = (AGENT, TARGET)
    assert (table.version(key), table.tasks()) == (-1, set())
    first, second = lease(), lease()
    table.apply(first)
    one = table.version(key)
    table.apply(lease(target_id="other"))
    assert table.version(key) == one
    table.apply(second)
    assert table.version(key) not in (-1, one)
    assert table.tasks() >= {first.task_id, second.task_id}
    for ended in (first, second):
        table.apply(follow(ended, "ending", by=leases.REVOKER, cause=leases.CAUSE))
    assert table.version(key) == -1


def test_a_lease_whose_deadline_is_long_past_is_not_taken(table: LeaseTable) -> None:
    table.apply(lease(deadline=NOW_S - SLACK_MS // 1000))
    assert len(table) == 0
    table.apply(lease(deadline=NOW_S - SLACK_MS // 1000 + 1))
    assert len(table) == 1


def test_a_lease_that_is_being_minted_is_forgotten_after_its_deadline(
    table: LeaseTable, clock: FixedClock
) -> None:
    one, over = lease(status="minting"), list[str]()
    table.on_lease_end(over.append)
    table.apply(one)
    assert over == [], "it has not ended"
    clock.ms = one.deadline * 1000 + ENDED_KEPT_MS + SLACK_MS
    for _ in range(3):
        table.sweep()
    assert len(table) == 0
