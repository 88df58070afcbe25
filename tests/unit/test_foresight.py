"""What is done ahead for leases that are due soon: remembered for the very record that was looked at, and no longer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ringfence.kernel.kafka.record import Outbound
from ringfence.model.lease_store import prepare_step
from ringfence.revoker.mass_expiry.own_record_cache import glance_of
from ringfence.revoker.mass_expiry.precomputed import PrecomputedEnd, PrecomputedEnds, digest_of
from tests.support.leases import lease, step


def foreseen(
    record: bytes = b"one", deadline: int = 2_000_000_000, agent_id: str = "deploy-bot", **more: Any
) -> PrecomputedEnd:
    end = step(lease(deadline=deadline, agent_id=agent_id, **more), "expired")
    claims = end.lease.claims
    sent = Outbound(claims.lease_id, end.lease.jws.encode(), claims.jti)
    return PrecomputedEnd(digest_of(record), glance_of(claims), agent_id, prepare_step(end), sent)


def made(
    circumstances: Callable[[], object] = lambda: 1,
    *,
    shard_of: Callable[[str], int] = lambda _: 0,
    most: int = 100,
) -> PrecomputedEnds:
    return PrecomputedEnds(circumstances, shard_of, most)


def taken(foresight: PrecomputedEnds, *ends: PrecomputedEnd, record: bytes = b"one") -> list[bool]:
    """Which of these are remembered for a lease whose record this is."""
    return [foresight.take(end.step.lease_id, record) is end for end in ends]


def test_it_is_taken_once_and_by_the_very_record() -> None:
    foresight, end, other = made(), foreseen(), foreseen()
    foresight.remember(end)
    assert taken(foresight, other) == [False]
    assert taken(foresight, end) == [True]
    assert taken(foresight, end) == [False]
    foresight.remember(end)
    assert taken(foresight, end, record=b"another") == [False]
    assert taken(foresight, end) == [False], "it follows a record that is there no more"


def test_what_it_rests_on_has_changed() -> None:
    version = 1
    foresight, ends = made(lambda: version), [foreseen() for _ in range(4)]
    foresight.remember(ends[0])
    version = 2
    assert taken(foresight, ends[0]) == [False]
    foresight.remember(ends[1])
    assert taken(foresight, ends[1]) == [True]
    foresight.remember(ends[2])
    version = 3
    foresight.remember(ends[3])
    assert taken(foresight, *ends[2:]) == [False, True]
    foresight.remember(ends[2])
    version = 4
    assert foresight.take_due(0, 3_000_000_000_000, 10) == []


def test_it_remembers_the_latest_only() -> None:
    foresight, ends = made(most=2), [foreseen() for _ in range(3)]
    for end in ends:
        foresight.remember(end)
    assert taken(foresight, *ends) == [False, True, True]


def test_leases_that_were_due_long_ago_are_forgotten() -> None:
    foresight, ends = made(), [foreseen(deadline=deadline) for deadline in (1000, 1010)]
    for end in ends:
        foresight.remember(end)
    foresight.forget(1010)
    assert taken(foresight, *ends) == [False, True]


def test_what_is_due_in_a_shard_is_taken_once_and_nothing_before_its_time() -> None:
    shards: dict[str, int] = {}
    foresight = made(shard_of=shards.__getitem__)
    ends = [foreseen(deadline=deadline) for deadline in (1000, 1000, 1000, 1001, 1000)]
    for end, shard in zip(ends, (3, 3, 3, 3, 4), strict=True):
        shards[end.step.lease_id] = shard
        foresight.remember(end)
    assert foresight.take_due(3, 999_999, 10) == []
    assert foresight.take_due(3, 1_000_000, 2) == ends[:2]
    assert foresight.take_due(3, 1_000_000, 2) == ends[2:3]
    assert foresight.take_due(3, 1_000_000, 2) == []
    assert taken(foresight, *ends) == [False, False, False, True, True]


def test_what_is_due_together_comes_by_agents_and_what_is_due_sooner_before_it() -> None:
    foresight = made()
    due = [(999, "c"), (1000, "b"), (1000, "a"), (1000, "b"), (1000, "a"), (1001, "a")]
    ends = [foreseen(deadline=deadline, agent_id=agent) for deadline, agent in due]
    for end in ends:
        foresight.remember(end)
    assert foresight.take_due(0, 1_000_000, 3) == [ends[n] for n in (0, 2, 4)]
    foresight.remember(late := foreseen(deadline=1000, agent_id="a"))
    assert foresight.take_due(0, 1_001_000, 9) == [ends[n] for n in (1, 3)], (
        "what was found to be due goes first"
    )
    assert foresight.take_due(0, 1_001_000, 9) == [late, ends[5]]


def test_what_was_found_to_be_due_and_is_due_later_now_waits() -> None:
    foresight = made()
    ends = [foreseen(deadline=1000) for _ in range(3)]
    for end in ends:
        foresight.remember(end)
    assert foresight.take_due(0, 1_000_000, 1) == ends[:1]
    longer = foreseen(deadline=1005, lease_id=ends[1].step.lease_id)
    foresight.remember(longer)
    assert foresight.take_due(0, 1_000_000, 9) == ends[2:]
    assert foresight.take_due(0, 1_005_000, 9) == [longer]
