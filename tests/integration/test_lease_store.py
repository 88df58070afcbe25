"""The lease store on a real Redis or Valkey: issued once, cut at once, ended once, nothing lost on the way."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ringfence.dev.processes import free_port
from ringfence.dev.redis import EmbeddedRedis
from ringfence.kernel.base.errors import SettingsError, UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import EndCause, LeaseStatus
from ringfence.model.lease_store import (
    Activation,
    ClaimedLeases,
    LeaseStore,
    LostError,
    Preparation,
    SignedLease,
    outbox_field,
)
from ringfence.model.lease_store.keys import AHEAD_MS, FENCE_KEEP_MS
from ringfence.model.leases.lifecycle import ALL_LEASES, selector_keys, shared_selector_keys
from tests.brokers import RedisServer
from tests.support.leases import (
    VISIBLE_MS,
    bearing,
    claimed,
    lease,
    minted,
    minting,
    soon,
    step,
    until,
)
from tests.support.lost_redis import declare_complete
from tests.support.world import WITHIN_S


@pytest.fixture
async def settings(redis_server: RedisServer) -> ServiceSettings:
    settings = ServiceSettings(
        redis_url=redis_server.url, redis_prefix=f"t{uuid.uuid4().hex[:8]}", redis_shards=4
    )
    await declare_complete(settings)
    return settings


def opens_ms(one: SignedLease) -> int:
    """When a lease that is due much later is to be looked at."""
    return one.claims.deadline // 60 * 60_000 - AHEAD_MS


async def test_a_redis_that_does_not_let_us_in_is_told_as_that(settings: ServiceSettings) -> None:
    address = settings.redis_url.removeprefix("redis://")
    store = LeaseStore(settings.model_copy(update={"redis_url": f"redis://nobody:hunter2@{address}"}))
    with pytest.raises(
        UnavailableError, match="another user or password; set RINGFENCE_REDIS_URL"
    ) as refused:
        await store.connect()
    await store.close()
    assert "hunter2" not in str(refused.value)


# --- issuing ----------------------------------------------------------------------------------------------------------


async def test_an_activated_lease_is_active_until_its_deadline(store: LeaseStore) -> None:
    one = lease(deadline=soon())
    assert await store.activate([one]) == [Activation("activated")]
    looked = await store.look(one.claims.lease_id)
    assert looked.active
    assert looked.stored is not None
    assert (looked.stored.status, looked.stored.seq, looked.stored.jws) == ("active", 1, one.jws.encode())
    assert looked.stored.deadline_ms == one.claims.deadline * 1000

    async def over() -> bool:
        return not (await store.look(one.claims.lease_id)).active

    await until(over)
    after = await store.look(one.claims.lease_id)
    assert after.now_ms >= one.claims.deadline * 1000
    assert after.stored is not None  # kept: nobody has ended it yet


async def test_a_lease_that_was_never_issued_is_not_active(store: LeaseStore) -> None:
    looked = await store.look(str(uuid.uuid4()))
    assert (looked.active, looked.stored) == (False, None)


async def test_one_lease_id_is_activated_once_and_tells_what_is_there(
    store: LeaseStore, settings: ServiceSettings
) -> None:
    other = LeaseStore(settings)
    one = lease()
    again = SignedLease(one.claims, "signed.otherwise.1")
    first, second = await asyncio.gather(store.activate([one]), other.activate([again]))
    outcomes = [first[0].outcome, second[0].outcome]
    assert sorted(outcomes) == ["activated", "known"]
    kept = (one if outcomes[0] == "activated" else again).jws.encode()
    known = next(a for a in (first[0], second[0]) if a.outcome == "known")
    assert known.stored is not None
    assert known.stored.jws == kept
    assert (await store.get([one.claims.lease_id]))[one.claims.lease_id].jws == kept
    await other.close()


async def test_an_ended_lease_is_known_and_not_issued_again(store: LeaseStore) -> None:
    one = lease()
    await store.activate([one])
    await store.step([step(one, "ending")], visibility_ms=VISIBLE_MS)
    await store.step([step(one, "ending", "revoked")], visibility_ms=VISIBLE_MS)
    (again,) = await store.activate([one])
    assert again.outcome == "known"
    assert again.stored is not None
    assert again.stored.status == "revoked"
    assert not (await store.look(one.claims.lease_id)).active


@pytest.mark.parametrize("left_s", [-5, 0])
async def test_lease_past_its_deadline_is_not_activated(store: LeaseStore, left_s: int) -> None:
    one = lease(deadline=int(time.time()) + left_s)
    assert await store.activate([one]) == [Activation("late")]
    assert (await store.look(one.claims.lease_id)).stored is None
    assert await store.find(f"agent:{one.claims.agent_id}") == []


@pytest.mark.parametrize("kind", ["agent", "task", "sponsor", "target", "user"])
async def test_a_fence_covers_what_was_requested_by_then_and_nothing_else(
    store: LeaseStore, kind: str
) -> None:
    names = lease().claims
    own = {f: getattr(names, f) for f in ("agent_id", "task_id", "sponsor", "target_id", "on_behalf_of")}
    mark = next(mark for mark in selector_keys(names) if mark.startswith(kind))
    await store.fence({mark: 5000})
    covered = [lease(**own, requested_at_ms=at_ms) for at_ms in [4999, 5000] * 4]  # on all shards
    later, others = lease(**own, requested_at_ms=5001), lease(requested_at_ms=1)
    answers = await store.activate([*covered, later, others])
    assert answers == [Activation("fenced", selector_key=mark)] * 8 + [Activation("activated")] * 2


async def test_the_fence_around_all_covers_every_lease_and_never_falls_back(store: LeaseStore) -> None:
    await store.fence({ALL_LEASES: 5000})
    await store.fence({ALL_LEASES: 3000})
    answers = await store.activate([lease(requested_at_ms=at_ms) for at_ms in (4000, 5000, 5001)])
    assert [a.outcome for a in answers] == ["fenced", "fenced", "activated"]


async def test_fences_go_when_they_are_old_and_not_because_a_later_one_is_far_ahead(
    store: LeaseStore,
) -> None:
    now_ms = time.time_ns() // 1_000_000
    old, lately, ahead = (lease(requested_at_ms=1) for _ in range(3))
    marks = [f"agent:{one.claims.agent_id}" for one in (old, lately, ahead)]
    await store.fence({marks[0]: now_ms - FENCE_KEEP_MS - 60_000})
    await store.fence({marks[1]: now_ms})
    await store.fence({marks[2]: now_ms + 2 * FENCE_KEEP_MS})  # a broker's clock was wrong
    answers = await store.activate([old, lately, ahead])
    assert [answer.outcome for answer in answers] == ["activated", "fenced", "fenced"]


async def test_a_grant_counts_each_lease_that_names_it_once_and_no_more_than_it_may(
    store: LeaseStore, settings: ServiceSettings
) -> None:
    other = LeaseStore(settings)
    await other.connect()
    grant, leases = str(uuid.uuid4()), [str(uuid.uuid4()) for _ in range(40)]
    # Two issuers at once, each with every lease.
    uses = [one.use_grant(grant, lease_id, limit=7) for lease_id in leases for one in (store, other)]
    counted = await asyncio.gather(*uses)
    await other.close()
    assert counted[::2] == counted[1::2]
    assert sum(counted[::2]) == 7
    assert await asyncio.gather(*(store.use_grant(grant, id, limit=7) for id in leases)) == counted[::2]
    assert await store.use_grant(str(uuid.uuid4()), leases[-1], limit=1)  # another grant


async def test_a_batch_larger_than_one_round_trip_keeps_its_order(store: LeaseStore) -> None:
    leases = [lease() for _ in range(1203)]
    twice = [*leases, leases[7]]
    answers = await store.activate(twice)
    assert [a.outcome for a in answers] == ["activated"] * 1203 + ["known"]
    stored = await store.get([one.claims.lease_id for one in leases])
    assert [stored[one.claims.lease_id].jws.decode() for one in leases] == [one.jws for one in leases]
    assert {store.shard_of(one.claims.lease_id) for one in leases} == set(store.shards)


# --- issuing in two steps ---------------------------------------------------------------------------------------------


async def test_a_prepared_lease_is_found_and_not_active_until_it_is_activated(store: LeaseStore) -> None:
    one = minting()
    id = one.claims.lease_id
    assert await store.prepare([one], token="a", mint_ms=VISIBLE_MS) == [Preparation("prepared")]
    looked = await store.look(id)
    assert not looked.active
    assert looked.stored is not None
    assert (looked.stored.status, looked.stored.seq, looked.stored.jws) == ("minting", 1, one.jws.encode())
    for mark in (*selector_keys(one.claims), ALL_LEASES):
        assert id in await bearing(store, mark)
    assert await claimed(store) == {}
    assert [(o.lease_id, o.seq) for o in await store.unpublished(older_than_ms=0)] == [(id, 1)]
    assert await store.activate([minted(one)], token="a") == [Activation("activated")]
    assert (await store.look(id)).active
    (state,) = await store.claim([store.shard_of(id)], limit=10, visibility_ms=1)
    assert (state.leases, state.next_ms) == ({}, opens_ms(one))
    assert sorted((o.lease_id, o.seq) for o in await store.unpublished(older_than_ms=0)) == [(id, 1), (id, 2)]


async def test_a_lease_that_is_not_activated_in_time_comes_to_a_revoker_which_aborts_it(
    store: LeaseStore,
) -> None:
    one = minting()
    await store.prepare([one], token="a", mint_ms=50)
    found = await until(lambda: claimed(store))
    assert found[one.claims.lease_id].status == "minting"
    (aborted,) = await store.step([step(one, "aborted")], visibility_ms=VISIBLE_MS)
    assert aborted.outcome == "done"
    (late,) = await store.activate([minted(one)], token="a")
    assert late.outcome == "lost"
    assert late.stored is not None
    assert late.stored.status == "aborted"
    assert not (await store.look(one.claims.lease_id)).active
    (again,) = await store.prepare([one], token="b", mint_ms=50)
    assert (again.outcome, again.stored and again.stored.status) == ("known", "aborted")


async def test_new_token_takes_over_a_prepared_lease_and_blocks_the_other(store: LeaseStore) -> None:
    one = minting()
    await store.prepare([one], token="a", mint_ms=50)
    other = SignedLease(one.claims, "signed.otherwise.1")
    (taken,) = await store.prepare([other], token="b", mint_ms=VISIBLE_MS)
    assert taken.outcome == "prepared"
    assert taken.stored is not None
    assert taken.stored.jws == one.jws.encode()
    (lost,) = await store.activate([minted(one)], token="a")
    assert lost.outcome == "lost"
    assert not (await store.look(one.claims.lease_id)).active
    assert await claimed(store) == {}  # the time to mint counts anew
    assert await store.activate([minted(one)], token="b") == [Activation("activated")]


async def test_preparing_and_activating_again_change_nothing(store: LeaseStore) -> None:
    one = minting()
    for _ in range(2):
        (prepared,) = await store.prepare([one], token="a", mint_ms=VISIBLE_MS)
        assert prepared.outcome == "prepared"
    for _ in range(2):  # an answer may be lost on its way, and the call repeated
        assert await store.activate([minted(one)], token="a") == [Activation("activated")]
    (known,) = await store.prepare([one], token="a", mint_ms=VISIBLE_MS)
    assert (known.outcome, known.stored and known.stored.seq) == ("known", 2)
    ending = step(minted(one), "ending")
    await store.step([ending], visibility_ms=VISIBLE_MS)
    (lost,) = await store.activate([minted(one)], token="a")
    assert lost.outcome == "lost"
    assert not (await store.look(one.claims.lease_id)).active


async def test_lease_prepared_by_another_or_not_at_all_is_not_activated(store: LeaseStore) -> None:
    one, pure = minting(), lease()
    assert await store.activate([minted(one)], token="a") == [Activation("lost")]
    await store.activate([pure])
    (lost,) = await store.activate([minted(pure)], token="a")
    assert lost.outcome == "lost"
    assert (await store.get([pure.claims.lease_id]))[pure.claims.lease_id].jws == pure.jws.encode()


async def test_fences_and_deadlines_are_looked_at_before_minting_and_after(store: LeaseStore) -> None:
    first, second = minting(requested_at_ms=5000), minting(requested_at_ms=5000)
    over = minting(deadline=int(time.time()))
    due = minting(deadline=soon())
    await store.prepare([first, due], token="a", mint_ms=VISIBLE_MS)
    await store.fence({ALL_LEASES: 5000})
    assert await store.prepare([second, over], token="a", mint_ms=VISIBLE_MS) == [
        Preparation("fenced", selector_key=ALL_LEASES), Preparation("late")
    ]  # fmt: skip
    assert await store.find(f"agent:{second.claims.agent_id}") == []
    (fenced,) = await store.activate([minted(first)], token="a")
    assert (fenced.outcome, fenced.selector_key) == ("fenced", ALL_LEASES)
    assert not (await store.look(first.claims.lease_id)).active

    async def late() -> bool:
        (answer,) = await store.activate([minted(due)], token="wrong, so that it is never activated")
        (asked,) = await store.prepare([due], token="a", mint_ms=VISIBLE_MS)
        return answer.outcome == "lost" and asked.outcome == "late"

    await until(late)
    assert await store.activate([minted(due)], token="a") == [Activation("late")]


async def test_a_lease_can_be_cut_and_ended_in_one_step(store: LeaseStore) -> None:
    one, other = lease(), lease()
    await store.activate([one, other])
    steps = [step(one, "ending"), step(one, "ending", "revoked"), step(other, "ending", "revoked")]
    assert [s.outcome for s in await store.step(steps, visibility_ms=0)] == ["done", "done", "moved"]
    assert await claimed(store) == {}
    assert await store.find(f"agent:{one.claims.agent_id}") == []
    assert await store.find(ALL_LEASES) == [other.claims.lease_id]
    waiting = [(out.lease_id, out.seq) for out in await store.unpublished(older_than_ms=0)]
    assert set(waiting) >= {(one.claims.lease_id, 2), (one.claims.lease_id, 3)}
    assert (await store.get([one.claims.lease_id]))[one.claims.lease_id].status == "revoked"


async def test_a_claimed_lease_can_be_left_alone_for_longer(store: LeaseStore) -> None:
    one, other, ended = lease(), lease(), lease()
    await store.activate([one, other, ended])
    await store.step([step(one, "ending"), step(other, "ending")], visibility_ms=50)
    await store.step([step(ended, "expired")], visibility_ms=50)
    ids = [each.claims.lease_id for each in (one, ended)]
    await store.postpone(dict.fromkeys(ids, VISIBLE_MS))
    found = await until(lambda: claimed(store))
    assert list(found) == [other.claims.lease_id]
    assert await claimed(store) == {}
    await store.postpone({one.claims.lease_id: 0})
    assert list(await until(lambda: claimed(store))) == [one.claims.lease_id]


# --- expiry -----------------------------------------------------------------------------------------------------------


async def test_a_due_lease_is_claimed_by_one_revoker_and_again_when_that_one_dies(
    store: LeaseStore, settings: ServiceSettings
) -> None:
    other = LeaseStore(settings)
    due, late = lease(deadline=soon()), lease()
    await store.activate([due, late])
    assert await claimed(store) == {}
    before = await store.claim([store.shard_of(due.claims.lease_id)], limit=10, visibility_ms=1)
    assert before[0].next_ms == due.claims.deadline * 1000

    async def anyone() -> list[dict[str, Any]]:
        both = await asyncio.gather(claimed(store, 1000), claimed(other, 1000))
        return list(both) if any(both) else []

    first, second = await until(anyone)
    (id,) = list(first) + list(second)  # exactly one of them has it
    assert id == due.claims.lease_id
    taken_over = await until(lambda: claimed(other, VISIBLE_MS))
    assert list(taken_over) == [id]
    assert taken_over[id].jws == due.jws.encode()
    assert await claimed(store) == {}
    await other.close()


async def test_claimed_and_expired_lease_is_not_claimed_again(store: LeaseStore) -> None:
    one = lease(deadline=soon())
    await store.activate([one])
    await until(lambda: claimed(store, 1))
    (ended,) = await store.step([step(one, "expired")], visibility_ms=1)
    assert ended.outcome == "done"
    (state,) = await store.claim([store.shard_of(one.claims.lease_id)], limit=10, visibility_ms=1)
    assert (state.leases, state.next_ms) == ({}, None)


async def test_a_claim_takes_no_more_than_its_limit_and_says_when_the_rest_is_due(store: LeaseStore) -> None:
    deadline = soon()
    leases = [
        one
        for one in (lease(deadline=deadline) for _ in range(40))
        if store.shard_of(one.claims.lease_id) == 0
    ]
    await store.activate(leases)
    seen: list[str] = []

    async def some() -> ClaimedLeases | None:
        (found,) = await store.claim([0], limit=2, visibility_ms=VISIBLE_MS)
        return found if found.leases else None

    while len(seen) < len(leases):
        found = await until(some)
        assert 1 <= len(found.leases) <= 2
        if len(seen) + len(found.leases) < len(leases):
            assert found.next_ms == deadline * 1000  # overdue: ask again at once
        seen += found.leases
    assert sorted(seen) == sorted(one.claims.lease_id for one in leases)


# --- ending -----------------------------------------------------------------------------------------------------------


async def test_from_the_cut_on_a_lease_is_inactive_and_still_found(store: LeaseStore) -> None:
    one = lease()
    await store.activate([one])
    assert [s.outcome for s in await store.step([step(one, "ending")], visibility_ms=VISIBLE_MS)] == ["done"]
    looked = await store.look(one.claims.lease_id)
    assert (looked.active, looked.live) == (False, False)
    assert looked.stored is not None
    assert looked.stored.status == "ending"
    for mark in selector_keys(one.claims):
        assert await bearing(store, mark) == [one.claims.lease_id]


async def test_a_lease_that_was_cut_by_a_revoker_that_died_is_claimed_by_another(store: LeaseStore) -> None:
    one = lease()
    await store.activate([one])
    await store.step([step(one, "ending")], visibility_ms=50)
    found = await until(lambda: claimed(store))
    assert found[one.claims.lease_id].status == "ending"


async def test_of_two_ends_one_counts_and_the_other_is_told(store: LeaseStore) -> None:
    one = lease()
    await store.activate([one])
    ending = step(one, "ending")
    await store.step([ending], visibility_ms=VISIBLE_MS)
    revoked, released = step(one, "ending", "revoked"), step(one, "ending", "released")
    answers = await asyncio.gather(
        store.step([revoked], visibility_ms=VISIBLE_MS), store.step([released], visibility_ms=VISIBLE_MS)
    )
    (first,), (second,) = answers
    assert sorted([first.outcome, second.outcome]) == ["done", "moved"]
    won = "revoked" if first.outcome == "done" else "released"
    moved = first if first.outcome == "moved" else second
    assert moved.stored is not None
    assert moved.stored.status == won


async def test_a_step_that_was_done_changes_nothing_when_it_comes_again(store: LeaseStore) -> None:
    one = lease(deadline=int(time.time()) + 600)
    await store.activate([one])
    expired = step(one, "expired")
    first, second = await store.step([expired, expired], visibility_ms=VISIBLE_MS)
    assert (first.outcome, second.outcome) == ("done", "moved")
    assert second.stored is not None
    assert second.stored.jws == expired.lease.jws.encode()


@pytest.mark.parametrize("won", ["expired", "ending"])
async def test_conflicting_step_stops_every_step_after_it(store: LeaseStore, won: LeaseStatus) -> None:
    """Two causes meet: what one of them means to write second could follow upon what the other wrote first."""
    leases = [lease() for _ in range(200)]  # more than go through one run of a script
    await store.activate(leases)
    other = EndCause(kind="deadline", at_ms=2)
    firsts = await store.step([step(one, won, cause=other) for one in leases], visibility_ms=VISIBLE_MS)
    assert {one.outcome for one in firsts} == {"done"}
    both = [each for one in leases for each in (step(one, "ending"), step(one, "ending", "revoked"))]
    answers = await store.step(both, visibility_ms=VISIBLE_MS)
    assert {one.outcome for one in answers} == {"moved"}
    assert {(one.stored.status, one.stored.seq) for one in answers if one.stored} == {(won, 2)}


async def test_a_lease_nobody_knows_cannot_be_ended(store: LeaseStore) -> None:
    (answer,) = await store.step([step(lease(), "expired")], visibility_ms=VISIBLE_MS)
    assert answer.outcome == "unknown"


async def test_an_ended_lease_leaves_the_indexes_and_keeps_its_record_for_a_while(
    settings: ServiceSettings,
) -> None:
    store = LeaseStore(settings, record_keep_ms=0)
    kept = LeaseStore(settings)
    one, other = lease(), lease(deadline=soon())
    await kept.activate([one, other])
    for which, by in ((one, kept), (other, store)):
        await by.step([step(which, "ending")], visibility_ms=VISIBLE_MS)
        await by.step([step(which, "ending", "revoked")], visibility_ms=VISIBLE_MS)
        for mark in selector_keys(which.claims):
            assert await bearing(kept, mark) == []
    assert await kept.find(ALL_LEASES) == []

    async def gone() -> bool:
        return other.claims.lease_id not in await kept.get([other.claims.lease_id])

    assert (
        await kept.get([other.claims.lease_id])
    ) != {}  # a redelivered decision must find it until its deadline
    await until(gone)
    assert (await kept.get([one.claims.lease_id]))[one.claims.lease_id].status == "revoked"
    await store.close()
    await kept.close()


async def test_leases_are_found_by_each_of_their_marks_across_shards(store: LeaseStore) -> None:
    task = str(uuid.uuid4())
    mine = [lease(task_id=task, agent_id="bot") for _ in range(20)]
    other = lease(agent_id="bot")
    await store.activate([*mine, other])
    for agent_id in (None, "bot"):
        assert sorted(await bearing(store, f"task:{task}", agent_id)) == sorted(
            one.claims.lease_id for one in mine
        )
    assert await bearing(store, f"task:{task}", "another") == []
    assert len(await store.find("agent:bot")) == 21
    assert len(await store.find(ALL_LEASES)) == 21


async def test_leases_of_several_agents_are_found_and_counted_by_mark(
    store: LeaseStore,
) -> None:
    sam = {"sponsor": "sam", "on_behalf_of": "maria"}
    mine = [lease(**sam, agent_id=f"bot-{n % 3}") for n in range(30)]
    others = [lease(**{**sam, name: "another"}, agent_id=f"bot-{n}") for n, name in enumerate(sam)]
    await store.activate([*mine, *mine[:5], *others])
    for mark in shared_selector_keys(mine[0].claims):
        kind = mark.partition(":")[0]
        ids = {one.claims.lease_id for one in (*mine, *others) if mark in selector_keys(one.claims)}
        assert len(ids) == 31, kind
        assert set(await bearing(store, mark)) == ids
        assert await store.count([mark, f"{kind}:another", f"{kind}:nobody"]) == {
            mark: 31,
            f"{kind}:another": 1,
            f"{kind}:nobody": 0,
        }
    ends = [step(one, *statuses) for one in mine for statuses in (("ending",), ("ending", "revoked"))]
    await store.step(ends, visibility_ms=VISIBLE_MS)
    await store.step(ends, visibility_ms=VISIBLE_MS)
    for mark in shared_selector_keys(mine[0].claims):
        assert await store.count([mark]) == {mark: 1}
        assert len(await store.find(mark)) == 1
    assert await store.count(["agent:bot-0"]) == {"agent:bot-0": 1}


# --- the outbox -------------------------------------------------------------------------------------------------------


async def test_a_record_stays_in_the_outbox_until_kafka_has_it(store: LeaseStore) -> None:
    one, other = lease(), lease()
    await store.activate([one, other])
    await store.step([step(one, "ending")], visibility_ms=VISIBLE_MS)
    ids = {outbox_field(one.claims.lease_id, 1), outbox_field(one.claims.lease_id, 2)}
    store.published([(other.claims.lease_id, 1)])
    await store.flush_outbox()

    async def waiting() -> dict[bytes, bytes]:
        return {outbox_field(o.lease_id, o.seq): o.jws for o in await store.unpublished(older_than_ms=0)}

    found = await waiting()
    assert set(found) == ids
    assert found[outbox_field(one.claims.lease_id, 1)] == one.jws.encode()
    assert set(await waiting()) == ids  # taken is not published
    assert await store.unpublished(older_than_ms=60_000) == []
    clearing = asyncio.create_task(store.clear_outbox())
    store.published([(one.claims.lease_id, 1), (one.claims.lease_id, 2)])
    store.published([(one.claims.lease_id, 1)])

    async def empty() -> bool:
        return await waiting() == {}

    await until(empty)
    clearing.cancel()


async def test_outbox_entry_that_redis_kept_is_removed_later(
    settings: ServiceSettings, tmp_path: Path
) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    own = settings.model_copy(update={"redis_url": server.url})
    await declare_complete(own)
    store = LeaseStore(own)
    try:
        one = lease()
        await store.activate([one])
        server.stop()
        store.published([(one.claims.lease_id, 1)])
        with pytest.raises(UnavailableError):
            await store.flush_outbox()
        server.start()
        await declare_complete(own)
        with pytest.raises(LostError):
            await store.activate([one])
        await store.activate([one])
        await store.flush_outbox()
        assert await store.unpublished(older_than_ms=0) == []
    finally:
        await store.close()
        server.stop()


async def test_one_sweeper_takes_a_stale_record_and_the_next_waits(store: LeaseStore) -> None:
    one = lease()
    await store.activate([one])
    await until(lambda: store.unpublished(older_than_ms=1000))
    assert await store.unpublished(older_than_ms=1000) == []
    assert await until(lambda: store.unpublished(older_than_ms=1000))


# --- selectors --------------------------------------------------------------------------------------------------------


async def test_the_first_record_of_a_selector_is_remembered(store: LeaseStore) -> None:
    id = str(uuid.uuid4())
    first = Coordinates(
        topic="t.revocation.request.v1", partition=3, offset=42, appended_at_ms=1_790_000_000_123
    )
    replayed = first.model_copy(update={"offset": 43, "appended_at_ms": 1_790_000_100_000})
    assert await store.first_seen({id: first}, keep_ms=60_000) == {id: first}
    other = str(uuid.uuid4())
    seen = await store.first_seen({id: replayed, other: replayed}, keep_ms=60_000)
    assert seen == {id: first, other: replayed}


# --- Redis itself -----------------------------------------------------------------------------------------------------


async def test_scripts_that_redis_forgot_are_loaded_again(
    store: LeaseStore, settings: ServiceSettings
) -> None:
    import redis.asyncio

    async with redis.asyncio.Redis.from_url(settings.redis_url) as client:
        await client.script_flush()
    leases = [lease(), lease(), lease()]
    assert [a.outcome for a in await store.activate(leases)] == ["activated"] * 3
    assert (await store.look(leases[1].claims.lease_id)).active


# --- without Redis ----------------------------------------------------------------------------------------------------


async def test_without_redis_everything_says_so_and_shows_no_password(settings: ServiceSettings) -> None:
    url = f"redis://someone:hunter2secret@127.0.0.1:{free_port()}/0"
    store = LeaseStore(settings.model_copy(update={"redis_url": url}))
    assert store.unready() is not None
    store.published([("0" * 36, 1)])
    calls = (
        store.connect(), store.look("0" * 36), store.activate([lease()]), store.find(ALL_LEASES),
        store.fence({ALL_LEASES: 1}), store.get(["0" * 36]), store.flush_outbox(),
    )  # fmt: skip
    for call in calls:
        with pytest.raises(UnavailableError, match="RINGFENCE_REDIS_URL") as raised:
            await call
        assert "hunter2secret" not in str(raised.value)
    await store.close()


async def test_a_url_that_is_none_of_redis_is_refused(settings: ServiceSettings) -> None:
    with pytest.raises(SettingsError, match="RINGFENCE_REDIS_URL"):
        LeaseStore(settings.model_copy(update={"redis_url": "http://example.com"}))


async def test_readiness_follows_redis(settings: ServiceSettings, tmp_path: Path) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    own = settings.model_copy(update={"redis_url": server.url})
    await declare_complete(own)
    store = LeaseStore(own)
    assert store.unready() is not None
    await store.connect()
    watching = asyncio.create_task(store.watch())

    async def is_ready() -> bool:
        return store.unready() is None

    async def is_unready(why: str = "") -> bool:
        return why in (store.unready() or "")

    try:
        await until(is_ready)
        server.stop()
        await until(lambda: is_unready("does not answer"))
        server.start()  # empty
        await until(lambda: is_unready("not known to be complete"))
        await declare_complete(own)
        await until(is_ready)
    finally:
        watching.cancel()
        await store.close()
        server.stop()


async def test_a_redis_that_stands_still_holds_nobody_up_and_its_late_answers_are_nobodys(
    settings: ServiceSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedRedis(tmp_path)
    server.start()
    own = settings.model_copy(update={"redis_url": server.url})
    await declare_complete(own)
    store = LeaseStore(own)
    await store.connect()
    one, other = lease(), lease(status="minting", backend="redis")
    assert server.child is not None
    try:
        await store.activate([one])
        await store.prepare([other], token="mine", mint_ms=60_000)
        os.kill(server.child.pid, signal.SIGSTOP)
        monkeypatch.setattr(store.link, "_within_s", 0.2)
        async with asyncio.timeout(WITHIN_S):
            with pytest.raises(UnavailableError, match="does not answer"):
                await store.look(one.claims.lease_id)
        monkeypatch.undo()
        os.kill(server.child.pid, signal.SIGCONT)
        assert not (await store.look(other.claims.lease_id)).active
        assert (await store.look(one.claims.lease_id)).active
    finally:
        os.kill(server.child.pid, signal.SIGCONT)
        await store.close()
        server.stop()


# --- clocks -----------------------------------------------------------------------------------------------------------


@dataclass
class SetClock:
    """A clock that is ahead of the machine's."""

    ahead_ms: int

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.ahead_ms


@pytest.mark.parametrize(
    ("ahead_ms", "said"),
    [(20_000, "ahead of that of Redis"), (-20_000, "behind that of Redis"), (0, "None")],
)
async def test_a_clock_that_differs_from_that_of_redis_is_told(
    settings: ServiceSettings, ahead_ms: int, said: str
) -> None:
    store = LeaseStore(settings, SetClock(ahead_ms))
    await store.connect()
    watching = asyncio.create_task(store.watch())

    async def told() -> bool:
        return said in str(store.unready())

    try:
        await until(told)
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await store.close()
