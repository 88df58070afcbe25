"""The plan of faults: the same from the same seed, and nobody struck while still down."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from redis import RedisError

from ringfence.dev.processes import StackError
from tests.chaos.faults import Blow, Fault, faults_of
from tests.chaos.nemesis import SPARED_S, Nemesis, plan
from tests.chaos.system import REPLICAS, SERVICES, System

FAULTS = faults_of(apache=True, cluster=False)


def test_the_same_seed_gives_the_same_plan_and_another_another() -> None:
    assert plan(7, 600, FAULTS) == plan(7, 600, FAULTS)
    assert plan(7, 600, FAULTS) != plan(8, 600, FAULTS)


@pytest.mark.parametrize("cluster", [False, True])
def test_every_kind_of_fault_comes_in_a_minute_whatever_the_seed_and_every_role_is_struck(
    cluster: bool,
) -> None:
    faults = faults_of(apache=True, cluster=cluster)
    for seed in range(200):
        blows = plan(seed, 60, faults)
        assert {blow.kind for blow in blows} == {fault.kind for fault in faults}, f"seed {seed}"
        struck = {
            role
            for name, role in SERVICES
            for b in blows
            if b.subject == name and b.kind in ("kill", "pause")
        }
        assert struck == set(REPLICAS), f"seed {seed}"


@pytest.mark.parametrize("seed", range(20))
def test_a_subject_is_struck_once_at_a_time_and_faults_end_with_the_run(seed: int) -> None:
    spared_until: dict[str, float] = {}
    for blow in plan(seed, 300, FAULTS):
        assert blow.at_s >= spared_until.get(blow.subject, 0.0) - 0.02, "to a hundredth of a second"
        assert blow.at_s + blow.for_s <= 300.02
        spared_until[blow.subject] = blow.at_s + blow.for_s + SPARED_S


def test_a_fault_strikes_only_whom_it_may() -> None:
    allowed = {(fault.kind, subject) for fault in FAULTS for subject in fault.subjects}
    assert {(blow.kind, blow.subject) for blow in plan(3, 3600, FAULTS)} <= allowed


async def test_a_subject_is_struck_by_one_at_a_time_and_what_comes_meanwhile_is_left_out() -> None:
    """A fault may be there for longer than was planned."""
    over, struck = asyncio.Event(), list[Blow]()

    async def strike(_: Any, blow: Blow) -> None:
        struck.append(blow)
        if blow.subject == "kafka":
            await over.wait()
        else:
            over.set()

    faults = [Fault("kill", ("kafka", "issuer-1"), 1, (0, 1), strike)]
    blows = [
        Blow(0.0, "kill", "kafka", 0, 0),
        Blow(0.02, "kill", "kafka", 0, 0),
        Blow(0.04, "kill", "issuer-1", 0, 0),
        Blow(0.06, "kill", "issuer-1", 0, 0),
    ]
    nemesis = Nemesis(cast(System, None), faults, blows)
    await nemesis.run()
    assert [blow.subject for blow in struck] == ["kafka", "issuer-1", "issuer-1"]
    assert nemesis.times == {"kill": 3}
    assert [line for line in nemesis.journal if "left out" in line and "kafka" in line]


async def test_a_kind_that_was_always_left_out_strikes_when_all_else_is_over() -> None:
    struck = list[str]()

    async def strike(_: Any, blow: Blow) -> None:
        struck.append(blow.kind)
        await asyncio.sleep(blow.for_s)

    faults = [Fault(kind, ("kafka",), 1, (0, 1), strike) for kind in ("kafka-kill", "kafka-pause")]
    blows = [Blow(0.0, "kafka-kill", "kafka", 0.1, 0), Blow(0.02, "kafka-pause", "kafka", 0.01, 0)]
    nemesis = Nemesis(cast(System, None), faults, blows)
    await nemesis.run()
    assert struck == ["kafka-kill", "kafka-pause"]
    assert nemesis.times == {"kafka-kill": 1, "kafka-pause": 1}
    assert len([line for line in nemesis.journal if "left out" in line]) == 1


@pytest.mark.parametrize(
    "error", [StackError("Apache Kafka ended with status 1"), TimeoutError(), RedisError("no")]
)
async def test_fault_that_does_not_recover_is_reported_at_once(error: Exception) -> None:
    """And not when all other faults are over."""

    async def strike(_: Any, blow: Blow) -> None:
        if blow.subject == "kafka":
            raise error
        await asyncio.Event().wait()

    faults = [Fault("kill", ("kafka", "issuer-1"), 1, (0, 1), strike)]
    blows = [
        Blow(0.0, "kill", "issuer-1", 0, 0),
        Blow(0.01, "kill", "kafka", 0, 0),
        Blow(3600, "kill", "kafka", 0, 0),
    ]
    nemesis = Nemesis(cast(System, None), faults, blows)
    with pytest.raises(StackError, match="kafka did not come back after kill"):
        async with asyncio.timeout(10):
            await nemesis.run()
    assert nemesis.has_hold_of("kafka"), "nobody else need say that it is not there"
