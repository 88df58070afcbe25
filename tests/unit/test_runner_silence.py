"""Whose runners are silent, in the broker's time, by what a revoker reads."""

from __future__ import annotations

from typing import Any, cast

import pytest

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.operations import Heartbeat
from ringfence.messages.run import Run
from ringfence.messages.topics import HEARTBEAT
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.revoker.revocations.runner_silence import RunnerSilence, SilentRunEnder
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry
from tests.support.runs import OneRun, Runners

GRACE_MS = 60_000


class _Bench:
    def __init__(self) -> None:
        self.ledger = InMemoryRegistry()
        self.runners = Runners(self.ledger)
        self.revoker = SigningKey.generate(f"spiffe://{TD}/service/revoker")
        self._trust_revoker()
        self.silence = RunnerSilence(
            self.ledger.trust, self.ledger.directory.runs, own_id=self.revoker.id, grace_ms=GRACE_MS
        )
        self.run = OneRun(self.runners, "deploy-bot", "c1a5e6f0-1b2c-5d3e-8f40-e6f01b2c5d3e")
        self.ms = START_MS

    def _trust_revoker(self) -> None:
        bundle = self.ledger.trust.require(START_MS / 1000)
        record = self.revoker.record(START_MS // 1000 + 86_400, START_MS // 1000 - 60)
        services = (*bundle.services, ServiceIdentity(id=self.revoker.id, roles=("revoker",), keys=(record,)))
        following = TrustBundle(**{**bundle.model_dump(), "services": services, "version": 3, "jti": "3"})
        assert self.ledger.trust.load(sign(following, self.ledger.root, header_jwk=True), START_MS // 1000)

    def beat(self, by: SigningKey, *runs: str, sent_ms: int | None = None) -> None:
        """A heartbeat that the broker appends now."""
        at_ms = self.ms if sent_ms is None else sent_ms
        heartbeat = Heartbeat(
            iss=by.id, aud=TD, iat=at_ms // 1000, jti=f"{by.id}-{at_ms}", at_ms=at_ms, runs=runs
        )
        record = self.ledger.received(HEARTBEAT, by.id, sign(heartbeat, by))
        self.silence.on_heartbeats([record._replace(appended_at_ms=self.ms)])

    def own(self) -> None:
        self.beat(self.revoker)

    def named(self, runner: str = "runner-1", **more: int) -> None:
        self.beat(self.runners.keys[runner], self.run.id, **more)

    def silent(self) -> list[str]:
        return [run.run_id for run, _ in self.silence.silent()]

    def pass_s(self, seconds: float) -> None:
        self.ms += int(seconds * 1000)


@pytest.fixture
def bench() -> _Bench:
    bench = _Bench()
    bench.run.go("claimed", "started")
    bench.own()
    assert bench.silent() == []
    bench.named()
    return bench


def test_a_run_that_is_named_goes_on(bench: _Bench) -> None:
    for _ in range(10):
        bench.pass_s(50)
        bench.named()
        bench.own()
        assert bench.silent() == []


def test_a_run_that_nobody_names_for_the_grace_is_silent(bench: _Bench) -> None:
    bench.pass_s(60)
    bench.own()
    assert bench.silent() == []
    bench.pass_s(0.001)
    bench.own()
    assert bench.silent() == [bench.run.id]
    bench.named()
    assert bench.silent() == []


def test_another_process_of_the_same_runner_does_not_vouch_for_it(bench: _Bench) -> None:
    bench.pass_s(61)
    bench.beat(bench.runners.keys["runner-1"], "9d1c2b3a-4f5e-5a6b-8c7d-2b3a4f5e5a6b")
    bench.own()
    assert bench.silent() == [bench.run.id]


def test_another_runner_cannot_vouch_for_it(bench: _Bench) -> None:
    bench.pass_s(61)
    bench.named("runner-2")
    bench.own()
    assert bench.silent() == [bench.run.id]


def test_a_revoker_whose_own_heartbeats_do_not_come_back_ends_nothing(bench: _Bench) -> None:
    bench.pass_s(600)
    assert bench.silent() == []
    bench.own()
    assert bench.silent() == [bench.run.id]


def test_replayed_heartbeats_neither_keep_a_run_alive_nor_make_it_silent(bench: _Bench) -> None:
    before = bench.ms
    bench.pass_s(55)
    bench.named(sent_ms=before)
    bench.beat(bench.revoker, sent_ms=before)
    bench.pass_s(6)
    bench.own()
    assert bench.silent() == [bench.run.id]


def test_an_old_heartbeat_of_the_revoker_does_not_make_others_silent(bench: _Bench) -> None:
    before = bench.ms
    bench.pass_s(61)
    bench.beat(bench.revoker, sent_ms=before)
    assert bench.silent() == []


def test_a_heartbeat_that_was_sent_long_before_is_a_replay(bench: _Bench) -> None:
    sent = bench.ms + 1
    bench.pass_s(62)
    bench.named(sent_ms=sent - 1000)
    bench.own()
    assert bench.silent() == [bench.run.id]


def test_a_run_that_was_never_named_counts_from_the_first_look(bench: _Bench) -> None:
    other = OneRun(bench.runners, "deploy-bot", bench.run.task, nonce="never")
    other.go("claimed")
    bench.pass_s(1000)
    bench.own()
    assert other.id not in bench.silent()
    bench.pass_s(61)
    bench.own()
    assert other.id in bench.silent()


@pytest.mark.parametrize("end", ["ended", "lost"])
def test_a_run_that_is_over_is_not_silent(bench: _Bench, end: str) -> None:
    bench.run.go(end)  # type: ignore[arg-type]
    bench.pass_s(61)
    bench.own()
    assert bench.silent() == []


def test_heartbeat_not_signed_by_runner_or_revoker_is_ignored(bench: _Bench) -> None:
    bench.pass_s(61)
    bench.beat(SigningKey.generate(bench.revoker.id))
    assert bench.silent() == []
    bench.own()
    bench.beat(SigningKey.generate(bench.run.by.id), bench.run.id)
    assert bench.silent() == [bench.run.id]


class _Redis:
    """What looks for leases of a run, and fails the first time."""

    def __init__(self) -> None:
        self.looked: list[str] = []

    async def revoke(self, run: Run, reason: str) -> None:
        self.looked.append(run.run_id)
        if len(self.looked) == 1:
            raise UnavailableError("not now")


class _Runtime:
    async def tables_caught_up(self, patience_s: float) -> bool:
        return True


async def test_silent_run_is_looked_for_until_once_succeeded_late_and_no_more(bench: _Bench) -> None:
    redis = _Redis()
    ender = SilentRunEnder(cast(Any, _Runtime()), bench.silence, cast(Any, redis), lambda: True, patience_s=1)
    bench.pass_s(GRACE_MS / 1000 + 60)
    bench.own()
    with pytest.raises(UnavailableError):
        await ender.look()
    for _ in range(5):
        await ender.look()
    assert redis.looked == [bench.run.id] * 2
    assert bench.silence.is_silent(bench.run.id)
    # It is named again, and falls silent once more.
    bench.named()
    assert bench.silent() == []
    assert not bench.silence.is_silent(bench.run.id)
    await ender.look()
    bench.pass_s(GRACE_MS / 1000 + 1)
    bench.own()
    for _ in range(3):
        await ender.look()
    assert redis.looked == [bench.run.id] * 5, "what was being issued meanwhile is looked for as well"
