"""Heartbeats of runners, and what a runner does to its runs while Kafka acknowledges none."""

from __future__ import annotations

import asyncio

import pytest

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import RingfenceError, UnavailableError
from ringfence.messages.operations import Heartbeat, RunnerPool
from ringfence.runner.heartbeats import Heartbeats, SilenceGuard

RUNNER = "spiffe://acme.example/service/runner-1"
RUN = "9d1c2b3a-4f5e-5a6b-8c7d-2b3a4f5e5a6b"
GRACE_S = 60.0


class _Time:
    def __init__(self) -> None:
        self.ms = 1_000_000

    def now_ms(self) -> int:
        return self.ms

    def pass_s(self, seconds: float) -> None:
        self.ms += int(seconds * 1000)


class _Kafka:
    """Acknowledges, refuses, or says nothing until it is told to."""

    def __init__(self) -> None:
        self.sent: list[Heartbeat] = []
        self.up = True
        self.answers = asyncio.Event()
        self.answers.set()

    async def send(self, heartbeat: Heartbeat) -> None:
        self.sent.append(heartbeat)
        if not self.up:
            raise UnavailableError("no broker")
        await self.answers.wait()


class _Runs:
    def __init__(self) -> None:
        self.calls: list[str] = []
        self.problem: RingfenceError | None = None

    def _did(self, what: str) -> None:
        if self.problem is not None:
            raise self.problem
        self.calls.append(what)

    async def freeze(self) -> None:
        self._did("freeze")

    async def thaw(self) -> None:
        self._did("thaw")

    async def destroy(self, reason: str) -> None:
        assert "60 s" in reason
        self._did("destroy")


class _Bench:
    def __init__(self) -> None:
        self.time, self.kafka, self.runs = _Time(), _Kafka(), _Runs()
        self.heartbeats = Heartbeats(
            self.kafka.send,
            RUNNER,
            "acme.example",
            self.time,
            lambda: [RUN],
            never_jumps_ms=self.time.now_ms,
        )
        self.guard = SilenceGuard(self.heartbeats, self.runs, grace_s=GRACE_S)


@pytest.fixture
async def bench() -> _Bench:
    return _Bench()


async def test_a_heartbeat_names_the_runs_of_its_process(bench: _Bench) -> None:
    await bench.heartbeats.beat()
    (sent,) = bench.kafka.sent
    assert (sent.iss, sent.runs, sent.at_ms) == (RUNNER, (RUN,), bench.time.ms)


async def test_silence_counts_from_the_sending_of_what_was_acknowledged(bench: _Bench) -> None:
    bench.kafka.answers.clear()
    beat = asyncio.create_task(bench.heartbeats.beat())
    await asyncio.sleep(0)
    bench.time.pass_s(20)
    bench.kafka.answers.set()
    await beat
    assert bench.heartbeats.silence_s == 20
    await bench.heartbeats.beat()
    assert bench.heartbeats.silence_s == 0


async def test_a_heartbeat_that_fails_does_not_end_the_silence(bench: _Bench) -> None:
    bench.kafka.up = False
    bench.time.pass_s(5)
    await bench.heartbeats.beat()
    assert bench.heartbeats.silence_s == 5


async def test_runner_claims_nothing_before_the_first_acknowledgement(bench: _Bench) -> None:
    waiting = asyncio.create_task(bench.heartbeats.acknowledged())
    bench.kafka.up = False
    await bench.heartbeats.beat()
    await asyncio.sleep(0)
    assert not waiting.done()
    bench.kafka.up = True
    await bench.heartbeats.beat()
    await asyncio.wait_for(waiting, 5)


@pytest.mark.parametrize(
    ("silence_s", "done"),
    [(0, []), (29.9, []), (30, ["freeze"]), (59.9, ["freeze"]), (60, ["destroy"]), (600, ["destroy"])],
)
async def test_a_silent_runner_freezes_at_half_of_the_grace_and_destroys_at_its_end(
    bench: _Bench, silence_s: float, done: list[str]
) -> None:
    await bench.heartbeats.beat()
    bench.time.pass_s(silence_s)
    await bench.guard.look()
    assert bench.runs.calls == done
    assert (bench.guard.silent() is not None) == (silence_s >= GRACE_S / 2)


async def test_runs_go_on_when_kafka_answers_in_time(bench: _Bench) -> None:
    bench.time.pass_s(40)
    await bench.guard.look()
    assert bench.guard.frozen
    await bench.heartbeats.beat()
    await bench.guard.look()
    await bench.guard.look()
    assert bench.runs.calls == ["freeze", "thaw"]
    assert not bench.guard.frozen


async def test_failed_freeze_or_destruction_is_retried(bench: _Bench) -> None:
    bench.runs.problem = UnavailableError("no freezer")
    bench.time.pass_s(40)
    await bench.guard.look()
    assert not bench.guard.frozen
    bench.time.pass_s(40)
    await bench.guard.look()
    bench.runs.problem = None
    await bench.guard.look()
    assert bench.runs.calls == ["destroy"]


async def test_a_broker_that_says_nothing_is_not_sent_heartbeats_without_end(
    bench: _Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.runner.heartbeats.EVERY_S", 0.0)
    bench.kafka.answers.clear()
    running = asyncio.create_task(bench.heartbeats.run())
    for _ in range(200):
        await asyncio.sleep(0)
    assert len(bench.kafka.sent) == 30
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_heartbeat_tells_the_pool_as_it_is_then() -> None:
    kafka, free = _Kafka(), [2, 0]
    heartbeats = Heartbeats(
        kafka.send, RUNNER, "acme.example", SystemClock(), tuple,
        pool=lambda: RunnerPool(name="reviews", labels={"zone": "eu-1"}, free=free.pop(0)),
    )  # fmt: skip
    await heartbeats.beat()
    await heartbeats.beat()
    told = [sent.pool for sent in kafka.sent]
    assert [(one.name, one.labels, one.free) for one in told if one is not None] == [
        ("reviews", {"zone": "eu-1"}, 2), ("reviews", {"zone": "eu-1"}, 0),
    ]  # fmt: skip
