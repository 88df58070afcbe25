"""Everything that can go wrong in a run, as one table. A fault strikes one subject and is over by itself."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from tests.chaos.proxy import Link
from tests.chaos.service import set_ahead
from tests.chaos.system import KAFKA, NODES, REDIS, SERVICES, Instance, System, Way
from tests.chaos.target import TARGET

MAX_DELAY_S = 0.4
MAX_SKEW_MS = 10_000


@dataclass(frozen=True, slots=True)
class Blow:
    """One fault, as planned. `amount` (0 to 1) is how bad it is, where that is a question."""

    at_s: float
    kind: str
    subject: str
    for_s: float
    amount: float

    def __str__(self) -> str:
        return f"{self.at_s:6.1f} s  {self.kind} {self.subject} for {self.for_s:.1f} s ({self.amount:.2f})"


Strike = Callable[[System, Blow], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Fault:
    """A kind of fault: whom it may strike, how often (`weight`) and for how long, and how."""

    kind: str
    subjects: Sequence[str]
    weight: int
    for_s: tuple[float, float]
    strike: Strike


def _instance(system: System, blow: Blow) -> Instance:
    return system.instances[blow.subject]


# --- services ---------------------------------------------------------------------------------------------------------


async def _kill(system: System, blow: Blow) -> None:
    one = _instance(system, blow)
    one.kill()
    try:
        await asyncio.sleep(blow.for_s)
    finally:
        one.start()


async def _pause(system: System, blow: Blow) -> None:
    one = _instance(system, blow)
    one.signal(signal.SIGSTOP)
    try:
        await asyncio.sleep(blow.for_s)
    finally:
        one.signal(signal.SIGCONT)


async def _skew(system: System, blow: Blow) -> None:
    one = _instance(system, blow)
    set_ahead(one.clock, int((blow.amount * 2 - 1) * MAX_SKEW_MS))
    try:
        await asyncio.sleep(blow.for_s)
    finally:
        set_ahead(one.clock, 0)


# --- connections ------------------------------------------------------------------------------------------------------


def _on_link(way: Way, harm: Callable[[Link, Blow], None]) -> Strike:
    async def strike(system: System, blow: Blow) -> None:
        link = system.links[way, blow.subject]
        harm(link, blow)
        try:
            await asyncio.sleep(blow.for_s)
        finally:
            link.heal()

    return strike


def _cut(link: Link, blow: Blow) -> None:
    link.cut()


def _hold(link: Link, blow: Blow) -> None:
    link.hold()


def _slow(link: Link, blow: Blow) -> None:
    link.slow(blow.amount * MAX_DELAY_S)


def _links(way: Way, subjects: Sequence[str]) -> list[Fault]:
    return [
        Fault(f"{way}-cut", subjects, 2, (0.2, 6), _on_link(way, _cut)),
        Fault(f"{way}-hold", subjects, 2, (0.2, 12), _on_link(way, _hold)),
        Fault(f"{way}-slow", subjects, 2, (2, 15), _on_link(way, _slow)),
    ]


# --- Redis ------------------------------------------------------------------------------------------------------------


async def _redis_kill(system: System, blow: Blow) -> None:
    await system.redis[blow.subject].killed(blow.for_s)


async def _redis_pause(system: System, blow: Blow) -> None:
    await _paused(system.redis[blow.subject].pid, blow)


async def _redis_lose(system: System, blow: Blow) -> None:
    await system.redis[blow.subject].lost(blow.for_s)


async def _redis_flush(system: System, blow: Blow) -> None:
    await system.redis[blow.subject].flushed()


async def _redis_set_back(system: System, blow: Blow) -> None:
    snapshot = await system.redis[blow.subject].saved()
    await asyncio.sleep(blow.for_s)
    await system.redis[blow.subject].set_back(snapshot)


async def _redis_promote(system: System, blow: Blow) -> None:
    await system.redis[blow.subject].promoted(blow.for_s)


# --- the target -------------------------------------------------------------------------------------------------------


async def _target_pause(system: System, blow: Blow) -> None:
    child = system.target.server.child
    assert child is not None
    await _paused(child.pid, blow)


# --- the broker -------------------------------------------------------------------------------------------------------


async def _kafka_kill(system: System, blow: Blow) -> None:
    assert system.broker.child is not None
    await asyncio.to_thread(system.broker.child.kill)
    try:
        await asyncio.sleep(blow.for_s)
    finally:
        await asyncio.to_thread(system.broker.restart)


async def _kafka_pause(system: System, blow: Blow) -> None:
    assert system.broker.child is not None
    await _paused(system.broker.child.pid, blow)


async def _paused(pid: int, blow: Blow) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        await asyncio.sleep(blow.for_s)
    finally:
        os.kill(pid, signal.SIGCONT)


# --- the table --------------------------------------------------------------------------------------------------------


def faults_of(*, apache: bool, cluster: bool) -> tuple[Fault, ...]:
    """All that can strike.

    The embedded broker loses what it acknowledged when it is killed, and tells all clients one address. The nodes of
    the cluster have no replicas, and their links are at the nodes.
    """
    every = tuple(name for name, _ in SERVICES)
    holders = tuple(name for name, role in SERVICES if role in ("issuer", "revoker"))
    redis = NODES if cluster else (REDIS,)
    found = [
        # Those who hold leases are struck more often than others.
        Fault("kill", holders, 6, (0, 4), _kill),
        Fault("kill", every, 3, (0, 4), _kill),
        Fault("pause", holders, 6, (0.2, 15), _pause),
        Fault("pause", every, 3, (0.2, 8), _pause),
        Fault("skew", every, 3, (2, 15), _skew),
        *_links("redis", NODES if cluster else holders),
        *_links("target", (TARGET,)),
        Fault("target-pause", (TARGET,), 1, (0.2, 10), _target_pause),
        Fault("redis-kill", redis, 2, (0, 3), _redis_kill),
        Fault("redis-pause", redis, 2, (0.2, 8), _redis_pause),
        Fault("redis-lose", redis, 2, (0, 3), _redis_lose),
        Fault("redis-flush", redis, 2, (0, 0), _redis_flush),
        Fault("redis-set-back", redis, 2, (1, 10), _redis_set_back),
        Fault("kafka-pause", (KAFKA,), 2, (0.2, 8), _kafka_pause),
    ]
    if not cluster:
        found.append(Fault("redis-promote", redis, 2, (0, 5), _redis_promote))
    if apache:
        found += [*_links("kafka", every), Fault("kafka-kill", (KAFKA,), 2, (0, 3), _kafka_kill)]
    return tuple(found)


KINDS = tuple(dict.fromkeys(fault.kind for fault in faults_of(apache=True, cluster=False)))
