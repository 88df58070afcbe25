"""Which pools of runners are listed, by what their runners said last."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.operations import Heartbeat, RunnerPool
from ringfence.messages.topics import HEARTBEAT
from ringfence.revoker.runner_pools import FRESH_MS, RunnerPools
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry
from tests.support.runs import Runners


class _Bench:
    def __init__(self) -> None:
        self.ledger = InMemoryRegistry()
        self.keys = Runners(self.ledger).keys
        self.pools = RunnerPools(self.ledger.trust)
        self.ms = START_MS

    def told(
        self, runner: str | SigningKey, pool: str | None, *, free: int = 1, at_ms: int = 0, **labels: str
    ) -> None:
        key = self.keys[runner] if isinstance(runner, str) else runner
        sent_ms = at_ms or self.ms
        heartbeat = Heartbeat(
            iss=key.id, aud=TD, iat=sent_ms // 1000, jti=f"{key.id}-{sent_ms}", at_ms=sent_ms,
            pool=RunnerPool(name=pool, labels=labels, free=free) if pool else None,
        )  # fmt: skip
        record = self.ledger.received(HEARTBEAT, key.id, sign(heartbeat, key))
        self.pools.on_heartbeats([record._replace(appended_at_ms=self.ms)])

    def listed(self, **labels: str) -> list[dict[str, Any]]:
        return self.pools.listed(self.ms, labels)

    def names(self, **labels: str) -> list[str]:
        return [one["name"] for one in self.listed(**labels)]


@pytest.fixture
def bench() -> _Bench:
    return _Bench()


def test_pools_are_selected_by_all_labels_that_are_asked_for(bench: _Bench) -> None:
    bench.told("runner-1", "reviews", zone="eu-1", disk="fast")
    bench.told("runner-2", "builds", zone="eu-1", free=7)
    assert bench.names() == ["reviews", "builds"] or bench.names() == ["builds", "reviews"]
    assert sorted(bench.names(zone="eu-1")) == ["builds", "reviews"]
    assert bench.names(zone="eu-1", disk="fast") == ["reviews"]
    assert bench.names(zone="eu-2") == []
    assert bench.names(gpu="") == []


def test_a_pool_has_the_labels_of_all_its_runners_and_the_room_of_one(bench: _Bench) -> None:
    bench.told("runner-1", "reviews", zone="eu-1", disk="fast", free=1)
    bench.told("runner-2", "reviews", zone="eu-1", disk="slow", free=3)
    assert bench.listed() == [
        {"name": "reviews", "labels": {"zone": "eu-1"}, "free": 3, "runners": ["runner-1", "runner-2"]}
    ]
    assert bench.names(disk="fast") == []


def test_the_last_word_of_a_runner_counts_and_only_for_a_while(bench: _Bench) -> None:
    bench.told("runner-1", "reviews", free=2)
    bench.told("runner-1", "reviews", free=9, at_ms=bench.ms - 1000)
    assert [one["free"] for one in bench.listed()] == [2], "an earlier heartbeat that came later"
    bench.ms += FRESH_MS
    assert bench.names() == ["reviews"]
    bench.ms += 1
    assert bench.names() == []


def test_heartbeat_not_signed_by_a_runner_is_ignored(bench: _Bench) -> None:
    bench.told(SigningKey.generate(bench.keys["runner-1"].id), "reviews")
    bench.told(bench.ledger.registry, "reviews")
    bench.told("runner-1", None)
    assert bench.names() == []
