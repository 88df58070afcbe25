"""`python -m tests.chaos.run --seconds 60 --seed 1`: one run, judged, with one line of figures at its end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import pickle
import random
import shutil
import sys
import time
from collections import defaultdict
from collections.abc import Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar

import uvloop

from ringfence.client.reports.auditor import verify_trail
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import BackendSettings
from ringfence.model.identity.spiffe_ids import spiffe_id
from tests.chaos import reading
from tests.chaos.checker import Problem, check, lives_of, tally
from tests.chaos.doors import ForwardingDoor, GatewayDoor, IntrospectionDoor
from tests.chaos.faults import KINDS, Fault, faults_of
from tests.chaos.history import History
from tests.chaos.insider import Insider
from tests.chaos.nemesis import Nemesis, plan
from tests.chaos.organisation import Organisation
from tests.chaos.prober import Prober
from tests.chaos.system import CUT_LISTENER, GATEWAY, System, running
from tests.chaos.target import TARGET, ValkeyDoor, leftovers
from tests.chaos.upstream import HUB
from tests.chaos.watch import Watch
from tests.chaos.workload import Workload

FOLDER = Path(".ringfence-chaos")
AGENTS = tuple(f"bot-{number}" for number in range(1, 9))
RESOURCE_SERVERS = ("shop", "bank")
SETTLE_WITHIN_S = 90.0
TOLD_WITHIN_S = 10.0
"""What is younger need not be in the trail yet: heartbeats and acks go on while it is read."""
SHOWN = 10
"""So many problems are shown with all that is known of their leases."""
_Result = TypeVar("_Result")
_TOLD = {
    "seq",
    "status",
    "iss",
    "iat",
    "deadline",
    "requested_at_ms",
    "cause",
    "epoch",
    "agent_id",
    "task_id",
    "target_id",
}


@dataclass
class Outcome:
    """What came of a run."""

    times: dict[str, int]
    """How often each kind of fault has struck."""
    history: History
    problems: list[Problem]
    unsettled: str | None
    crashes: list[str]
    counts: dict[str, int]
    probes: str
    journal: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return bool(self.problems or self.unsettled)

    def figures(self) -> str:
        """The one line."""
        found = tally(self.problems)
        leases, void = len(lives_of(self.history)), sum(record.void for record in self.history.leases)
        figures = " ".join(f"{kind}={n}" for kind, n in found.items())
        return f"faults={sum(self.times.values())} leases={leases} {figures} void={void}"


@dataclass(frozen=True)
class Options:
    """What a run is."""

    seed: int
    seconds: float
    kafka: Literal["apache", "embedded"]
    cluster: bool
    kinds: Sequence[str]
    keep: bool
    folder: Path

    @property
    def faults(self) -> list[Fault]:
        every = faults_of(apache=self.kafka == "apache", cluster=self.cluster)
        return [fault for fault in every if fault.kind in self.kinds]

    def again(self) -> str:
        """The command that does the same once more."""
        more = [f"--kafka {self.kafka}"] if self.kafka != "apache" else []
        more += ["--cluster"] if self.cluster else []
        more += [f"--faults {','.join(self.kinds)}"] if set(self.kinds) != set(KINDS) else []
        args = f' ARGS="{" ".join(more)}"' if more else ""
        return f"make chaos SECONDS={self.seconds:.0f} SEED={self.seed}{args}"


async def run(options: Options) -> Outcome:
    """Start everything, let it suffer for so long, let it recover, read what is on Kafka, judge.

    Raises RingfenceError or AssertionError where something does not come back, and says so before all else is ended.
    """
    async with AsyncExitStack() as stack:
        try:
            return await _course(options, stack)
        except (RingfenceError, AssertionError) as error:
            _say(f"broken off: {error}")
            raise
    raise AssertionError  # unreachable: the stack suppresses nothing


async def _course(options: Options, stack: AsyncExitStack) -> Outcome:
    seed, folder = options.seed, options.folder
    blows = plan(seed, options.seconds, options.faults)
    _say(f"seed {seed}: {len(blows)} faults in {options.seconds:.0f} s, logs in {folder / 'logs'}")
    system = await stack.enter_async_context(running(folder, options.kafka, cluster=options.cluster))
    organisation = _organisation(system)
    await organisation.make(stack)
    prober = _prober(system, organisation, stack)
    watch = await stack.enter_async_context(Watch(system.settings(), prober.nudge))
    workload = Workload(organisation, seed, prober.add)
    insider = Insider(organisation, seed, prober.add, workload.counts)
    nemesis = Nemesis(system, options.faults, blows)
    supervising = asyncio.create_task(system.supervise())
    standing = asyncio.create_task(system.stand(nemesis.has_hold_of))
    for task in (supervising, standing):
        stack.callback(task.cancel)
    suffering = _suffered(options.seconds, system, watch, prober, workload, insider, nemesis)
    history, unsettled = await while_standing(standing, suffering)
    (folder / "history.pickle").write_bytes(pickle.dumps(history))  # so that it can be judged once more
    worked = sum(probe.worked for probe in prober.probes)
    return Outcome(
        times=dict(nemesis.times),
        history=history,
        problems=await asyncio.to_thread(check, history),
        unsettled=unsettled if history.leases else "no lease was issued: this proves nothing",
        crashes=[f"{one.name}: {crash}" for one in system.instances.values() for crash in one.crashes],
        counts=dict(workload.counts),
        probes=f"{worked} worked, {len(prober.probes) - worked} refused, {prober.unanswered} unanswered",
        journal=nemesis.journal,
    )


async def while_standing(standing: asyncio.Task[None], work: Coroutine[Any, Any, _Result]) -> _Result:
    """What comes of `work`; or what `standing` raises as soon as it does, as nothing would come of the work then."""
    working = asyncio.create_task(work)
    await asyncio.wait({standing, working}, return_when=asyncio.FIRST_COMPLETED)
    if standing.done() and not working.done():
        working.cancel()  # and not waited for: it may wait for what is gone
        await standing
    return await working


async def _suffered(
    seconds: float,
    system: System,
    watch: Watch,
    prober: Prober,
    workload: Workload,
    insider: Insider,
    nemesis: Nemesis,
) -> tuple[History, str | None]:
    """What there was, and what did not come to its end."""
    working = asyncio.gather(workload.run(), insider.run(seconds))
    _say("everything is ready: the faults begin")
    await asyncio.gather(nemesis.run(), asyncio.sleep(seconds))
    _say("the faults are over: waiting for everything to come to its end")
    workload.stop()
    insider.stop()
    await system.ready()
    await working
    await prober.finish()
    unsettled = await watch.settled(SETTLE_WITHIN_S)
    left = [*await prober.leftovers(), *await leftovers(system.target)]
    # Gateways record that last use as well, and whenever they have counted others; audit tells it a moment later.
    over_ms = time.time_ns() // 1_000_000

    async def settled() -> str | None:
        return unsettled or await watch.settled(SETTLE_WITHIN_S)

    history, unsettled = await reading.read_once_told(
        settled, lambda: reading.read(system.settings(), over_ms)
    )
    history.trail = (await verify_trail(system.settings(), settle_s=TOLD_WITHIN_S)).faults
    history.probes, history.received, history.leftovers = prober.probes, prober.received, left
    history.forwarded = prober.forwarded
    return history, unsettled


def _prober(system: System, organisation: Organisation, stack: AsyncExitStack) -> Prober:
    domain = system.settings().trust_domain
    keys = {target: organisation.key("target", target) for target in RESOURCE_SERVERS}
    door = IntrospectionDoor(keys, [one.url for one in system.of("issuer")])
    listener = GatewayDoor(system.instances[CUT_LISTENER].url)
    gateway = ForwardingDoor(system.instances[GATEWAY].door)
    for one in (door, listener, gateway):
        stack.callback(one.close)
    return Prober(
        {"jwt": door, "redis": ValkeyDoor()},
        {spiffe_id(domain, "service", CUT_LISTENER): listener},
        {spiffe_id(domain, "service", GATEWAY): gateway},
    )


def _organisation(system: System) -> Organisation:
    base = system.stack
    operator = SigningKey.load(base.trust.user_key(base.options.operator))
    targets = {id: BackendSettings(kind="jwt") for id in RESOURCE_SERVERS}
    targets[HUB] = BackendSettings.model_validate({"kind": "jwt", "url": system.hub})
    targets[TARGET] = BackendSettings.model_validate({"kind": "redis", "address": system.target.address})
    return Organisation(system.settings(), operator, AGENTS, targets)


def report(outcome: Outcome, seed: int) -> None:
    """Everything that is known, for whoever has to find out why; then the figures."""
    _say(f"requests and commands: {', '.join(f'{what} {n}' for what, n in sorted(outcome.counts.items()))}")
    _say(f"uses of credentials: {outcome.probes}")
    _say(f"faults: {', '.join(f'{kind} {n}' for kind, n in outcome.times.items())}")
    _say(f"longest time in which nothing was issued: {_longest_pause_s(outcome.history):.1f} s")
    _say(f"longest time until a reply: {_longest_wait_s(outcome.history):.1f} s")
    for crash in outcome.crashes:
        _say(f"ended by itself and was started again: {crash}")
    if outcome.failed:
        _say(f"\nfaults of seed {seed}, in ms since 1970:")
        for line in sorted(outcome.journal):
            _say(f"  {line}")
        _say("")
        _problems(outcome)
    if outcome.unsettled:
        _say(f"not settled: {outcome.unsettled}")


def _longest_pause_s(history: History) -> float:
    issued = sorted(r.at.appended_at_ms for r in history.leases if r.claims.status == "active")
    return max((after - before for before, after in pairwise(issued)), default=0) / 1000


def _longest_wait_s(history: History) -> float:
    waits = [history.answered[id] - at_ms for id, at_ms in history.requests.items() if id in history.answered]
    return max(waits, default=0) / 1000


def _problems(outcome: Outcome) -> None:
    """One of each kind for each lease, and all that Kafka has of the lease."""
    lives = defaultdict(list)
    for one in outcome.history.leases:
        lives[one.claims.lease_id].append(one)
    different = list({(p.kind, p.lease_id or p.what): p for p in reversed(outcome.problems)}.values())[::-1]
    told: set[str] = set()
    for problem in different[:SHOWN]:
        _say(f"{problem}")
        if problem.lease_id is None or problem.lease_id in told:
            continue
        told.add(problem.lease_id)
        for record in lives.get(problem.lease_id, ()):
            said = record.claims.model_dump_json(exclude_none=True, include=_TOLD)
            at, void = record.at, " void" if record.void else ""
            _say(f"    {at.partition}@{at.offset} at {at.appended_at_ms}{void}: {said}")
    if len(different) > SHOWN:
        _say(f"... and {len(different) - SHOWN} more")


def main() -> int:
    """The command."""
    options = _options()
    (options.folder / "logs").mkdir(parents=True)
    logging.basicConfig(filename=options.folder / "logs" / "harness.log", level=logging.WARNING)
    try:
        outcome = uvloop.run(run(options))
    except (RingfenceError, AssertionError):
        _say(f"FAILED with seed {options.seed}\nagain: {options.again()}\nlogs: {options.folder / 'logs'}")
        return 1
    journal = "".join(f"{line}\n" for line in sorted(outcome.journal))
    (options.folder / "logs" / "faults.log").write_text(journal)
    report(outcome, options.seed)
    if outcome.failed:
        _say(f"FAILED with seed {options.seed}\nagain: {options.again()}\nlogs: {options.folder / 'logs'}")
    elif options.keep:
        _say(f"logs: {options.folder / 'logs'}")
    else:
        shutil.rmtree(options.folder)
        with contextlib.suppress(OSError):  # those of others may be there
            options.folder.parent.rmdir()
    _say(outcome.figures())
    return int(outcome.failed)


def _options() -> Options:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos.run", description=__doc__)
    parser.add_argument("--seconds", type=float, default=60, help="how long the faults go on")
    parser.add_argument("--seed", type=int, help="what happens follows from it; any where not given")
    parser.add_argument("--kafka", choices=["apache", "embedded"], default="apache")
    parser.add_argument(
        "--cluster", action="store_true", help="keep the leases in a Valkey cluster of three nodes"
    )
    parser.add_argument("--faults", default=",".join(KINDS), help=f"only these kinds of {', '.join(KINDS)}")
    parser.add_argument("--keep", action="store_true", help="keep the logs of a run that passed, too")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where logs are kept when a run fails")
    given = parser.parse_args()
    kinds = given.faults.split(",")
    if unknown := set(kinds) - set(KINDS):
        parser.error(f"no such fault: {', '.join(sorted(unknown))}")
    seed = given.seed if given.seed is not None else random.SystemRandom().randrange(10**6)
    folder = given.folder / f"{seed}-{time.strftime('%H%M%S', time.gmtime())}"
    return Options(seed, given.seconds, given.kafka, given.cluster, kinds, given.keep, folder.absolute())


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
