"""Policy replay: evaluates recorded requests with another bundle, and compares the outcomes with the recorded
decisions.

It compares policy's own first evaluation of each request. Later answers of people, and requests that never reached the
bundle, are counted and not compared.
"""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import orjson
from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError
from pydantic import TypeAdapter, ValidationError

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.connection import connection, no_answer
from ringfence.kernel.kafka.producer import to_json
from ringfence.kernel.kafka.record import Received, missing_topics, received
from ringfence.kernel.kafka.table_reader import Follower, paced
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialDecision, Reason, RequiredClass
from ringfence.messages.registry import ApprovalClass
from ringfence.messages.topics import CREDENTIAL_DECISION, TRUST
from ringfence.policy.domain import INPUT_FIELDS, verdict_of
from ringfence.rego.bundle import Bundle
from ringfence.rego.engine import PolicyEngine, PolicyFailedError, PolicyResult

Change = Literal[
    "denied_to_allowed", "denied_to_approval", "approval_removed", "ttl_longer",
    "allowed_to_denied", "approval_added", "ttl_shorter",
]  # fmt: skip
WIDENS: frozenset[Change] = frozenset({"denied_to_allowed", "denied_to_approval", "approval_removed"})
Skipped = Literal[
    "later_decision", "answered_by_people", "withdrawn", "without_input", "engine_failed", "break_glass_not_needed",
    "input_incomplete", "input_unreadable", "signature_not_policys",
]  # fmt: skip
_BY_PEOPLE = frozenset({Code.APPROVAL_DENIED, Code.APPROVAL_STALE, Code.APPROVAL_EXPIRED})
_ENGINE = frozenset({Code.POLICY_TIMEOUT, Code.POLICY_UNAVAILABLE, Code.POLICY_INVALID})
_INPUT_OF_RULES = re.compile(
    r"""
    \binput (?: \.(\w+) | \["(\w+)"\] ) (?: \.(\w+) | \["(\w+)"\] )?
    | \bobject\.get\(\s*input,\s* (?: "(\w+)" | \[\s*"(\w+)" (?:\s*,\s*"(\w+)")? )
    """,
    re.VERBOSE,
)
_REASONS = TypeAdapter(tuple[Reason, ...])
_FLOORS = TypeAdapter(tuple[ApprovalClass, ...])
PER_KIND = 5


@dataclass(frozen=True, slots=True)
class RequestOutcome:
    """Policy's outcome for one request."""

    outcome: Literal["allowed", "denied", "approval_required"]
    required: tuple[RequiredClass, ...]
    ttl_s: int | None
    reasons: tuple[Reason, ...]

    @classmethod
    def of(
        cls, required: Sequence[RequiredClass], ttl_s: int | None, reasons: Sequence[Reason], *, denied: bool
    ) -> RequestOutcome:
        """Return the outcome before any approval: a given approval says nothing about what was required."""
        if denied:
            return cls("denied", tuple(required), None, tuple(reasons))
        return cls("approval_required" if required else "allowed", tuple(required), ttl_s, tuple(reasons))


@dataclass(frozen=True, slots=True)
class Example:
    """A request that would be decided differently."""

    request_id: str
    agent_id: str
    on_behalf_of: str
    scope: list[dict[str, Any]]
    changes: tuple[Change, ...]
    before: RequestOutcome
    after: RequestOutcome


@dataclass(slots=True)
class Report:
    """The result of a replay. `skipped` counts the decisions that were not compared, by reason."""

    revision: str
    read: int = 0
    compared: int = 0
    unchanged: int = 0
    changes: Counter[Change] = field(default_factory=Counter)
    skipped: Counter[Skipped] = field(default_factory=Counter)
    missing_fields: Counter[str] = field(default_factory=Counter)
    """The fields that the bundle reads and recorded inputs lack."""
    revisions: Counter[str] = field(default_factory=Counter)
    """The bundle revisions of the compared decisions."""
    examples: dict[Change, list[Example]] = field(default_factory=dict)

    @property
    def widens(self) -> bool:
        """Return whether anything that was denied would be allowed, or an approval would be dropped."""
        return any(self.changes[kind] for kind in WIDENS)

    def as_json(self) -> dict[str, Any]:
        return {
            "revision": self.revision,
            "read": self.read,
            "compared": self.compared,
            "unchanged": self.unchanged,
            "widens": self.widens,
            "changes": dict(self.changes),
            "skipped": dict(self.skipped),
            "missing_fields": dict(self.missing_fields),
            "compared_by_revision": dict(self.revisions),
            "examples": {
                kind: [_example_fields(one) for one in found] for kind, found in self.examples.items()
            },
        }


@dataclass(frozen=True, slots=True)
class _ComparableDecision:
    """A recorded decision that can be compared."""

    decision: CredentialDecision
    input: dict[str, Any]
    against: tuple[Reason, ...]
    floors: tuple[ApprovalClass, ...]
    asked_s: int
    target_max_ttl_s: int


def fields_of(bundle: Bundle) -> frozenset[str]:
    """Return the parts of the input that a bundle's rules name: `agent`, or `agent.ceiling` where they name that."""
    fields: set[str] = set()
    for _, text in bundle.modules:
        for match in _INPUT_OF_RULES.finditer(text):
            names = [name for name in match.groups() if name]
            fields |= {".".join(names[:depth]) for depth in range(1, len(names) + 1)}
    return frozenset(fields)


def changes_between(before: RequestOutcome, after: RequestOutcome) -> tuple[Change, ...]:
    """Return the changes between two outcomes; empty where a program would notice none."""
    if before.outcome == "denied" or after.outcome == "denied":
        if before.outcome == after.outcome:
            return ()
        if after.outcome == "denied":
            return ("allowed_to_denied",)
        return ("denied_to_approval" if after.required else "denied_to_allowed",)
    changes: list[Change] = []
    if set(before.required) - set(after.required):
        changes.append("approval_removed")
    if set(after.required) - set(before.required):
        changes.append("approval_added")
    old, new = before.ttl_s or 0, after.ttl_s or 0
    if old != new:
        changes.append("ttl_longer" if new > old else "ttl_shorter")
    return tuple(changes)


class Replay:
    """Evaluates recorded decisions with another bundle."""

    def __init__(self, bundle: Bundle, engine: PolicyEngine, trust: TrustStore) -> None:
        """`engine` has that bundle in force, and is started."""
        self._engine = engine
        self._trust = trust
        self._needed = fields_of(bundle) & INPUT_FIELDS
        self._seen: set[bytes] = set()
        self.report = Report(bundle.revision)

    async def run(self, recorded: Recorded, progress: Callable[[int, int], None]) -> Report:
        """Compare all recorded decisions. `progress` receives the number of records read, and of all records."""
        async for batch in recorded.batches():
            await self.compare(batch)
            progress(self.report.read, recorded.total)
        return self.report

    async def compare(self, records: Sequence[Received]) -> None:
        """Compare some records of `credential.decision`, in the order of each partition."""
        self.report.read += len(records)
        questions = []
        for record in records:
            comparable = self._question(record)
            if isinstance(comparable, _ComparableDecision):
                questions.append(comparable)
            else:
                self.report.skipped[comparable] += 1
        after = await asyncio.gather(*map(self._after, questions))
        for question, new in zip(questions, after, strict=True):
            self._count(question, new)

    def _question(self, record: Received) -> _ComparableDecision | Skipped:
        """Return what to evaluate for a record, or why it is not compared."""
        try:
            decision = verify(
                parse(record.value), CredentialDecision,
                self._trust.finder("policy", at_s=record.appended_at_ms / 1000), audience=self._trust.trust_domain,
            ).claims  # fmt: skip
        except InvalidMessageError:
            return "signature_not_policys"
        id = bytes.fromhex(decision.request_id.replace("-", ""))
        if id in self._seen:
            return "later_decision"
        self._seen.add(id)
        codes = {reason.code for reason in decision.reasons}
        if decision.input is None:
            return "without_input"
        if decision.outcome == "denied" and codes & _BY_PEOPLE:
            return "answered_by_people"
        if Code.WITHDRAWN in codes:
            return "withdrawn"
        if codes & _ENGINE:
            return "engine_failed"
        if Code.BREAK_GLASS_NOT_NEEDED in codes:
            return "break_glass_not_needed"
        missing = {field for field in self._needed if not _has(decision.input, field)}
        if missing:
            self.report.missing_fields.update(missing)
            return "input_incomplete"
        try:
            recorded_input = decision.input
            return _ComparableDecision(
                decision, recorded_input, _REASONS.validate_json(orjson.dumps(recorded_input["lacking"])),
                _FLOORS.validate_python(tuple(recorded_input["floors"])), int(recorded_input["request"]["ttl_s"]),
                int(recorded_input["target"]["max_ttl_s"]),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, ValidationError):
            return "input_unreadable"

    async def _after(self, question: _ComparableDecision) -> RequestOutcome:
        try:
            result = (await self._engine.evaluate(to_json(question.input))).result
        except PolicyFailedError as error:
            # As in the service: no answer is a denial.
            result = PolicyResult(False, (Reason(code=error.code, message=str(error)),), (), 0)
        verdict = verdict_of(
            question.against, result, question.floors, question.asked_s, question.target_max_ttl_s
        )
        return RequestOutcome.of(
            verdict.required, verdict.ttl_s, verdict.denials, denied=verdict.ttl_s is None
        )

    def _count(self, question: _ComparableDecision, after: RequestOutcome) -> None:
        report, decision = self.report, question.decision
        # A break-glass request was denied by the bundle; what the two operators overrode is among the reasons.
        broken = "break_glass" in decision.required
        before = RequestOutcome.of(
            [c for c in decision.required if c != "break_glass"], decision.ttl_s, decision.reasons,
            denied=broken or decision.outcome == "denied",
        )  # fmt: skip
        changes = changes_between(before, after)
        report.compared += 1
        if decision.revisions is not None:
            report.revisions[decision.revisions.policy] += 1
        report.changes.update(changes)
        if not changes:
            report.unchanged += 1
            return
        request = question.input["request"]
        example = Example(
            decision.request_id, str(request.get("agent_id")),
            str(question.input.get("task", {}).get("on_behalf_of")), list(request.get("scope", [])),
            changes, before, after,
        )  # fmt: skip
        for kind in changes:
            examples = report.examples.setdefault(kind, [])
            if len(examples) < PER_KIND:
                examples.append(example)


def _has(document: Any, field: str) -> bool:
    for name in field.split("."):
        if not isinstance(document, dict) or name not in document:
            return False
        document = document[name]
    return True


def _example_fields(example: Example) -> dict[str, Any]:
    def standing(one: RequestOutcome) -> dict[str, Any]:
        reasons = [reason.model_dump(mode="json", exclude_none=True) for reason in one.reasons]
        return {"outcome": one.outcome, "required": one.required, "ttl_s": one.ttl_s, "reasons": reasons}

    return {
        "request_id": example.request_id,
        "agent_id": example.agent_id,
        "on_behalf_of": example.on_behalf_of,
        "scope": example.scope,
        "changes": example.changes,
        "before": standing(example.before),
        "after": standing(example.after),
    }


# Recorded decisions on Kafka, from a time up to now: for queries about the past, not for serving.

_BATCH = 500


class Recorded:
    """The decisions since a time. `total` is the number of records; some may be no decision."""

    def __init__(
        self, consumer: AIOKafkaConsumer, name: str, start: dict[TopicPartition, int], end: dict[TopicPartition, int]
    ) -> None:  # fmt: skip
        self._consumer = consumer
        self._topics = {name: CREDENTIAL_DECISION}
        self._end = end
        self.total = sum(end[partition] - offset for partition, offset in start.items())

    async def batches(self) -> AsyncIterator[list[Received]]:
        """Yield batches of at most 500 records, in the order of each partition. Nothing is read ahead."""
        behind = {p for p, end in self._end.items() if await self._consumer.position(p) < end}
        while behind:
            fetched = await self._consumer.getmany(*behind, timeout_ms=500, max_records=_BATCH)
            for partition, records in fetched.items():
                here = [record for record in records if record.offset < self._end[partition]]
                if here:
                    yield [received(record, self._topics) for record in here]
            behind = {p for p in behind if await self._consumer.position(p) < self._end[p]}


@asynccontextmanager
async def recorded_decisions(settings: BusSettings, since_ms: int) -> AsyncIterator[Recorded]:
    """Yield the decisions appended from `since_ms` (ms since 1970) until now.

    Raises UnavailableError if Kafka or the topic is missing, or stops answering.
    """
    name = CREDENTIAL_DECISION.name(settings.topic_prefix)
    consumer = AIOKafkaConsumer(
        **connection(settings), enable_auto_commit=False, auto_offset_reset="earliest"
    )
    paced(consumer, settings)
    try:
        await consumer.start()
        await consumer._client.set_topics(
            [name]
        )  # as in `Follower`: a client that has just started knows none
        numbers = consumer._client.cluster.partitions_for_topic(name)
        if not numbers:
            raise missing_topics([name])
        partitions = [TopicPartition(name, number) for number in sorted(numbers)]
        consumer.assign(partitions)
        end = dict(await consumer.end_offsets(partitions))
        offsets = await consumer.offsets_for_times(dict.fromkeys(partitions, since_ms))
        start = {p: at.offset if (at := offsets.get(p)) else end[p] for p in partitions}
        for partition, offset in start.items():
            consumer.seek(partition, offset)
        yield Recorded(consumer, name, start, end)
    except KafkaError as error:
        raise await no_answer(settings, error) from None
    finally:
        await consumer.stop()


async def trust_of(settings: BusSettings, clock: Clock) -> TrustStore:
    """Return the trust bundle from Kafka, which says who may sign what. Raises UnavailableError if there is none."""
    trust = TrustStore(settings.trust_domain, settings.trust_root)

    def take_in(records: Sequence[Received]) -> None:
        for record in records:
            try:
                trust.load(record.value, clock.now_ms() / 1000)
            except InvalidMessageError:
                continue  # a writer to the topic can write anything; only what the root signed counts

    async with Follower(settings, [TRUST], take_in) as follower:
        await follower.complete.wait()
    trust.require()
    return trust
