"""Leases on a Redis that three real sentinels watch: a failover loses, doubles and revives none."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

import pytest

from ringfence.cli.doctor.command import redis_findings
from ringfence.kernel.base.errors import SettingsError, UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.messages.lease import TERMINAL, Selector
from ringfence.model.lease_store import LeaseStore, LostError
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import another, opened_desks
from tests.support.benches.lost_redis_bench import LostRedisBench
from tests.support.leases import lease, until
from tests.support.lost_redis import declare_complete
from tests.support.servers.sentinel import SentinelDeployment, deployed
from tests.support.world import World


def settings_of(deployment: SentinelDeployment, **fields: Any) -> ServiceSettings:
    return ServiceSettings(redis_url=deployment.url, redis_prefix="rf", redis_shards=2, **fields)


@contextlib.asynccontextmanager
async def connected(deployment: SentinelDeployment, **fields: Any) -> AsyncIterator[LeaseStore]:
    """A lease store on Redis, where nothing was lost yet."""
    settings = settings_of(deployment, **fields)
    await declare_complete(settings)
    store = LeaseStore(settings)
    await store.connect()
    watching = asyncio.create_task(store.watch())
    try:
        yield store
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
        await store.close()


async def findings(deployment: SentinelDeployment) -> dict[str, Any]:
    return {one.what: one async for one in redis_findings(settings_of(deployment))}


async def test_leases_continue_after_a_failover(kafka: Kafka, tmp_path: Path) -> None:
    async with (
        deployed(tmp_path, replicas=2) as deployment,
        World.open(kafka.bootstrap, deployment.url, paced=kafka.embedded) as world,
        opened_desks(world) as first,
        world.running("issuer", "revoker"),
    ):
        desk = await another(first)
        place = LostRedisBench(desk, cast(Any, None))  # the test loses Redis itself
        held = [asked for asked, _ in await asyncio.gather(*(desk.issued("read") for _ in range(8)))]
        gone, _ = await desk.issued("read")
        due, _ = await desk.issued("read", ttl_s=15)
        other = await another(first)
        revoked, _ = await other.issued("read")
        await place.release(gone)
        assert await place.life(gone) == ["active", "ending", "released"]

        before, former = await place.epochs(), deployment.primary
        former.kill()
        asking = [asyncio.create_task(desk.issued("read")) for _ in range(4)]
        late = await other.ask("read")  # before the kill switch, decided after it
        order, _ = await other.revoke(
            other.sam, selector=Selector(agent_id=other.bot.name), reason="something is wrong"
        )
        await deployment.until_primary_is_not(former)
        await place.rebuilt(before)

        assert (await other.verdict(order)).kind == "accepted"
        await other.decide(late)
        assert (await other.refused(late)).reasons[0].code == "fenced"
        assert (await other.lease(revoked.lease_id, *TERMINAL)).status == "revoked"
        await place.active(*held)
        assert not (await place.store.look(gone.lease_id)).active
        issued = [asked for asked, _ in await asyncio.gather(*asking)]
        await place.active(*issued)
        assert len({asked.lease_id for asked in (*held, *issued)}) == len(held) + len(issued)
        await place.release(held[0])
        assert await place.life(held[0]) == ["active", "ending", "released"]
        assert await place.life(due) == ["active", "expired"]
        assert await place.life(gone) == ["active", "ending", "released"]
        await place.close()


async def test_expiry_is_notified_by_the_new_primary(tmp_path: Path) -> None:
    async with deployed(tmp_path, replicas=2) as deployment, connected(deployment) as store:
        notified: set[str] = set()

        async def listen() -> None:
            async for lease_ids in store.expirations():
                notified.update(lease_ids)

        listening = asyncio.create_task(listen())
        try:
            former = deployment.primary
            former.kill()
            await deployment.until_primary_is_not(former)
            await until(lambda: _declared_complete(deployment, store))

            async def told() -> bool:
                one = lease(deadline=int(time.time()) + 2)
                await store.activate([one])
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(5):
                        while one.claims.lease_id not in notified:
                            await asyncio.sleep(0.05)
                return one.claims.lease_id in notified

            await until(told)
        finally:
            listening.cancel()
            await asyncio.gather(listening, return_exceptions=True)


async def test_primary_without_replica_takes_no_lease_until_one_follows(tmp_path: Path) -> None:
    async with deployed(tmp_path, replicas=1) as deployment, connected(deployment) as store:
        former = deployment.primary
        await store.activate([lease()])
        former.kill()
        promoted = await deployment.until_primary_is_not(former)
        assert promoted is not former
        await until(lambda: _refused_writes(deployment))
        assert (await findings(deployment))["Redis, replicas"].verdict == "bad"
        await asyncio.to_thread(former.restart)  # the sentinels make it a replica
        await until(lambda: _declared_complete(deployment, store))
        await store.activate([lease()])


async def test_primary_that_sentinels_replaced_is_not_used_while_it_still_answers(tmp_path: Path) -> None:
    async with deployed(tmp_path, replicas=2) as deployment, connected(deployment) as store:
        former, one = deployment.primary, lease()
        await store.activate([one])
        deployment.cut_off(former)
        with pytest.raises(LostError):
            await until(lambda: _looked(store, one.claims.lease_id))
        assert await deployment.until_primary_is_not(former) is not former
        assert former.call("ROLE")[0] == "master"
        await until(lambda: _declared_complete(deployment, store))
        assert (await store.activate([one]))[0].outcome in ("known", "activated")


async def _looked(store: LeaseStore, lease_id: str) -> bool:
    await store.look(lease_id)
    return False


async def test_redis_is_not_used_without_majority_of_sentinels(tmp_path: Path) -> None:
    async with deployed(tmp_path, replicas=1) as deployment, connected(deployment, grace_s=1.0) as store:
        one = lease()
        await store.activate([one])
        deployment.sentinels[0].stop()
        assert (await store.look(one.claims.lease_id)).active
        deployment.sentinels[1].stop()
        with pytest.raises(
            UnavailableError, match="no majority of the 3 sentinels names a primary of 'ringfence'"
        ):
            await until(lambda: _looked(store, one.claims.lease_id))
        await asyncio.to_thread(deployment.sentinels[0].start)

        async def answers() -> bool:
            try:
                return (await store.look(one.claims.lease_id)).active
            except UnavailableError:
                return False

        await until(answers)


async def test_doctor_checks_replicas_by_info(tmp_path: Path) -> None:
    async with deployed(tmp_path, replicas=2) as deployment:
        primary = deployment.primary
        found = await findings(deployment)
        assert {one.verdict for one in found.values()} == {"good"}, found
        assert "2 replicas follow" in found["Redis, replicas"].says
        for server in deployment.servers:  # as with providers that have no such command
            server.call("ACL", "SETUSER", "ringfence", "-config")
        assert {one.verdict for one in (await findings(deployment)).values()} == {"good"}
        primary.call("CONFIG", "SET", "min-replicas-max-lag", "60")
        stopped = [one for one in deployment.servers if one is not primary]
        for one in stopped:
            os.kill(one.child.pid, signal.SIGSTOP)  # type: ignore[union-attr]
        try:

            async def lagging() -> bool:
                return "has been silent" in (await findings(deployment))["Redis, replicas"].says

            await until(lagging)
        finally:
            for one in stopped:
                os.kill(one.child.pid, signal.SIGCONT)  # type: ignore[union-attr]
        primary.call("CONFIG", "SET", "min-replicas-to-write", "0")
        without = (await findings(deployment))["Redis, replicas"]
        assert without.verdict == "bad"
        assert "set min-replicas-to-write to 1" in without.says


@pytest.mark.parametrize(
    "url",
    [
        "redis+sentinel://sam:hunter2secret@h:1,h:2",
        "redis+sentinel://sam:hunter2secret@h/name",
        "redis+sentinel://sam:hunter2secret@h:1/name/first",
    ],
    ids=["no name", "no port", "no database number"],
)
def test_incomplete_sentinel_url_is_refused_without_its_password(url: str) -> None:
    with pytest.raises(SettingsError, match="RINGFENCE_REDIS_URL") as raised:
        LeaseStore(ServiceSettings(redis_url=url))
    assert "hunter2secret" not in str(raised.value)


@pytest.mark.parametrize("wrong", ["of-the-servers", "of-the-sentinels"])
async def test_wrong_password_is_reported_without_it(tmp_path: Path, wrong: str) -> None:
    async with deployed(tmp_path, replicas=1) as deployment:
        settings = ServiceSettings(redis_url=deployment.url.replace(wrong, "hunter2secret"))
        (found,) = [one async for one in redis_findings(settings)]
        assert found.verdict == "bad"
        assert "password" in found.says
        assert "hunter2secret" not in found.says


async def _declared_complete(deployment: SentinelDeployment, store: LeaseStore) -> bool:
    """Whether Redis could be rebuilt, and is used again."""
    try:
        await declare_complete(settings_of(deployment))
        await store.connect()
    except UnavailableError:
        return False
    return True


async def _refused_writes(deployment: SentinelDeployment) -> bool:
    try:
        await declare_complete(settings_of(deployment))
    except UnavailableError as error:
        return "no replica that follows it" in str(error) and "start a replica" in str(error)
    return False
