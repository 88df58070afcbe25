"""Policy's tables with very many agents: how long they take from Kafka, what they weigh, and how fast they answer.

One agent in ten has a running task, and in it a lease that lives. Everything is signed as in life: the commands of
people in the registry's records, the leases of the issuer. Policy runs as a process of its own; its memory is what it
has more than with empty tables.
"""

from __future__ import annotations

import asyncio
import statistics
import time
import uuid
from collections.abc import Awaitable, Callable, Iterator
from typing import Any, NamedTuple, cast

import httpx
import psutil

from bench.machine import cpu_s
from bench.stack import running
from ringfence.client.admin.trust_setup import first_operator
from ringfence.client.reports.access_report import read_inventory
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.settings import ClientSettings
from ringfence.dev.stack import Stack
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.record import Outbound
from ringfence.messages.base import Permission, Topic
from ringfence.messages.lease import Lease
from ringfence.messages.registry import (
    AgentRecord,
    AgentRegister,
    AgentState,
    EmbeddedCommand,
    Entitlements,
    TaskAssign,
    TaskRecord,
    TaskState,
    TaskTerms,
    UserRecord,
    UserSet,
    UserState,
)
from ringfence.messages.topics import AGENT, LEASE, TASK, USER
from tools.schemas.examples import EXAMPLES

SIZES = (10_000, 100_000)
SPONSORS, AT_WORK = 500, 10
READY_WITHIN_S = 600.0
_AT_A_TIME = 500
_TIMES = 5
_CEILING = (Permission(target="platform", verbs=("read", "deploy"), resources=("env/staging/*",)),)


class Record(NamedTuple):
    """One record, as a service publishes it."""

    topic: Topic[Any]
    key: str
    jws: str


class Organisation:
    """An operator, sponsors, and the agents of each, as the registry publishes them."""

    def __init__(self, stack: Stack) -> None:
        self._td = stack.options.trust_domain
        self._root = SigningKey.load(stack.trust.root_key)
        self._registry = SigningKey.load(stack.trust.service_key("registry"))
        self._issuer = SigningKey.load(stack.trust.service_key("issuer"))
        self._operator = SigningKey.load(stack.trust.user_key(stack.options.operator))
        self._first = first_operator(stack.trust, self._td, stack.options.operator, "Olga")
        self._sponsors = [
            SigningKey.generate(f"spiffe://{self._td}/user/sponsor-{number}") for number in range(SPONSORS)
        ]
        self._now_s = int(time.time())

    def sponsor(self, number: int) -> SigningKey:
        """The key of one."""
        return self._sponsors[number]

    def people(self) -> Iterator[Record]:
        """The operator and all sponsors."""
        yield self._user(self._first, self._root, ago_s=30)
        for number, key in enumerate(self._sponsors):
            command = self._command(
                UserSet, self._operator, user_id=f"sponsor-{number}", name="A Sponsor", roles=("sponsor",),
                keys=(key.record(self._now_s + 10**6),),
                entitlements=Entitlements(scope=_CEILING, source="bench", as_of=self._now_s),
            )  # fmt: skip
            yield self._user(command, self._operator, ago_s=20)

    def agents(self, first: int, last: int) -> Iterator[Record]:
        """Those with these numbers, and what some of them are at."""
        for number in range(first, last):
            sponsor, agent_id = self._sponsors[number % SPONSORS], f"agent-{number}"
            key = SigningKey.generate(f"spiffe://{self._td}/agent/{agent_id}")
            command = self._command(
                AgentRegister, sponsor, agent_id=agent_id, sponsor=f"sponsor-{number % SPONSORS}",
                description="reviews pull requests", keys=(key.record(self._now_s + 10**6),), ceiling=_CEILING,
            )  # fmt: skip
            state = AgentState(
                agent_id=agent_id, sponsor=command.sponsor, description=command.description, keys=command.keys,
                ceiling=command.ceiling, status="active",
            )  # fmt: skip
            yield self._record(AGENT, AgentRecord, agent_id, state, sign(command, sponsor))
            if number % AT_WORK == 0:
                yield from self._at_work(key, agent_id, number % SPONSORS)

    def _at_work(self, key: SigningKey, agent_id: str, number: int) -> Iterator[Record]:
        sponsor, until_s = self._sponsors[number], self._now_s + 3600
        terms = TaskTerms(
            agent_id=agent_id, purpose="review pull request 421", scope=_CEILING, not_after=until_s
        )
        command = self._command(TaskAssign, sponsor, terms=terms, on_behalf_of=f"sponsor-{number}")
        task_id, id = message_id(command.iss, command.jti), str(uuid.uuid4())
        state = TaskState(
            task_id=task_id, agent_id=agent_id, purpose=terms.purpose, scope=terms.scope, not_after=until_s,
            on_behalf_of=command.on_behalf_of, assigned_by=command.on_behalf_of, status="active",
        )  # fmt: skip
        yield self._record(TASK, TaskRecord, task_id, state, sign(command, sponsor))
        lease = cast(Lease, EXAMPLES[Lease]).model_copy(
            update={
                "iss": self._issuer.id, "aud": self._td, "iat": self._now_s, "jti": f"{id}.1", "lease_id": id,
                "seq": 1, "status": "active", "agent_id": agent_id, "act": (agent_id,), "task_id": task_id,
                "sponsor": f"sponsor-{number}", "on_behalf_of": command.on_behalf_of, "cause": None,
                "scope": _CEILING, "requested_at_ms": self._now_s * 1000, "deadline": until_s, "epoch": None,
            }
        )  # fmt: skip
        yield Record(LEASE, id, sign(lease, self._issuer))
        yield from self._waiting(key, agent_id, task_id)

    def _waiting(self, key: SigningKey, agent_id: str, task_id: str) -> Iterator[Record]:
        """The requests of an agent at work that wait for approvals: none here."""
        yield from ()

    def _user(self, command: UserSet, by: SigningKey, ago_s: int) -> Record:
        state = UserState(
            user_id=command.user_id, name=command.name, roles=command.roles, keys=command.keys,
            entitlements=command.entitlements, status="active",
        )  # fmt: skip
        return self._record(USER, UserRecord, command.user_id, state, sign(command, by), ago_s)

    def _record(
        self, topic: Topic[Any], model: Any, id: str, state: Any, command: str, ago_s: int = 10
    ) -> Record:
        record = model(
            iss=self._registry.id, aud=self._td, iat=self._now_s, jti=f"{topic.what}-{id}",
            sub=f"spiffe://{self._td}/{topic.what}/{id}", revision=1, state=state,
            commands=(EmbeddedCommand(jws=command, appended_at_ms=(self._now_s - ago_s) * 1000),),
        )  # fmt: skip
        return Record(topic, id, sign(record, self._registry))

    def _command(self, model: Any, by: SigningKey, **fields: Any) -> Any:
        head = {"iss": by.id, "aud": self._td, "iat": self._now_s, "jti": str(uuid.uuid4())}
        return model(**head, exp=self._now_s + 300, **fields)


async def publish(publisher: Publisher, records: Iterator[Record]) -> int:
    """How many bytes it was."""
    sent: list[Awaitable[Any]] = []
    size = 0
    for record in records:
        size += len(record.jws)
        sent.append(
            await publisher.send(
                record.topic, record.topic.what, Outbound(record.key, record.jws, id=record.key)
            )
        )
        if len(sent) >= _AT_A_TIME:
            await asyncio.gather(*sent)
            sent.clear()
    await asyncio.gather(*sent)
    return size


def _ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/readyz", timeout=2).status_code == 200
    except httpx.HTTPError:
        return False


class _Started(NamedTuple):
    ready_s: float
    cpu_s: float
    rss: int


def _start(stack: Stack) -> _Started:
    """Start policy anew, until its tables are complete."""
    began = time.perf_counter()
    stack.start_service("policy")
    child = stack.child("policy")
    child.wait_until(lambda: _ready(stack.url("policy")), READY_WITHIN_S, "was ready")
    used = cpu_s({"policy": child.pid})["policy"]
    return _Started(time.perf_counter() - began, used, _rss(child.pid))


def _rss(pid: int) -> int:
    process = psutil.Process(pid)
    return max(one.memory_info().rss for one in [process, *process.children(recursive=True)])


async def _until_looked_at(api: ReadApi) -> int:
    """How many agents there are, once all are looked at. Asked seldom: a question looks at some by itself."""
    while True:
        page = await api.inventory(limit=0)
        if not any("not in it as they are now" in gap for gap in page["gaps"]):
            return int(page["totals"]["agents"])
        await asyncio.sleep(1)


async def _ms(ask: Callable[[], Awaitable[Any]]) -> str:
    """The median of some times, and the longest."""
    took = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        await ask()
        took.append((time.perf_counter() - began) * 1000)
    return f"{statistics.median(took):,.0f} ms (at most {max(took):,.0f})"


async def _answers(api: ReadApi, sponsor: ReadApi) -> None:
    cursor = (await api.inventory(limit=0))["cursor"]
    asked: dict[str, Callable[[], Awaitable[Any]]] = {
        "sums and 100 agents": api.inventory,
        "orphans": lambda: api.inventory({"orphans": 1}),
        "one agent": lambda: api.inventory({"agent": "agent-7"}),
        "a sponsor's own": sponsor.inventory,
        "what changed": lambda: api.inventory_changes(cursor),
        "all in detail": lambda: read_inventory(api),
    }
    for what, ask in asked.items():
        print(f"    {what:22} {await _ms(ask)}")


async def _measure(stack: Stack, settings: ClientSettings, size: int, empty: _Started) -> None:
    bytes_ = 0
    organisation = Organisation(stack)
    async with Publisher(stack.settings(), "spiffe://bench/registry") as publisher:
        bytes_ += await publish(publisher, organisation.people())
        bytes_ += await publish(publisher, organisation.agents(0, size))
    started = _start(stack)
    pid = stack.child("policy").pid
    print(
        f"  {size:7,} agents ({bytes_ / 1e6:,.0f} MB on Kafka): tables complete after {started.ready_s:.1f} s "
        f"({empty.ready_s:.1f} s empty), CPU {started.cpu_s - empty.cpu_s:.1f} s more"
    )
    key = stack.trust.user_key(stack.options.operator)
    async with (
        ReadApi(key, settings, timeout_s=60) as api,
        ReadApi(organisation.sponsor(7), settings, timeout_s=60) as sponsor,
    ):
        began, before = time.perf_counter(), cpu_s({"policy": pid})["policy"]
        found = await _until_looked_at(api)
        took, used = time.perf_counter() - began, cpu_s({"policy": pid})["policy"] - before
        weight = (_rss(pid) - empty.rss) / size
        print(
            f"    {found:,} agents verified and looked at after {took:.1f} s more, CPU {used:.1f} s; "
            f"{weight:,.0f} B of memory an agent, {(_rss(pid) - empty.rss) / 1e6:,.0f} MB in all"
        )
        await _answers(api, sponsor)


def run(kafka: str) -> None:
    """Print it for each size, on a fresh stack each."""
    for size in SIZES:
        with running(kafka, ("policy",)) as (stack, settings, _):
            stack.child("policy").stop()
            empty = _start(stack)
            stack.child("policy").stop()
            asyncio.run(_measure(stack, settings, size, empty))
