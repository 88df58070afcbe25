"""What happens to the Redis of a run really happens: keys are there, gone, or old again."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from redis.asyncio import Redis, RedisCluster

from ringfence.dev.processes import free_port
from tests.chaos.proxy import Link
from tests.chaos.valkey import ChaosValkey, join


class Seen:
    """The server as a service sees it: through its link, with a new connection for each question."""

    def __init__(self, server: ChaosValkey, link: Link) -> None:
        self.server = server
        self._url = f"redis://127.0.0.1:{link.port}/0"

    async def put(self, value: str) -> None:
        async with Redis.from_url(self._url) as client:
            await client.set("key", value)

    async def get(self) -> str | None:
        async with Redis.from_url(self._url, decode_responses=True) as client:
            value = await client.get("key")
            return None if value is None else str(value)

    async def run_id(self) -> str:
        async with Redis.from_url(self._url, decode_responses=True) as client:
            return str((await client.info("server"))["run_id"])


@pytest.fixture
async def seen(tmp_path: Path) -> AsyncIterator[Seen]:
    server = ChaosValkey(tmp_path, "redis")
    server.start()
    async with Link("x", free_port()) as link:
        server.lead([link])
        yield Seen(server, link)
    server.stop()


async def test_killed_it_keeps_its_keys(seen: Seen) -> None:
    await seen.put("a")
    before = await seen.run_id()
    await seen.server.killed(0)
    assert await seen.get() == "a"
    assert await seen.run_id() != before


async def test_lost_it_comes_back_empty(seen: Seen) -> None:
    await seen.put("a")
    await seen.server.lost(0)
    assert await seen.get() is None


async def test_flushed_it_is_empty_and_the_same(seen: Seen) -> None:
    await seen.put("a")
    before = await seen.run_id()
    await seen.server.flushed()
    assert await seen.get() is None
    assert await seen.run_id() == before


async def test_set_back_it_has_what_it_had_then_and_keeps_what_is_new(seen: Seen) -> None:
    await seen.put("old")
    snapshot = await seen.server.saved()
    await seen.put("newer")
    await seen.server.set_back(snapshot)
    assert await seen.get() == "old"
    await seen.put("new")
    await seen.server.killed(0)
    assert await seen.get() == "new", "what is written after the restore is kept again"


async def test_a_lagging_replica_takes_its_place(seen: Seen) -> None:
    await seen.put("old")
    before = await seen.run_id()
    await seen.server.promoted(0)
    assert await seen.get() == "old"
    assert await seen.run_id() != before
    await seen.server.promoted(0)
    assert await seen.get() == "old", "and it has a replica that can take its own place"


async def test_a_cluster_of_three_serves_by_its_links_and_a_node_that_lost_all_is_still_of_it(
    tmp_path: Path,
) -> None:
    async with AsyncExitStack() as stack:
        nodes, port = [], 0
        for name in ("a", "b", "c"):
            link = await stack.enter_async_context(Link(name, free_port()))
            node = ChaosValkey(tmp_path, name, announced=link.port)
            node.start()
            stack.callback(node.stop)
            node.lead([link])
            nodes.append(node)
            port = link.port
        await join(nodes)
        async with RedisCluster(host="127.0.0.1", port=port) as client:
            for number in range(50):
                await client.set(f"key-{number}", "there")
        await nodes[0].lost(0)
        async with RedisCluster(host="127.0.0.1", port=port) as client:
            found = [await client.get(f"key-{number}") for number in range(50)]
        assert None in found
        assert b"there" in found
