"""What each service declares in its `subscribers.py`: which record comes to which handler, and how.

In memory (`TestKafkaBroker`). Commits, order and retries are tested on real brokers.
"""

from __future__ import annotations

import ast
import importlib
import inspect
from collections.abc import Awaitable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from faststream.kafka import TestKafkaBroker

import ringfence
from ringfence.audit import subscribers as audit
from ringfence.issuer import subscribers as issuer
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.settings import ServiceSettings
from ringfence.kernel.kafka.consumer import Consumer
from ringfence.kernel.kafka.faststream_adapter import GroupBroker, GroupRouter
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Topic
from ringfence.messages.codes import Code
from ringfence.messages.topics import (
    AGENT,
    APPROVAL_REQUEST,
    APPROVAL_RESPONSE,
    AUDIT_CHECKPOINT,
    AUDIT_INTAKE,
    AUDITED,
    CREDENTIAL_DECISION,
    CREDENTIAL_REQUEST,
    HEARTBEAT,
    LEASE,
    PROPOSAL,
    REGISTRY_COMMAND,
    REVOCATION_REQUEST,
    RUN,
    RUN_ORDER,
    SIGNAL_STREAM,
    TARGET,
    TASK,
    USER,
)
from ringfence.policy import subscribers as policy
from ringfence.registry import subscribers as registry
from ringfence.revoker import subscribers as revoker
from ringfence.runner import subscribers as runner
from ringfence.signals import subscribers as signals

SERVICES = {
    "registry": registry,
    "policy": policy,
    "issuer": issuer,
    "revoker": revoker,
    "audit": audit,
    "signals": signals,
    "runner": runner,
}
SETTINGS = ServiceSettings(kafka="localhost:1", topic_prefix="t")
OPTIONS: dict[str, Any] = {"linger_ms": 7, "stream_id": "1", "pool": "reviews"}
GROUPED: dict[str, Any] = {"notices": policy.NoticeHandlers, "verified": audit.VerificationHandlers}


class Spies:
    """Handlers that note what they were given, and dead letters that note what they got."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, Any]] = []
        self.dead: list[tuple[str, str]] = []
        self.fails: Exception | None = None

    def of(self, role: str) -> GroupRouter:
        """The router of a service, with a spy for each handler."""
        declared: GroupRouter = SERVICES[role].router(
            **{name: self._argument(name) for name in inspect.signature(SERVICES[role].router).parameters}
        )
        return declared

    def _argument(self, name: str) -> Any:
        if name in OPTIONS:
            return OPTIONS[name]
        if name in GROUPED:
            kind = GROUPED[name]
            return kind(**{one.name: self._argument(f"{name}.{one.name}") for one in fields(kind)})
        if name.endswith("dead_letters"):
            return _Letters(name, self.dead)

        async def spy(*given: Any) -> None:
            self.seen.append((name, *given))
            if self.fails is not None:
                raise self.fails

        return spy


class _Letters:
    def __init__(self, name: str, dead: list[tuple[str, str]]) -> None:
        self._name, self._dead = name, dead

    async def send(self, record: Received, error: InvalidMessageError) -> None:
        self._dead.append((self._name, error.code))

    async def enqueue(self, record: Received, error: InvalidMessageError) -> Awaitable[Any]:
        return self.send(record, error)


def broker_of(router: GroupRouter) -> tuple[GroupBroker, dict[str, Consumer]]:
    broker = GroupBroker(SETTINGS)
    return broker, broker.include(router)


BATCHES: Sequence[tuple[str, Topic[Any], str]] = (
    ("policy", CREDENTIAL_REQUEST, "requests"),
    ("policy", APPROVAL_RESPONSE, "responses"),
    ("issuer", CREDENTIAL_DECISION, "decisions"),
    ("revoker", REVOCATION_REQUEST, "revocations"),
    ("revoker", REVOCATION_REQUEST, "fences"),
    ("revoker", LEASE, "issued"),
    *(("audit", topic, "audited") for topic in AUDITED),
    ("audit", AUDIT_INTAKE, "intake"),
    ("signals", LEASE, "leases"),
    ("runner", RUN_ORDER, "orders"),
)
RECORDS: Sequence[tuple[str, Topic[Any], str, str]] = (
    ("registry", REGISTRY_COMMAND, "command", "dead_letters"),
    ("policy", APPROVAL_REQUEST, "notices.question", "notices.dead_letters"),
    ("policy", USER, "notices.key", "notices.dead_letters"),
    ("policy", PROPOSAL, "notices.proposal", "notices.dead_letters"),
    ("policy", REGISTRY_COMMAND, "notices.receipt", "notices.dead_letters"),
    ("policy", REVOCATION_REQUEST, "notices.receipt", "notices.dead_letters"),
    *(("revoker", topic, "record_change", "dead_letters") for topic in (AGENT, TASK, USER, TARGET)),
    ("revoker", RUN, "run_end", "run_dead_letters"),
    ("audit", HEARTBEAT, "verified.heartbeat", "verified.dead_letters"),
    ("audit", AUDIT_CHECKPOINT, "verified.checkpoint", "verified.dead_letters"),
    ("audit", SIGNAL_STREAM, "verified.signal_stream", "verified.dead_letters"),
)


@pytest.mark.parametrize(("role", "topic", "handler"), BATCHES, ids=str)
async def test_batches_come_whole_to_their_handler(role: str, topic: Topic[Any], handler: str) -> None:
    spies = Spies()
    broker, _ = broker_of(spies.of(role))
    async with TestKafkaBroker(broker) as memory:
        await memory.publish(b"text", topic.name("t"), key=b"k")
    given = [batch for name, batch in spies.seen if name == handler]
    assert [[(one.topic, one.key, one.value) for one in batch] for batch in given] == [
        [(topic, "k", b"text")]
    ]


@pytest.mark.parametrize(("role", "topic", "handler"), BATCHES, ids=str)
async def test_error_of_a_batch_handler_is_raised(role: str, topic: Topic[Any], handler: str) -> None:
    spies = Spies()
    spies.fails = UnavailableError("Redis is away")
    broker, _ = broker_of(spies.of(role))
    async with TestKafkaBroker(broker) as memory:
        with pytest.raises(UnavailableError, match="Redis is away"):
            await memory.publish(b"text", topic.name("t"), key=b"k")
    assert spies.seen


@pytest.mark.parametrize(("role", "topic", "handler", "letters"), RECORDS, ids=str)
async def test_records_come_one_by_one_and_invalid_ones_go_to_the_dead_letters(
    role: str, topic: Topic[Any], handler: str, letters: str
) -> None:
    spies = Spies()
    broker, _ = broker_of(spies.of(role))
    async with TestKafkaBroker(broker) as memory:
        await memory.publish(b"good", topic.name("t"), key=b"k")
        spies.fails = InvalidMessageError("not a JWS", code=Code.NOT_A_JWS)
        await memory.publish(b"bad", topic.name("t"), key=b"k")
        spies.fails = UnavailableError("Redis is away")
        with pytest.raises(UnavailableError, match="Redis is away"):
            await memory.publish(b"later", topic.name("t"), key=b"k")
    given = [record.value for name, record in spies.seen if name == handler]
    assert given == [b"good", b"bad", b"later"]
    assert spies.dead == [(letters, "not_a_jws")]


def test_every_subscriber_is_tested_here() -> None:
    tested = {(role, topic.what) for role, topic, _ in BATCHES} | {
        (role, topic.what) for role, topic, *_ in RECORDS
    }
    declared = {
        (role, topic.what)
        for role in SERVICES
        for group in Spies().of(role).groups
        for subscriber in group.subscribers
        for topic in subscriber.reads
    }
    assert declared == tested


def test_groups_and_their_options_are_those_of_before() -> None:
    """Another name would read all topics anew, from their beginning."""
    groups = {
        group.name: (group.max_records, group.linger_ms, group.single_active, group.on_assigned is not None)
        for role in SERVICES
        for group in Spies().of(role).groups
    }
    assert groups == {
        "registry": (32, 0, False, True),
        "policy": (32, 0, False, True),
        "policy-notices": (32, 0, False, False),
        "issuer": (32, 0, False, True),
        "revoker": (32, 0, False, False),
        "revoker-fences": (256, 0, False, False),
        "revoker-records": (32, 0, False, False),
        "revoker-runs": (32, 0, False, False),
        "revoker-issued": (256, 250, False, False),
        "audit": (1000, 7, False, False),
        "audit-strays": (100, 70, False, False),
        "audit-chain": (1000, 7, True, True),
        "signals-1": (500, 0, True, False),
        "runner-reviews": (32, 0, False, False),
    }
    strays = next(group for group in Spies().of("audit").groups if group.name == "audit-strays")
    assert (strays.read_uncommitted, strays.audit_data_loss, strays.report_initial_gap) == (
        True,
        False,
        False,
    )


def test_without_webhooks_nobody_reads_for_notices() -> None:
    async def handle(*_: Any) -> Any: ...

    router = policy.router(
        requests=handle, responses=handle, notices=None, on_assigned=handle, dead_letters=None
    )
    assert [group.name for group in router.groups] == ["policy"]


def test_each_call_makes_a_router_of_its_own() -> None:
    """Replicas share a process in tests, and the streams of signals share one in each replica."""
    for role in SERVICES:
        first, second = Spies().of(role), Spies().of(role)
        assert first is not second
        assert not set(map(id, first.groups)) & set(map(id, second.groups))


def test_groups_are_declared_in_subscribers_alone() -> None:
    services = Path(inspect.getfile(ringfence)).parent
    for file in services.rglob("*.py"):
        calls = [node.func for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Call)]
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        where = str(file.relative_to(services))
        if file.name != "subscribers.py":
            assert not names & {"GroupRouter", "ConsumerGroup"}, where
        if where != "kernel/kafka/faststream_adapter.py":
            assert "Consumer" not in names, where


@pytest.mark.parametrize("role", SERVICES)
def test_subscriber_modules_create_no_router_at_import(role: str) -> None:
    module = importlib.import_module(f"ringfence.{role}.subscribers")
    functions = [
        name for name, _ in inspect.getmembers(module, inspect.isfunction) if not name.startswith("_")
    ]
    assert "router" in functions
    made = [name for name, value in vars(module).items() if isinstance(value, GroupRouter)]
    assert made == []
