"""Wall and CPU time of commands that only print: local ones, and those that read from a running stack."""

from __future__ import annotations

import asyncio
import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.stack import running
from ringfence.client.admin.administrator import Administrator
from ringfence.client.admin.trust_setup import SERVICE_ROLES
from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.dev.organisation import DEPLOY_STAGING, PLATFORM, READ_ALL, key_of, seed
from ringfence.dev.stack import Stack

RUNS = 5
"""So many of each command. They go round, so that a busy moment of the machine does not fall on one of them alone."""
_PENDING_S = 3600
_SOON_S = 30.0
_EXECUTABLE = Path(sys.executable).with_name("ringfence")


@dataclass(slots=True)
class Timed:
    """One command line, and what its runs took in seconds."""

    words: Sequence[str]
    shown: str = ""
    """How it is printed, where its words have an id or a path."""
    statuses: Sequence[int] = (0,)
    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)

    def run(self, environment: dict[str, str]) -> None:
        """Run it once as a process of its own. Raises SystemExit with its stderr where it fails."""
        with tempfile.TemporaryFile() as stderr:
            start = time.perf_counter()
            child = subprocess.Popen(
                [_EXECUTABLE, *self.words], env=environment, stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=stderr,
            )  # fmt: skip
            _, status, used = os.wait4(child.pid, 0)
            self.wall_s.append(time.perf_counter() - start)
            child.returncode = os.waitstatus_to_exitcode(status)
            self.cpu_s.append(used.ru_utime + used.ru_stime)
            if child.returncode not in self.statuses:
                stderr.seek(0)
                said = stderr.read().decode(errors="replace")
                raise SystemExit(f"ringfence {' '.join(self.words)}: status {child.returncode}\n{said}")


@dataclass(frozen=True, slots=True)
class Ids:
    """What commands are asked about."""

    task: str
    request: str
    lease: str
    pending: str


def run(kafka: str) -> None:
    """Print a line for each command: median and worst, wall and CPU."""
    with running(kafka, SERVICE_ROLES) as (stack, settings, _):
        asyncio.run(_measure(stack, settings))


async def _measure(stack: Stack, settings: ClientSettings) -> None:
    await seed(stack.trust, settings, stack.options.operator)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")},
        **stack.environment(),
        "RINGFENCE_CONFIG": os.devnull,
        "COLUMNS": "120",
    }
    async with _something_to_show(stack, settings) as ids:
        groups = {"local": list(_local(stack)), "from services": list(_from_services(stack, ids))}
        commands = [command for group in groups.values() for command in group]
        await asyncio.to_thread(_run_all, commands, environment)
    print(f"of {RUNS} runs each, in s" + f"{'CPU: median':>36} {'most':>6} {'wall: median':>14} {'most':>6}")
    for name, group in groups.items():
        print(f" {name}")
        for command in group:
            shown = command.shown or " ".join(command.words) or "(no command)"
            print(
                f"  {shown:40} {statistics.median(command.cpu_s):15.2f} {max(command.cpu_s):6.2f} "
                f"{statistics.median(command.wall_s):14.2f} {max(command.wall_s):6.2f}"
            )


def _run_all(commands: Sequence[Timed], environment: dict[str, str]) -> None:
    for _ in range(RUNS):
        for command in commands:
            command.run(environment)


@contextlib.asynccontextmanager
async def _something_to_show(stack: Stack, settings: ClientSettings) -> AsyncIterator[Ids]:
    """A task with a lease and with a request that waits for its sponsor, all of it in the trail already."""
    domain = settings.trust_domain
    async with Administrator.connect(key_of(stack.trust, domain, "user", "sam"), settings) as sam:
        task = await sam.assign_task(
            "deploy-bot", purpose="try it", scope=[READ_ALL, DEPLOY_STAGING], ends_in_s=80_000
        )
    async with Agent.connect(key_of(stack.trust, domain, "agent", "deploy-bot"), settings) as agent:
        issued = await agent.request(
            task=task,
            target=PLATFORM,
            verbs=["read"],
            resources=["env/staging/web"],
            reason="look",
            ttl_s=3600,
        )
        waiting = asyncio.create_task(
            agent.request(
                task=task, target=PLATFORM, verbs=["deploy"], resources=["env/staging/web"], reason="roll out",
                ttl_s=600, timeout_s=_PENDING_S,
            )
        )  # fmt: skip
        try:
            async with Sponsor.connect(key_of(stack.trust, domain, "user", "sam"), settings) as sponsor:
                pending = await anext(aiter(sponsor.watch()))
            async with ReadApi(stack.trust.user_key(stack.options.operator), settings) as api:
                async with asyncio.timeout(_SOON_S):
                    while not {"credential.issued", "approval.requested"} <= _codes(
                        await api.events(limit=100)
                    ):
                        await asyncio.sleep(0.2)
            yield Ids(task, issued.request_id, issued.lease_id, pending.request_id)
        finally:
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)


def _codes(answer: Mapping[str, Any]) -> set[str]:
    return {event["metadata"]["event_code"] for event in answer["events"]}


def _local(stack: Stack) -> Iterator[Timed]:
    key = str(stack.trust.user_key(stack.options.operator))
    yield Timed((), statuses=(0, 2))
    yield Timed(("--version",))
    yield Timed(("--help",))
    yield from (Timed((group, "--help")) for group in ("lease", "agent", "audit", "approvals"))
    yield Timed(("leese",), statuses=(2,))
    yield Timed(("key", "show", key), "key show FILE")
    yield Timed(("config", "show"))
    yield Timed(("topics", "acls"))


def _from_services(stack: Stack, ids: Ids) -> Iterator[Timed]:
    olga, sam = (
        str(stack.trust.user_key(stack.options.operator)),
        str(stack.trust.path / "users" / "sam.json"),
    )

    def timed(who: str, words: str, *, statuses: Sequence[int] = (0,)) -> Timed:
        known = {"TASK": ids.task, "REQUEST": ids.request, "LEASE": ids.lease, "PENDING": ids.pending}
        said = [known.get(word, word) for word in words.split()]
        return Timed(("--identity", who, *said), words, statuses)

    for kind, id in (("user", "sam"), ("agent", "deploy-bot"), ("target", PLATFORM), ("task", "TASK")):
        yield timed(olga, f"{kind} list")
        yield timed(olga, f"{kind} show {id}")
    yield timed(olga, "inventory")
    yield timed(olga, "provisioner list")
    yield timed(sam, "approvals list")
    yield timed(sam, "approvals show PENDING")
    yield timed(sam, "approvals grants")
    yield timed(olga, "break-glass list")
    yield timed(olga, "lease list")
    yield timed(olga, "lease show LEASE")
    yield timed(olga, "policy explain REQUEST")
    yield timed(olga, "gateway stats")
    yield timed(olga, "audit who --target platform")
    yield timed(olga, "audit trace deploy-bot")
    yield timed(olga, "audit trace LEASE")
    yield timed(olga, "audit export")
    yield timed(olga, "audit coverage", statuses=(0, 1))
    yield timed(olga, "audit verify")
    yield timed(olga, "topics check", statuses=(0, 1))
    yield timed(olga, "doctor", statuses=(0, 1))
