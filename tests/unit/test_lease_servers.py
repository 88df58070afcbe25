"""What the servers behind Redis say of themselves, and what is made of it."""

from __future__ import annotations

from typing import Any

from ringfence.model.lease_store.shards import ServerHealth

NOW_MS = 1_790_000_000_000


def said(
    *, behind_ms: int = 0, maxmemory: int = 0, policy: str = "noeviction", evicted: int = 0
) -> tuple[int, list[Any]]:
    at_ms = NOW_MS - behind_ms
    memory = {"maxmemory": maxmemory, "maxmemory_policy": policy}
    return NOW_MS, [memory, {"evicted_keys": evicted}, (at_ms // 1000, at_ms % 1000 * 1000)]


def test_one_node_of_which_the_clock_is_off_is_enough() -> None:
    servers = ServerHealth()
    assert servers.update({"a": said(), "b": said()}, epoch="1") == []
    assert (servers.unready(), servers.ahead_ms()) == (None, 0)
    for _ in range(10):
        servers.update({"a": said(), "b": said(behind_ms=5_000)}, epoch="1")
    assert "5.0 s ahead of that of Redis at b" in str(servers.unready())
    assert servers.ahead_ms() == 5_000
    servers.update({"a": said()}, epoch="1")
    assert servers.unready() is None, "b is no node any more"


def test_eviction_policy_is_warned_about() -> None:
    servers = ServerHealth()
    assert servers.warning() is None
    servers.update({"a": said(policy="volatile-lru")}, epoch="1")
    assert servers.warning() is None, "without a limit nothing is evicted"
    servers.update({"a": said(), "b": said(policy="volatile-lru", maxmemory=1)}, epoch="1")
    assert (
        servers.warning() == "Redis may evict leases: set maxmemory-policy to noeviction at b (volatile-lru)"
    )


def test_eviction_in_an_epoch_is_reported_once() -> None:
    servers = ServerHealth()

    def evicted(number: int, epoch: str) -> list[str]:
        return servers.update({"a": said(evicted=number), "b": said()}, epoch=epoch)

    assert evicted(7, "1") == [], "before this epoch, or of others before anybody looked"
    assert evicted(7, "1") == []
    assert evicted(8, "1") == ["a"]
    assert evicted(8, "2") == [], "that was rebuilt"
    assert evicted(9, "2") == ["a"]
    assert evicted(0, "3") == []
