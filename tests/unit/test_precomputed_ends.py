"""What is done ahead for leases that are due soon: remembered for the very record that was looked at, and no longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ringfence.kernel.kafka.record import Outbound
from ringfence.model.lease_store import prepare_step
from ringfence.model.leases.unverified_records import summary_of
from ringfence.revoker.mass_expiry.precomputed_ends import PrecomputedEnd, PrecomputedEnds, digest_of
from tests.support.leases import lease, step


def precomputed(
    record: bytes = b"one", deadline: int = 2_000_000_000, agent_id: str = "deploy-bot", **more: Any
) -> PrecomputedEnd:
    end = step(lease(deadline=deadline, agent_id=agent_id, **more), "expired")
    claims = end.lease.claims
    sent = Outbound(claims.lease_id, end.lease.jws.encode(), claims.jti)
    return PrecomputedEnd(digest_of(record), summary_of(claims), agent_id, prepare_step(end), sent)


def made(
    basis: Callable[[], object] = lambda: 1,
    *,
    shard_of: Callable[[str], int] = lambda _: 0,
    max_ends: int = 100,
) -> PrecomputedEnds:
    return PrecomputedEnds(basis, shard_of, max_ends)


def taken(store: PrecomputedEnds, *ends: PrecomputedEnd, record: bytes = b"one") -> list[bool]:
    """Which of these are remembered for a lease whose record this is."""
    return [store.take(end.step.lease_id, record) is end for end in ends]


def test_it_is_taken_once_and_by_the_very_record() -> None:
    store, end, other = made(), precomputed(), precomputed()
    store.add(end)
    assert taken(store, other) == [False]
    assert taken(store, end) == [True]
    assert taken(store, end) == [False]
    store.add(end)
    assert taken(store, end, record=b"another") == [False]
    assert taken(store, end) == [False], "it follows a record that is there no more"


def test_what_it_rests_on_has_changed() -> None:
    version = 1
    store, ends = made(lambda: version), [precomputed() for _ in range(4)]
    store.add(ends[0])
    version = 2
    assert taken(store, ends[0]) == [False]
    store.add(ends[1])
    assert taken(store, ends[1]) == [True]
    store.add(ends[2])
    version = 3
    store.add(ends[3])
    assert taken(store, *ends[2:]) == [False, True]
    store.add(ends[2])
    version = 4
    assert store.take_due(0, 3_000_000_000_000, 10) == []


def test_it_remembers_the_latest_only() -> None:
    store, ends = made(max_ends=2), [precomputed() for _ in range(3)]
    for end in ends:
        store.add(end)
    assert taken(store, *ends) == [False, True, True]


def test_leases_that_were_due_long_ago_are_forgotten() -> None:
    store, ends = made(), [precomputed(deadline=deadline) for deadline in (1000, 1010)]
    for end in ends:
        store.add(end)
    store.forget(1010)
    assert taken(store, *ends) == [False, True]


def test_what_is_due_in_a_shard_is_taken_once_and_nothing_before_its_time() -> None:
    shards: dict[str, int] = {}
    store = made(shard_of=shards.__getitem__)
    ends = [precomputed(deadline=deadline) for deadline in (1000, 1000, 1000, 1001, 1000)]
    for end, shard in zip(ends, (3, 3, 3, 3, 4), strict=True):
        shards[end.step.lease_id] = shard
        store.add(end)
    assert store.take_due(3, 999_999, 10) == []
    assert store.take_due(3, 1_000_000, 2) == ends[:2]
    assert store.take_due(3, 1_000_000, 2) == ends[2:3]
    assert store.take_due(3, 1_000_000, 2) == []
    assert taken(store, *ends) == [False, False, False, True, True]


def test_what_is_due_together_comes_by_agents_and_what_is_due_sooner_before_it() -> None:
    store = made()
    due = [(999, "c"), (1000, "b"), (1000, "a"), (1000, "b"), (1000, "a"), (1001, "a")]
    ends = [precomputed(deadline=deadline, agent_id=agent) for deadline, agent in due]
    for end in ends:
        store.add(end)
    assert store.take_due(0, 1_000_000, 3) == [ends[n] for n in (0, 2, 4)]
    store.add(late := precomputed(deadline=1000, agent_id="a"))
    assert store.take_due(0, 1_001_000, 9) == [ends[n] for n in (1, 3)], "what was found to be due goes first"
    assert store.take_due(0, 1_001_000, 9) == [late, ends[5]]


def test_what_was_found_to_be_due_and_is_due_later_now_waits() -> None:
    store = made()
    ends = [precomputed(deadline=1000) for _ in range(3)]
    for end in ends:
        store.add(end)
    assert store.take_due(0, 1_000_000, 1) == ends[:1]
    longer = precomputed(deadline=1005, lease_id=ends[1].step.lease_id)
    store.add(longer)
    assert store.take_due(0, 1_000_000, 9) == ends[2:]
    assert store.take_due(0, 1_005_000, 9) == [longer]
