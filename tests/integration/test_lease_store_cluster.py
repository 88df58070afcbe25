"""The lease store on a real Valkey cluster of three nodes: each script touches one slot, all nodes share the shards."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from ringfence.cli.doctor.command import redis_findings
from ringfence.dev.processes import free_port
from ringfence.kernel.base.errors import SettingsError, UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.model.lease_store import (
    Activation,
    LeaseStore,
    LostError,
    Preparation,
    SignedLease,
)
from ringfence.model.leases.lifecycle import ALL_LEASES, selector_keys
from tests.chaos.proxy import Link
from tests.chaos.valkey import ChaosValkey, follow, is_replica, join, moving_slot
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import another, opened_desks
from tests.support.leases import VISIBLE_MS, bearing, lease, minted, minting, soon, step, until
from tests.support.lost_redis import declare_complete
from tests.support.world import World


@contextlib.asynccontextmanager
async def started(folder: Path, count: int) -> AsyncIterator[list[ChaosValkey]]:
    """Servers that may become nodes of a cluster."""
    async with contextlib.AsyncExitStack() as cleanup:
        nodes = []
        for number in range(count):
            link = await cleanup.enter_async_context(Link(f"node-{number}", free_port()))
            node = ChaosValkey(folder, f"node-{number}", announced=link.port)
            node.start()
            cleanup.callback(node.stop)
            node.lead([link])
            nodes.append(node)
        yield nodes


@pytest.fixture(scope="module")
async def nodes(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[list[ChaosValkey]]:
    """The nodes of one cluster."""
    async with started(tmp_path_factory.mktemp("nodes"), 3) as nodes:
        await join(nodes)
        yield nodes


def settings_for(nodes: Sequence[ChaosValkey]) -> ServiceSettings:
    hosts = ",".join(f"127.0.0.1:{node.port}" for node in nodes)
    return ServiceSettings(redis_url=f"redis+cluster://{hosts}", redis_prefix=f"t{uuid.uuid4().hex[:8]}")


@pytest.fixture
async def settings(nodes: list[ChaosValkey]) -> ServiceSettings:
    settings = settings_for(nodes)
    await declare_complete(settings)
    return settings


async def test_the_shards_lie_on_all_nodes(store: LeaseStore, nodes: list[ChaosValkey]) -> None:
    found = await store.link.inspect([at.epoch for at in store.keys])
    assert len({run_id for run_id, _ in found}) == len(nodes)


async def test_leases_live_and_end_on_all_nodes(store: LeaseStore) -> None:
    deadline = int(time.time()) + 6
    leases = [lease(deadline=deadline, agent_id="bot") for _ in range(64)]
    other = lease(agent_id="bot")
    assert await store.activate([*leases, other]) == [Activation("activated")] * 65
    assert [a.outcome for a in await store.activate(leases)] == ["known"] * 64
    ids = [one.claims.lease_id for one in leases]
    assert sorted(await store.find("agent:bot")) == sorted([*ids, other.claims.lease_id])
    assert sorted(await store.find(ALL_LEASES)) == sorted([*ids, other.claims.lease_id])
    assert (await store.look(ids[0])).active
    stored = await store.get(ids)
    assert [stored[one.claims.lease_id].jws.decode() for one in leases] == [one.jws for one in leases]
    found: dict[str, Any] = {}

    async def all_due() -> bool:
        for one in await store.claim(store.shards, limit=10, visibility_ms=VISIBLE_MS):
            found.update(one.leases)
        return len(found) == 64

    await until(all_due)
    assert sorted(found) == sorted(ids)
    steps = [step(one, "expired") for one in leases]
    assert {s.outcome for s in await store.step(steps, visibility_ms=VISIBLE_MS)} == {"done"}
    assert await store.find(ALL_LEASES) == [other.claims.lease_id]
    store.published((one.claims.lease_id, seq) for one in leases for seq in (1, 2))
    await store.flush_outbox()
    assert [one.lease_id for one in await store.unpublished(older_than_ms=0)] == [other.claims.lease_id]


async def test_grants_are_counted_on_all_nodes(store: LeaseStore) -> None:
    grants, leases = [str(uuid.uuid4()) for _ in range(32)], [str(uuid.uuid4()) for _ in range(4)]
    for grant in grants:  # each on a shard of its own, whatever the shards of the leases
        counted = await asyncio.gather(*(store.use_grant(grant, lease_id, limit=3) for lease_id in leases))
        assert sum(counted) == 3


async def test_issuing_in_two_steps_fences_and_counts(store: LeaseStore) -> None:
    leases = [minting(sponsor="sam", requested_at_ms=5000) for _ in range(32)]
    assert await store.prepare(leases, token="a", mint_ms=VISIBLE_MS) == [Preparation("prepared")] * 32
    done = await store.activate([minted(one) for one in leases[:16]], token="a")
    assert done == [Activation("activated")] * 16
    await store.fence({"sponsor:sam": 5000})
    done = await store.activate([minted(one) for one in leases[16:]], token="a")
    assert done == [Activation("fenced", selector_key="sponsor:sam")] * 16
    assert await store.count(["sponsor:sam", "sponsor:sue"]) == {"sponsor:sam": 32, "sponsor:sue": 0}
    await store.postpone({one.claims.lease_id: 0 for one in leases[16:]})
    claimed = await store.claim(store.shards, limit=100, visibility_ms=VISIBLE_MS)
    assert sum(len(one.leases) for one in claimed) == 16


async def test_scripts_that_a_node_forgot_are_loaded_again(
    store: LeaseStore, nodes: list[ChaosValkey]
) -> None:
    for node in nodes:
        node.call("SCRIPT", "FLUSH")
    assert await store.activate([lease() for _ in range(32)]) == [Activation("activated")] * 32


@pytest.mark.parametrize("opens", [False, True], ids=["due now", "due in the next minute too"])
async def test_a_claim_that_breaks_off_while_a_slot_moves_loses_no_lease(
    store: LeaseStore, settings: ServiceSettings, nodes: list[ChaosValkey], opens: bool
) -> None:
    at, deadline = store.keys[0], soon()

    def on_shard(**fields: Any) -> SignedLease:
        some = (lease(**fields) for _ in itertools.count())
        return next(one for one in some if store.at(one.claims.lease_id) == at)

    unfinished, due, *others = on_shard(status="minting"), on_shard(deadline=deadline), on_shard(), on_shard()
    await store.prepare([unfinished], token="a", mint_ms=VISIBLE_MS)
    await store.activate([due, *others])
    minute = others[0].claims.deadline // 60
    if opens:  # as if that minute had nearly come
        await store.link.pipeline([("ZADD", at.minutes, 0, str(minute))])
    await until(lambda: _is_past(deadline))
    with moving_slot(nodes, at.epoch) as move:
        move(at.leases)  # a script may no longer look there, and breaks off where it does
        with pytest.raises(UnavailableError, match="non local key"):
            await store.claim([0], limit=10, visibility_ms=VISIBLE_MS)
    with pytest.raises(LostError):
        await store.find(ALL_LEASES)
    await declare_complete(settings)
    all_of_them = sorted(one.claims.lease_id for one in (unfinished, due, *others))
    assert sorted(await store.find(ALL_LEASES)) == all_of_them
    (claimed,) = await store.claim([0], limit=10, visibility_ms=VISIBLE_MS)
    assert list(claimed.leases) == [due.claims.lease_id]
    assert sorted(await store.find(ALL_LEASES)) == all_of_them


async def test_a_slot_that_moved_to_another_node_is_noticed_by_those_who_run(
    store: LeaseStore, settings: ServiceSettings, nodes: list[ChaosValkey]
) -> None:
    """Whoever starts now finds a shard on another server than its epoch is bound to, and waits for a rebuild."""
    issued = [lease() for _ in range(48)]
    await store.activate(issued)
    with moving_slot(nodes, store.keys[3].epoch):
        pass
    with pytest.raises(LostError):
        await store.get([one.claims.lease_id for one in issued])
    await declare_complete(settings)
    assert [a.outcome for a in await store.activate(issued)] == ["known"] * 48


async def test_a_node_that_leads_again_after_its_replica_did_is_not_taken_for_what_it_was(
    tmp_path: Path,
) -> None:
    async with started(tmp_path, 4) as (first, *others, replica):
        await join([first, *others])
        await follow(replica, first, 4)
        settings = settings_for([first, *others])
        await declare_complete(settings)
        store = LeaseStore(settings)
        await store.connect()
        for leader in (replica, first):
            await store.activate([lease() for _ in range(48)])
            await is_replica(leader)
            leader.call("CLUSTER", "FAILOVER", "TAKEOVER")
            await until(lambda: _is_lost(store))
            await until(lambda: _declared_complete(settings))
            await until(lambda: _answers(store))
        await store.close()


async def _is_lost(store: LeaseStore) -> bool:
    try:
        await store.find(ALL_LEASES)
    except LostError:
        return True
    except UnavailableError:
        return False
    return False


async def _answers(store: LeaseStore) -> bool:
    try:
        return await store.find(ALL_LEASES) is not None
    except UnavailableError:
        return False


async def _declared_complete(settings: ServiceSettings) -> bool:
    try:
        await declare_complete(settings)
    except UnavailableError:
        return False
    return True


async def test_the_doctor_looks_at_each_node(settings: ServiceSettings, nodes: list[ChaosValkey]) -> None:
    verdicts = {one.what: one.verdict async for one in redis_findings(settings)}
    assert len(verdicts) == 10  # three of each node, and notifications
    assert set(verdicts.values()) == {"good"}
    nodes[1].call("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    bad = [one async for one in redis_findings(settings) if one.verdict != "good"]
    nodes[1].call("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert [one.what for one in bad] == [f"Redis at 127.0.0.1:{nodes[1]._options['cluster-announce-port']}"]
    assert "set it to noeviction" in bad[0].says
    nodes[2].call("CONFIG", "SET", "notify-keyspace-events", "")
    (silent,) = [one async for one in redis_findings(settings) if one.verdict != "good"]
    nodes[2].call("CONFIG", "SET", "notify-keyspace-events", "Ex")
    assert nodes[2]._options["cluster-announce-port"] in silent.says


async def test_each_node_is_asked_for_its_time(store: LeaseStore, nodes: list[ChaosValkey]) -> None:
    assert len([name async for name, _ in store.link.ask_each([("TIME",)])]) == len(nodes)
    await store._ask_servers()
    assert (store.unready(), store.warning()) == (None, None)


async def test_a_clock_is_not_off_by_how_long_nodes_take_to_answer_other_questions(
    store: LeaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Clock:
        """That of all: of this process and of each node."""

        at_ms = 1_790_000_000_000

        def now_ms(self) -> int:
            return self.at_ms

    clock, execute = Clock(), cast(Any, store.link._client).execute_command

    async def slowly(*command: Any, **options: Any) -> Any:
        if command[0] == "TIME":
            return clock.at_ms // 1000, clock.at_ms % 1000 * 1000
        answer = await execute(*command, **options)
        clock.at_ms += 2_000
        return answer

    monkeypatch.setattr(store.link._client, "execute_command", slowly)
    monkeypatch.setattr(store, "_clock", clock)
    await store._ask_servers()
    assert clock.at_ms > Clock.at_ms
    assert "the clock is" not in str(store.unready())


async def test_every_node_tells_of_expired_keys(store: LeaseStore) -> None:
    found = await store.link.inspect([at.epoch for at in store.keys])
    node_of_shard = [run_id for run_id, _ in found]
    told: set[str] = set()

    async def listen() -> None:
        async for lease_ids in store.expirations():
            told.update(node_of_shard[store.shard_of(id)] for id in lease_ids)
            if len(told) == 3:
                return

    listening = asyncio.create_task(listen())
    while not listening.done():
        await store.activate([lease(deadline=int(time.time()) + 2) for _ in range(48)])
        await asyncio.wait([listening], timeout=5)
    await listening
    assert told == set(node_of_shard)


async def test_a_node_that_was_restarted_holds_up_everything_until_it_is_rebuilt(
    store: LeaseStore, settings: ServiceSettings, nodes: list[ChaosValkey]
) -> None:
    leases = [lease() for _ in range(48)]
    await store.activate(leases)
    await nodes[1].killed(0)

    async def refused() -> str:
        """Why nothing is told any more, once the cluster is whole again."""
        try:
            await store.get([one.claims.lease_id for one in leases])
        except LostError as error:
            return str(error)
        except UnavailableError:
            return ""
        raise AssertionError("nobody noticed")

    async def known_to_be_lost() -> bool:
        return "not known to be complete" in await refused()

    await until(known_to_be_lost)
    with pytest.raises(LostError):
        await store.activate([leases[0]])
    await declare_complete(settings)
    assert [a.outcome for a in await store.activate(leases)] == ["known"] * 48
    for mark in selector_keys(leases[0].claims):
        assert await bearing(store, mark) == [leases[0].claims.lease_id]


async def test_services_on_a_cluster_rebuild_the_node_that_was_lost(
    kafka: Kafka, nodes: list[ChaosValkey], settings: ServiceSettings
) -> None:
    more: Any = {"redis_shards": 16}
    async with (
        World.open(kafka.bootstrap, settings.redis_url, paced=kafka.embedded) as world,
        opened_desks(world) as first,
        world.running("issuer", "revoker", **more),
    ):
        desk = await another(first)
        store = LeaseStore(world.settings("issuer", **more))
        leases = [asked for asked, _ in await asyncio.gather(*(desk.issued("read") for _ in range(24)))]
        before = {epoch for _, epoch in await store.link.inspect([at.epoch for at in store.keys])}
        await nodes[2].lost(0)

        async def is_rebuilt() -> bool:
            try:
                now = {epoch for _, epoch in await store.link.inspect([at.epoch for at in store.keys])}
                await store.connect()
            except UnavailableError:
                return False
            return (before | {None}).isdisjoint(now)

        await until(is_rebuilt)
        for asked in leases:
            assert (await store.look(asked.lease_id)).active
        later, content = await desk.issued("read")
        assert content.credential is not None
        assert (await store.look(later.lease_id)).active
        await store.close()


async def _is_past(deadline_s: int) -> bool:
    return time.time() > deadline_s + 0.1


@pytest.mark.parametrize("url", ["redis+cluster://nowhere", "redis+cluster://h:1,", "redis+cluster://h:1/3"])
async def test_an_address_that_is_none_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SettingsError, match="RINGFENCE_REDIS_URL") as raised:
        LeaseStore(ServiceSettings(redis_url=url.replace("//", "//sam:hunter2secret@")))
    assert "hunter2secret" not in str(raised.value)
