"""Verifies the whole audit trail from Kafka, trusting nobody but the pinned root.

The events of each partition are checked against their own hash links, audit's signed checkpoints, the heads that
witnesses and the caller saw before, and the records that they are about.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import TypeAdapter

from ringfence.client.settings import ClientSettings, load_settings
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.crypto.jws import UnverifiedJws, parse, verify
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditCheckpoint, AuditWitness
from ringfence.messages.base import Topic, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDITED, TRUST, USER
from ringfence.model.audit_log import SETTLE_S
from ringfence.model.audit_log.chain import Source, Tip
from ringfence.model.audit_log.verification import ChainVerifier, Fault, FaultKind
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory

Heads = dict[str, tuple[int, str]]
"""By tree: its number of events, and its root. An auditor keeps them from one verification to the next."""
HEADS = TypeAdapter(Heads)
_TELL_EVERY = 500
"""Records between two calls of `progress`."""
_RETENTION_TOLERANCE = 0.99
"""Brokers delete whole segments, so some of the oldest events may be gone a little early."""


@dataclass(frozen=True, slots=True)
class TreeReport:
    """One hash chain: first and last event, events before the chain, how far it is signed, and its witnesses."""

    tree: str
    first: int
    last: int
    unchained: int
    signed: int
    root: str | None
    """The signed root; None if nothing is signed."""
    witnesses: tuple[str, ...]


@dataclass(slots=True)
class TrailReport:
    """Result of verifying the trail."""

    trees: list[TreeReport] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    records: int = 0
    """How many records on other topics were compared with the events."""

    @property
    def heads(self) -> Heads:
        """Return the signed heads to keep. The next verification must find them again."""
        return {one.tree: (one.signed, one.root) for one in self.trees if one.root is not None}


@dataclass(slots=True)
class _SignedHeads:
    """Signed heads of one tree on `audit.checkpoint`."""

    checkpoints: list[AuditCheckpoint] = field(default_factory=list)
    witnessed: list[AuditWitness] = field(default_factory=list)


async def verify_trail(
    settings: ClientSettings | None = None,
    *,
    earlier_heads: Heads | None = None,
    settle_s: float = SETTLE_S,
    progress: Callable[[int, int], None] | None = None,
) -> TrailReport:
    """Read and verify the whole trail. Returns a report with its faults.

    Args:
        earlier_heads: the `heads` of an earlier report.
        settle_s: how old a record must be, in seconds, before it must have an event.
        progress: called now and then with the number of records read, and of all records.

    Raises SettingsError if no trust root is pinned, UnavailableError if Kafka cannot be read.
    """
    settings = load_settings(settings)
    report = TrailReport()
    async with _CountedStretches(settings, progress) as kafka:
        trust, directory = await _load_trust(kafka, settings)
        await kafka.begin((AUDIT, *AUDITED))
        signed = await _read_signed_heads(kafka, trust, directory, report)
        verifiers = []
        audited_from_ms = 0.0
        for partition in await kafka.partitions(AUDIT):
            tree = str(partition)
            witnessed_heads = [
                (one.size, one.root) for one in signed.setdefault(tree, _SignedHeads()).witnessed
            ]
            witnessed_heads += [earlier_heads[tree]] if earlier_heads and tree in earlier_heads else []
            verifier = ChainVerifier(tree, signed[tree].checkpoints, witnessed_heads)
            began_ms = await _verify_partition(kafka, partition, verifier)
            # The event of an older record may have been removed by its age.
            audited_from_ms = max(audited_from_ms, began_ms if verifier.first > 1 else 0)
            verifiers.append(verifier)
        for verifier in verifiers:
            report.faults += verifier.faults
            report.trees.append(_tree_report(verifier, signed[verifier.tree], settings.trust_domain))
        span_ms = (audited_from_ms, (time.time() - settle_s) * 1000)
        await _check_against_records(kafka, settings, verifiers, report, span_ms)
    return report


async def witness(report: TrailReport, key: SigningKey, settings: ClientSettings | None = None) -> int:
    """Sign the heads of a report without faults, as a user with the role auditor. Returns how many heads.

    Raises UnavailableError if Kafka does not take it, ValueError if the report has faults.
    """
    if report.faults:
        raise ValueError("what has faults is not witnessed")
    settings = load_settings(settings)
    async with Publisher(settings, key.id) as publisher:
        for tree, (size, root) in report.heads.items():
            claims = AuditWitness(
                iss=key.id,
                aud=settings.trust_domain,
                iat=int(time.time()),
                jti=derived_id(AuditWitness.typ, key.id, tree, size, root),
                tree=tree,
                size=size,
                root=root,
            )
            user_id = subject_of(settings.trust_domain, key.id, "user")
            await publisher.publish_signed(AUDIT_CHECKPOINT, f"{tree}/{user_id}", claims, key)
    return len(report.heads)


# --- signed heads ---------------------------------------------------------------------------------------------------


class _CountedStretches(Stretches):
    """Reads stretches, and reports how many records of how many it has read."""

    def __init__(self, settings: ClientSettings, progress: Callable[[int, int], None] | None) -> None:
        super().__init__(settings)
        self._progress = progress
        self._read = self._total = 0

    async def begin(self, topics: Sequence[Topic[Any]]) -> None:
        """Count from now on, out of what these topics hold. An offset of a compacted topic may have no record."""
        if self._progress is None:
            return
        self._read = self._total = 0
        for topic in topics:
            for partition in await self.partitions(topic):
                start, end = await self.bounds(topic, partition)
                self._total += end - start

    async def records(
        self, topic: Topic[Any], partition: int, start: int, end: int
    ) -> AsyncGenerator[Received, None]:
        read_before = self._read
        async for record in super().records(topic, partition, start, end):
            # Offsets are counted, so that all is read in the end where some have no record.
            self._read = read_before + record.offset + 1 - start
            if self._progress is not None and self._read % _TELL_EVERY == 0:
                self._progress(self._read, self._total)
            yield record
        self._read = read_before + max(end - start, 0)
        if self._progress is not None:
            self._progress(self._read, self._total)


async def _load_trust(kafka: Stretches, settings: ClientSettings) -> tuple[TrustStore, Directory]:
    trust = TrustStore(settings.trust_domain, settings.trust_root)
    async for record in kafka.whole(TRUST):
        try:
            trust.load(record.value, time.time())
        except InvalidMessageError:
            continue  # not by the pinned root, or expired
    trust.require()
    directory = Directory(trust, SystemClock(), grace_ms=None)
    async for record in kafka.whole(USER):
        directory.on_records([record])
    return trust, directory


async def _read_signed_heads(
    kafka: Stretches, trust: TrustStore, directory: Directory, report: TrailReport
) -> dict[str, _SignedHeads]:
    heads: dict[str, _SignedHeads] = {}
    async for record in kafka.whole(AUDIT_CHECKPOINT):
        try:
            jws = parse(record.value)
            if jws.header.typ == typ_header(AuditWitness):
                one = _verify_witness(jws, record, directory, trust)
                _check_key(record, f"{one.tree}/{subject_of(trust.trust_domain, one.iss, 'user')}")
                heads.setdefault(one.tree, _SignedHeads()).witnessed.append(one)
            else:
                checkpoint = _verify_checkpoint(jws, record, trust)
                _check_key(record, checkpoint.tree)
                before = heads.setdefault(checkpoint.tree, _SignedHeads()).checkpoints
                _check_monotonic(before, checkpoint)
                before.append(checkpoint)
        except (InvalidMessageError, ChainError, ValueError) as error:
            what = f"what stands on audit.checkpoint at offset {record.offset} is not believed: {error}"
            report.faults.append(Fault("foreign", record.key or "", what, None, None, record.offset))
    return heads


def _check_key(record: Received, key: str) -> None:
    """Check the record's key: compaction keeps the last record of a key, so a foreign one would replace it."""
    if record.key != key:
        raise ValueError(f"it stands under the key {record.key}")


def _check_monotonic(before: Sequence[AuditCheckpoint], checkpoint: AuditCheckpoint) -> None:
    """Refuse a checkpoint that signs fewer events than the one before: a chain only grows."""
    if before and before[-1].size > checkpoint.size:
        raise ValueError(f"it signs {checkpoint.size} events, and {before[-1].size} were signed before it")


def _verify_checkpoint(jws: UnverifiedJws, record: Received, trust: TrustStore) -> AuditCheckpoint:
    claims = verify(
        jws, AuditCheckpoint, trust.finder("audit", at_s=record.appended_at_ms / 1000),
        audience=trust.trust_domain,
    ).claims  # fmt: skip
    Tip.of(claims)
    return claims


def _verify_witness(
    jws: UnverifiedJws, record: Received, directory: Directory, trust: TrustStore
) -> AuditWitness:
    at_ms = record.appended_at_ms
    claims = verify(
        jws, AuditWitness, lambda iss, kid: directory.chains.user_key(iss, kid, at_ms),
        audience=trust.trust_domain,
    ).claims  # fmt: skip
    user_id = subject_of(trust.trust_domain, claims.iss, "user") or ""
    if "auditor" not in directory.chains.roles_at(user_id, at_ms):
        raise InvalidMessageError(f"{user_id} is no auditor", code=Code.NOT_AUDITOR)
    return claims


# --- the events -----------------------------------------------------------------------------------------------------


async def _verify_partition(kafka: Stretches, partition: int, verifier: ChainVerifier) -> int:
    """Verify one partition. Returns the time of its first event in ms, or 0 if it has none."""
    began_ms: int | None = None
    async for record in kafka.records(AUDIT, partition, *await kafka.bounds(AUDIT, partition)):
        began_ms = began_ms if began_ms is not None else record.appended_at_ms
        verifier.take(record.value, record.offset)
    verifier.finish()
    retention_ms = (AUDIT.retention_s or 0) * 1000 * _RETENTION_TOLERANCE
    if verifier.first > 1 and began_ms is not None and began_ms > time.time() * 1000 - retention_ms:
        what = (
            f"the events before event {verifier.first} are not there, and were not old enough to be removed"
        )
        verifier.faults.append(Fault("removed", verifier.tree, what, 1))
    return began_ms or 0


def _tree_report(verifier: ChainVerifier, signed: _SignedHeads, trust_domain: str) -> TreeReport:
    last = max(signed.checkpoints, key=lambda one: one.size, default=None)
    witnesses = {subject_of(trust_domain, one.iss, "user") or "" for one in signed.witnessed}
    return TreeReport(
        verifier.tree,
        verifier.first,
        verifier.last,
        verifier.unchained,
        last.size if last else 0,
        last.root if last else None,
        tuple(sorted(witnesses)),
    )


# --- the audited records --------------------------------------------------------------------------------------------


async def _check_against_records(
    kafka: Stretches,
    settings: ClientSettings,
    verifiers: Sequence[ChainVerifier],
    report: TrailReport,
    span_ms: tuple[float, float],
) -> None:
    """Check that each record in a time span has an event, and each event a record unless retention removed it."""
    audited_uids = {uid for verifier in verifiers for uid in verifier.sources}
    audited_offsets = _offsets_by_partition(
        source for verifier in verifiers for source in verifier.sources.values()
    )
    first_offsets = [
        _first_offsets(verifier.sources.values()) for verifier in verifiers if verifier.first > 1
    ]
    for topic in AUDITED:
        for partition in await kafka.partitions(topic):
            source_partition = (topic.name(settings.topic_prefix), partition)
            start, end = await kafka.bounds(topic, partition)
            present: set[int] = set()
            async for record in kafka.records(topic, partition, start, end):
                present.add(record.offset)
                source = Source(*source_partition, record.offset)
                if span_ms[0] <= record.appended_at_ms < span_ms[1] and source.uid not in audited_uids:
                    report.faults.append(_record_fault(source, "missing", "no event is about"))
            report.records += len(present)
            audited = audited_offsets.pop(source_partition, set())
            if not topic.compacted:
                report.faults += _unaudited_records(
                    source_partition, audited, _expected_from(source_partition, first_offsets, start), start
                )
            for offset in sorted(audited - present):
                # On a compacted topic a record may be gone; one beyond the end never existed.
                if offset >= end or (offset >= start and not topic.compacted):
                    report.faults.append(
                        _record_fault(Source(*source_partition, offset), "invented", "no record stands at")
                    )
    for source_partition, offsets in audited_offsets.items():
        for offset in sorted(offsets):
            report.faults.append(
                _record_fault(Source(*source_partition, offset), "invented", "nothing is audited at")
            )


def _expected_from(
    source_partition: tuple[str, int], first_offsets: Sequence[dict[tuple[str, int], int]], start: int
) -> int:
    """The first offset of a partition whose record must still have an event.

    `first_offsets`: of each chain whose first events were removed, the lowest audited offset of each partition. A chain
    that names no record of this partition says nothing about it: then only records from `start` on can be checked.
    """
    return max((firsts.get(source_partition, start) for firsts in first_offsets), default=0)


def _unaudited_records(
    source_partition: tuple[str, int], audited: set[int], begin: int, start: int
) -> Iterator[Fault]:
    """Yield faults for records that were deleted before they were audited.

    Offsets have no gaps, so missing ones show.
    """
    for first, last in offset_gaps(audited, begin, start):
        which = f" to {last}" if last > first else ""
        yield _record_fault(Source(*source_partition, first), "missing", "gone without an event:", which)


def offset_gaps(offsets: Iterable[int], begin: int, until: int) -> Iterator[tuple[int, int]]:
    """Yield the first and last of each run of missing offsets from `begin` to before `until`."""
    at = begin
    for offset in sorted(offset for offset in {*offsets, until} if begin <= offset <= until):
        if offset > at:
            yield at, offset - 1
        at = offset + 1


def _record_fault(source: Source, kind: FaultKind, what: str, which: str = "") -> Fault:
    position = f"{source.topic_name}/{source.partition}@{source.offset}{which}"
    return Fault(kind, "", f"{what} {position}", None, source.uid, source.offset)


def _first_offsets(sources: Iterable[Source]) -> dict[tuple[str, int], int]:
    """Return the lowest offset of each partition among the sources."""
    return {
        source_partition: min(offsets) for source_partition, offsets in _offsets_by_partition(sources).items()
    }


def _offsets_by_partition(sources: Iterable[Source]) -> dict[tuple[str, int], set[int]]:
    offsets: dict[tuple[str, int], set[int]] = {}
    for source in sources:
        offsets.setdefault((source.topic_name, source.partition), set()).add(source.offset)
    return offsets


def read_heads(text: str | bytes) -> Heads:
    """Parse a heads file that `audit verify` wrote. Raises UnavailableError if it is none."""
    try:
        return HEADS.validate_json(text)
    except ValueError:
        raise UnavailableError("the file of heads is none that `audit verify` wrote; name another") from None
