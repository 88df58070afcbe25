"""The directory: a verified local table of users, agents, targets and tasks, which every service holds.

A record is admitted if the registry's signature holds and its revision is not lower than the known one. Its command
chain is verified on first use: start-up then costs one signature per record, and records may arrive in any order. A
record that does not verify counts as missing, and looking it up says why. Heartbeats of the registry with digests of
its tables show whether the directory is complete and fresh.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar, cast

from ringfence.kernel.base.clock import Clock, RemoteClock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.keys import PublicKey, valid_key
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.messages.codes import AnyCode, Code, ReceivedCode
from ringfence.messages.credential import Coordinates, Reason
from ringfence.messages.operations import Heartbeat, PartitionDigest
from ringfence.messages.registry import (
    AgentRecord,
    AgentState,
    AnyRecord,
    AnyState,
    Command,
    EmbeddedCommand,
    Role,
    TargetRecord,
    TargetState,
    TaskRecord,
    TaskState,
    UserRecord,
    UserState,
)
from ringfence.messages.topics import AGENT, HEARTBEAT, RUN, TARGET, TASK, USER
from ringfence.model.identity.spiffe_ids import SubjectKind, subject_of
from ringfence.model.lifecycle import (
    NO_HISTORY,
    Giver,
    KeyHistory,
    KeyOrigin,
    check_hold,
    held_keys,
    is_compared,
    is_minor_for_user,
    may_be_dropped,
)
from ringfence.model.records.command_chain import ChainError, Chains, unverified_command
from ringfence.model.records.runs import RunTable
from ringfence.model.records.user_keys import user_key
from ringfence.model.verdict import ALLOWED, Allowed, Refused, Verdict, refused

if TYPE_CHECKING:  # rules look things up here, and import nothing that does I/O
    from ringfence.kernel.kafka.record import Received

log = logging.getLogger(__name__)

TABLES = (USER, AGENT, TARGET, TASK, HEARTBEAT)
"""The topics that feed a directory."""
RUN_TABLES = (*TABLES, RUN)
"""Those and the topic of runs, for services that deny instances of runs that are over."""

S = TypeVar("S", bound=AnyState)
_RECORDS: dict[SubjectKind, type[AnyRecord]] = {
    "user": UserRecord,
    "agent": AgentRecord,
    "target": TargetRecord,
    "task": TaskRecord,
}
_REMEMBERED_DIGESTS = 10_000
_MAX_AWAITING_TRUST = 1_000
_CLOCKS_DIFFER_MS = 60_000
"""A heartbeat whose time differs more than this from its append time counts as an old one that was replayed."""


@dataclass(frozen=True, slots=True, eq=False)
class VerifiedRecord(Generic[S]):
    """A verified record: its state, its revision, and the record as it was signed.

    It equals only itself, so that results can be cached by it.
    """

    state: S
    revision: int
    record: AnyRecord
    compact: bytes = b""

    @property
    def named_revision(self) -> int:
        """The revision that approvals, grants, decisions, proposals and commands name.

        Minor changes are not counted, since they change nothing that a person decides on.
        """
        return self.revision - self.minor

    @property
    def minor(self) -> int:
        """How many minor changes there were: renewals of an agent's key, and what a user's record says."""
        if isinstance(self.record, UserRecord):
            return self.record.minor
        return len(self.state.renewed) if isinstance(self.state, AgentState) else 0


@dataclass(frozen=True, slots=True)
class Alarm:
    """Something on a record topic that an honest registry does not do."""

    code: AnyCode
    message: str
    subject: str
    """The SPIFFE ID of the record's subject, or the key of the Kafka record."""
    source: Coordinates | None


@dataclass(slots=True)
class _Slot:
    record: AnyRecord
    compact: bytes
    source: Coordinates | None = None
    verified: bool = False
    broken: ChainError | None = None
    broken_as_of: int = -1
    """The number of admitted records when the chain was found broken: a signer or a parent may have come since."""
    entry: VerifiedRecord[AnyState] = field(init=False)
    """The entry that callers get: always the same object, once the record is verified."""

    def __post_init__(self) -> None:
        self.entry = VerifiedRecord(self.record.state, self.record.revision, self.record, self.compact)


@dataclass(slots=True)
class _Part:
    """The digest of one partition, and its recent digests: a heartbeat may be a little older than the table."""

    count: int = 0
    value: int = 0
    recent: deque[tuple[int, int]] = field(
        default_factory=lambda: deque([(0, 0)], maxlen=_REMEMBERED_DIGESTS)
    )
    expected: tuple[int, int] | None = None
    expected_at_ms: int = 0
    confirmed_at_ms: int = 0

    def change(self, added: int, removed: int) -> None:
        self.value ^= added ^ removed
        self.count += (added != 0) - (removed != 0)
        self.recent.append((self.count, self.value))
        if self.expected == (self.count, self.value):
            self.confirmed_at_ms = max(self.confirmed_at_ms, self.expected_at_ms)

    def compare(self, expected: tuple[int, int], at_ms: int) -> None:
        self.expected, self.expected_at_ms = expected, at_ms
        if expected in self.recent:
            self.confirmed_at_ms = max(self.confirmed_at_ms, at_ms)


class Directory:
    """Users, agents, targets and tasks, as the registry's records and their command chains say."""

    def __init__(
        self,
        trust: TrustStore,
        clock: Clock,
        *,
        grace_ms: int | None,
        on_alarm: Callable[[Alarm], None] = lambda alarm: None,
    ) -> None:
        """`grace_ms` is how old the last matching heartbeat may be before the table denies; None disables the check."""
        self._trust = trust
        self._clock = clock
        self._grace_ms = grace_ms
        self._on_alarm = on_alarm
        self.runs = RunTable(trust)
        """The runs, if the topics in `RUN_TABLES` are read. Otherwise none is there, and no instance of any may act."""
        self._slots: dict[SubjectKind, dict[str, _Slot]] = {"user": {}, "agent": {}, "target": {}, "task": {}}
        self._parts: dict[tuple[str, int], _Part] = {}
        self._listeners: list[Callable[[SubjectKind, str], None]] = []
        self.version = 0
        """Changes with each admitted record, and with what is read of runs."""
        self._admitted_count = 0
        self._displaced: set[tuple[SubjectKind, str]] = set()
        self._own: set[tuple[str, int, int]] = set()
        """Positions of records that this registry published and admitted, and that it has not read back yet."""
        self._read_to: dict[tuple[str, int], int] = {}
        self._last_beat_ms = 0
        self._last_beat_appended_ms = 0
        self._broker = RemoteClock()
        self._oldest: tuple[int, str] | None = None
        """Append time and topic of the partition confirmed longest ago; None if it has to be computed."""
        self._trust_version = trust.version
        self._awaiting_trust: deque[Received] = deque(maxlen=_MAX_AWAITING_TRUST)
        """Records signed by keys that the trust bundle does not have: the next bundle may have them."""
        self._chains = Chains(trust, self._unverified_user, self.unverified)

    @property
    def trust(self) -> TrustStore:
        """The trust store that verifies the registry's signatures."""
        return self._trust

    @property
    def versions(self) -> tuple[int, int | None]:
        """Changes with each admitted record and each trust bundle. Caches that depend on both use it as their
        version.
        """
        return self.version, self._trust.version

    @property
    def chains(self) -> Chains:
        """The verifier of commands, with the trust bundle in force now."""
        self._apply_trust_changes()
        return self._chains

    # --- input ---

    def on_records(self, records: Sequence[Received]) -> None:
        """Admit records from the topics in `RUN_TABLES`, those of one call from one topic."""
        self._apply_trust_changes()
        if records and records[0].topic is RUN:
            self.runs.on_records(records)
            self.version += 1
            return
        for record in records:
            if record.topic is HEARTBEAT:
                self._on_heartbeat(record)
            else:
                self._on_record(record)

    def _apply_trust_changes(self) -> None:
        """If another trust bundle is in force, verify again what the former one verified."""
        if self._trust_version == self._trust.version:
            return
        self._trust_version = self._trust.version
        self._chains.forget()
        for slots in self._slots.values():
            for slot in slots.values():
                slot.verified, slot.broken = False, None
        self.runs.on_records(())
        unbelieved, self._awaiting_trust = self._awaiting_trust, deque(maxlen=_MAX_AWAITING_TRUST)
        for record in unbelieved:
            self._on_record(record)

    def on_change(self, listener: Callable[[SubjectKind, str], None]) -> None:
        """Call `listener` with (kind, id) after each admitted record."""
        self._listeners.append(listener)

    def admit(
        self,
        kind: SubjectKind,
        topic_name: str,
        partition: int,
        compact: bytes,
        at_ms: int,
        source: Coordinates | None = None,
        key: str | None = None,
    ) -> Verdict:
        """Admit one record, unless one of these checks fails.

        1. The registry signed it.
        2. It is about a subject of its kind, and of this trust domain.
        3. Its subject's id is `key`, if that is given.
        4. Its revision is higher than the known one. The same record again, perhaps signed anew, changes nothing.
        5. Its commands continue those of the known record.
        6. It counts as minor only changes of a user that are.

        `key` is the Kafka key, if it has to equal the id. Otherwise compaction would let a record replace another
        subject's.
        """
        try:
            record: AnyRecord = verify(
                parse(compact), _RECORDS[kind], self._trust.finder(*_RECORDS[kind].signed_by, at_s=at_ms / 1000),
                audience=self._trust.trust_domain,
            ).claims  # fmt: skip
        except InvalidMessageError as error:
            return Refused(Reason(code=error.code, message=str(error)[:2048]))
        id = subject_of(self._trust.trust_domain, record.sub, kind)
        if id is None:
            return refused(Code.WRONG_SUBJECT, f"{record.sub} is no {kind}")
        if key is not None and key != id:
            return refused(Code.WRONG_KEY, f"the record of {record.sub} stands under the key {key}")
        slot = self._slots[kind].get(id)
        if slot is not None:
            if record == slot.record:
                return ALLOWED
            if record.revision <= slot.record.revision:
                known = slot.record.revision
                message = f"{record.sub} has revision {known}, this says {record.revision}"
                return refused(Code.REVISION_FELL, message)
            history = _check_history(record, slot.record.commands, self._trust)
            if isinstance(history, Refused):
                return history
            if isinstance(fell := _check_minor(slot.record, record), Refused):
                return fell
        self._slots[kind][id] = _Slot(record, compact, source)
        self.version += 1
        if kind != "target":  # other records may rest on it
            self._admitted_count += 1
        # The first record at all: the last heartbeat confirmed its absence by not naming the partition.
        part = self._parts.setdefault(
            (topic_name, partition), _Part(confirmed_at_ms=self._last_beat_appended_ms)
        )
        part.change(_record_hash(id, record.revision), _record_hash(id, slot.record.revision) if slot else 0)
        self._oldest = None
        for listener in self._listeners:
            listener(kind, id)
        return ALLOWED

    def take_own(self, kind: SubjectKind, compact: bytes, at: Coordinates) -> Verdict:
        """Admit a record that this registry has just published (`admit`).

        The registry may publish a newer record of the subject before it reads this one back. The older record then is
        not a replay by somebody else.
        """
        verdict = self.admit(kind, at.topic, at.partition, compact, at.appended_at_ms, at)
        if isinstance(verdict, Allowed) and at.offset > self._read_to.get((at.topic, at.partition), -1):
            self._own.add((at.topic, at.partition, at.offset))
        return verdict

    def _on_record(self, record: Received) -> None:
        kind = cast(SubjectKind, record.topic.what)
        verdict = ALLOWED if self._is_own(record) else self._admit(kind, record)
        key = record.key or ""
        if isinstance(verdict, Allowed):
            self._displaced.discard((kind, key))
            return
        if key in self._slots[kind]:
            self._displaced.add((kind, key))
        code, message = verdict.reason.code, verdict.reason.message
        if code == Code.KEY_UNKNOWN:
            self._awaiting_trust.append(record)
        log.error(
            "refused a %s record at %d@%d: %s: %s",
            record.topic.what,
            record.partition,
            record.offset,
            code,
            message,
            extra=rate_limited(record.topic_name, code),
        )
        subject = f"spiffe://{self._trust.trust_domain}/{kind}/{key}"
        self._on_alarm(Alarm(ReceivedCode(code), message, subject, record.coordinates))

    def _is_own(self, record: Received) -> bool:
        """Whether this record was admitted when it was published. True once for each."""
        position = (record.topic_name, record.partition, record.offset)
        self._read_to[position[:2]] = record.offset
        if position not in self._own:
            return False
        self._own.remove(position)
        return True

    def _admit(self, kind: SubjectKind, record: Received) -> Verdict:
        if not record.value:
            return refused(Code.TOMBSTONE, "a record was deleted, which no registry does")
        key = record.key or ""
        slot = self._slots[kind].get(key)
        if slot is not None and slot.compact == record.value:
            return ALLOWED
        return self.admit(
            kind, record.topic_name, record.partition, record.value, record.appended_at_ms,
            record.coordinates, key,
        )  # fmt: skip

    def _on_heartbeat(self, record: Received) -> None:
        try:
            heartbeat = verify(
                parse(record.value), Heartbeat, self._trust.finder("registry", at_s=record.appended_at_ms / 1000),
                audience=self._trust.trust_domain,
            ).claims  # fmt: skip
        except InvalidMessageError:
            return  # other services' heartbeats are on the topic too
        # A heartbeat that a writer to the topic replays must not make an old table look fresh.
        if heartbeat.at_ms <= self._last_beat_ms:
            return
        if abs(heartbeat.at_ms - record.appended_at_ms) > _CLOCKS_DIFFER_MS:
            log.error(
                "a heartbeat of the registry is not of now: repeated, or its clock is wrong",
                extra=rate_limited(record.topic_name),
            )
            return
        self._last_beat_ms = heartbeat.at_ms
        self._last_beat_appended_ms = record.appended_at_ms
        self._broker.observe(record.appended_at_ms)
        self._oldest = None
        for table in heartbeat.tables:
            part = self._parts.setdefault((table.topic, table.partition), _Part())
            part.compare((table.count, int(table.digest, 16)), record.appended_at_ms)

    # --- look-up ---

    def entry(self, kind: SubjectKind, id: str) -> VerifiedRecord[AnyState] | None:
        """The verified record of a subject; None if there is none. Raises ChainError if its chain is broken."""
        return self._entry(kind, id)

    def user(self, user_id: str) -> VerifiedRecord[UserState] | None:
        """The verified record of a user; None if there is none. Raises ChainError."""
        return cast("VerifiedRecord[UserState] | None", self._entry("user", user_id))

    def agent(self, agent_id: str) -> VerifiedRecord[AgentState] | None:
        """The verified record of an agent; None if there is none. Raises ChainError."""
        return cast("VerifiedRecord[AgentState] | None", self._entry("agent", agent_id))

    def target(self, target_id: str) -> VerifiedRecord[TargetState] | None:
        """The verified record of a target; None if there is none. Raises ChainError."""
        return cast("VerifiedRecord[TargetState] | None", self._entry("target", target_id))

    def task(self, task_id: str) -> VerifiedRecord[TaskState] | None:
        """The verified record of a task; None if there is none. Raises ChainError."""
        return cast("VerifiedRecord[TaskState] | None", self._entry("task", task_id))

    def entries(self, kind: SubjectKind, prefix: str = "") -> Iterator[VerifiedRecord[AnyState]]:
        """All verified records of a kind whose ids begin so, sorted by id. Records with a broken chain are left out."""
        return self._verified(kind, (id for id in self._slots[kind] if id.startswith(prefix)))

    def entries_since(self, kind: SubjectKind, since_ms: int) -> Iterator[VerifiedRecord[AnyState]]:
        """As `entries`, of records that have a command of `since_ms` (append time) or later. No others are verified:
        after a start, verifying all takes minutes where there are very many.
        """
        return self._verified(
            kind,
            (
                id
                for id, slot in self._slots[kind].items()
                if slot.record.commands[-1].appended_at_ms >= since_ms
            ),
        )

    def users_with(self, *roles: Role) -> list[str]:
        """The ids of the users who have one of these roles by their record, sorted. The records are not verified yet:
        look each up with `user`.
        """
        return sorted(
            id
            for id, slot in self._slots["user"].items()
            if not set(roles).isdisjoint(cast(UserState, slot.record.state).roles)
        )

    def agents_of(self, sponsor: str) -> Iterator[VerifiedRecord[AgentState]]:
        """The verified records of the agents that a user sponsors, sorted by id. Records with a broken chain are left
        out.

        Only these agents' records are verified: after a start, or a new trust bundle, verifying all takes minutes where
        there are very many.
        """
        own = (
            id
            for id, slot in self._slots["agent"].items()
            if cast(AgentState, slot.record.state).sponsor == sponsor
        )
        return cast("Iterator[VerifiedRecord[AgentState]]", self._verified("agent", own))

    def agent_key(self, iss: str, kid: str, at_s: float) -> PublicKey | None:
        """The key `kid` of the agent `iss` if it is valid at `at_s` (seconds), whatever the agent's status. Raises
        ChainError.

        A key that a compromised key gave is valid no more, also before somebody ends it (ADR 0087).
        """
        agent_id, entry = subject_of(self._trust.trust_domain, iss, "agent"), self._agent_of(iss)
        found = self.held_agent_key(iss, kid, at_s)
        if found is None or agent_id is None:
            return None
        origin = self.agent_key_history(agent_id).origins.get(kid)
        if origin is None or entry is None or kid in held_keys(entry.state) or self.compromised_giver(origin):
            return None
        return found

    def held_agent_key(self, iss: str, kid: str, at_s: float) -> PublicKey | None:
        """As `agent_key`, also if the key rests on a compromised one. To answer its holder, never to allow anything."""
        entry = self._agent_of(iss)
        return valid_key(entry.state.keys, kid, at_s) if entry else None

    def _agent_of(self, iss: str) -> VerifiedRecord[AgentState] | None:
        agent_id = subject_of(self._trust.trust_domain, iss, "agent")
        return self.agent(agent_id) if agent_id else None

    def user_key(self, iss: str, kid: str, at_s: float) -> VerificationKey | None:
        """The key `kid` of the active user `iss` if it is valid at `at_s` (seconds), by the present record. Raises
        ChainError.

        A provisioner is not a user: it only signs commands, which the registry verifies.
        """
        user_id = subject_of(self._trust.trust_domain, iss, "user")
        entry = self.user(user_id) if user_id else None
        return self.key_of(entry.state, kid, at_s) if entry and entry.state.status == "active" else None

    def key_of(self, user: UserState, kid: str, at_s: float) -> VerificationKey | None:
        """As `user_key`, for a user whose present state is known, and whatever their status.

        A key that ended and was added again is valid from then on alone: what it signed in between counts for nothing.
        """
        found = user_key(user.keys, kid, at_s, self._trust) if user.delegation is None else None
        if found is None or at_s * 1000 < self.key_history(user.user_id).added_again_ms(kid):
            return None
        return found

    def key_history(self, user_id: str) -> KeyHistory:
        """Where the keys of a user come from, by the present record; nothing if there is no such user. Raises
        ChainError.
        """
        return self._chains.key_history(user_id) if self.user(user_id) is not None else NO_HISTORY

    def agent_key_history(self, agent_id: str) -> KeyHistory:
        """Where the keys of an agent come from, by the present record. Raises ChainError."""
        return self._chains.agent_key_history(agent_id) if self.agent(agent_id) is not None else NO_HISTORY

    def compromised_giver(self, origin: KeyOrigin) -> Giver | None:
        """The key on whose word another rests, and that may have been in other hands when it gave it; None if there is
        none. A giver whose record does not verify counts as compromised.
        """
        for giver in sorted(origin.givers):
            try:
                entry = self.user(giver.user_id)
            except ChainError:
                return giver
            since_ms = (entry.state.compromised or {}).get(giver.kid) if entry else 0
            if since_ms is not None and giver.at_ms >= since_ms:
                return giver
        return None

    def check_vouchers(self, iss: str, kid: str) -> Verdict:
        """Check that neither the key `kid` of the user or agent `iss` nor their record rests on a compromised key.

        A key that does gives nothing more, also before somebody ends it (ADR 0087). Raises ChainError.
        """
        user_id, agent_id = (subject_of(self._trust.trust_domain, iss, kind) for kind in ("user", "agent"))
        entry = self.user(user_id) if user_id else self.agent(agent_id or "")
        if entry is not None and isinstance(verdict := check_hold(entry.state, kid), Refused):
            return verdict
        history = self.key_history(user_id) if user_id else self.agent_key_history(agent_id or "")
        origin = history.origins.get(kid)
        giver = self.compromised_giver(origin) if origin is not None else None
        if giver is None:
            return ALLOWED
        id = user_id or agent_id
        message = f"key {kid} of {id} rests on key {giver.kid} of {giver.user_id}, which was compromised then"
        return refused(Code.KEY_VOUCHER_COMPROMISED, message)

    def target_key(self, iss: str, kid: str, at_s: float) -> PublicKey | None:
        """The key `kid` of the resource server of target `iss` if it is valid at `at_s` (seconds). Raises
        ChainError.
        """
        target_id = subject_of(self._trust.trust_domain, iss, "target")
        entry = self.target(target_id) if target_id else None
        return valid_key(entry.state.keys, kid, at_s) if entry else None

    def unverified(self, kind: SubjectKind, id: str) -> AnyRecord | None:
        """A record whose chain may not be verified yet. Use it for indexes that can only refuse, never to allow."""
        slot = self._slots[kind].get(id)
        return slot.record if slot else None

    def displaced(self) -> list[tuple[SubjectKind, str]]:
        """Subjects whose record is not the last one under its key on the topic, so that compaction would delete it."""
        return sorted(self._displaced)

    def unmatched(self) -> list[str]:
        """Partitions that differ from the digest in the last heartbeat, with their own digest."""
        return [
            f"{topic}/{partition} holds {part.count} ids, digest {part.value:064x}"
            for (topic, partition), part in sorted(self._parts.items())
            if part.expected is not None and part.confirmed_at_ms < part.expected_at_ms
        ]

    def stale(self) -> str | None:
        """The reason if this table must deny, else None: no heartbeat of the registry matched it within the grace."""
        if self._grace_ms is None:
            return None
        if expired := self._trust.expired(self._clock.now_ms() / 1000):
            return expired
        if not self._last_beat_ms:
            return "no heartbeat of the registry was seen yet"
        if self._oldest is None:
            confirmed = [(part.confirmed_at_ms, topic) for (topic, _), part in self._parts.items()]
            # Before the first record at all, the heartbeat confirms that there is none.
            self._oldest = min(confirmed, default=(self._last_beat_appended_ms, "records"))
        oldest_ms, name = self._oldest
        # Our own clock may be set back, which must not make an old table look fresh.
        age_ms = max(self._clock.now_ms(), self._broker.now_ms()) - oldest_ms
        if age_ms <= self._grace_ms:
            return None
        if not oldest_ms:
            return f"the local table of {name} was never what the registry says that it is"
        return f"the local table of {name} was last confirmed by the registry {age_ms} ms ago"

    def digests(self) -> tuple[PartitionDigest, ...]:
        """The digests of all partitions, for the registry's heartbeat."""
        return tuple(
            PartitionDigest(topic=topic, partition=partition, count=part.count, digest=f"{part.value:064x}")
            for (topic, partition), part in sorted(self._parts.items())
        )

    def _entry(self, kind: SubjectKind, id: str) -> VerifiedRecord[AnyState] | None:
        self._apply_trust_changes()
        slot = self._slots[kind].get(id)
        if slot is None:
            return None
        if not slot.verified:
            self._verify(slot)
        return slot.entry

    def _verified(self, kind: SubjectKind, ids: Iterable[str]) -> Iterator[VerifiedRecord[AnyState]]:
        for id in sorted(ids):
            try:
                entry = self._entry(kind, id)
            except ChainError:
                continue
            if entry is not None:
                yield entry

    def _verify(self, slot: _Slot) -> None:
        if slot.broken is not None and slot.broken_as_of == self._admitted_count:
            raise slot.broken
        try:
            self._chains.verify(slot.record)
        except ChainError as error:
            if error.code == Code.CHAIN_INCOMPLETE:
                log.info("the record of %s does not count yet: %s", slot.record.sub, error)
            elif slot.broken is None or slot.broken.code == Code.CHAIN_INCOMPLETE:
                log.error("the record of %s counts for nothing: %s", slot.record.sub, error)
                self._on_alarm(Alarm(error.code, str(error), slot.record.sub, slot.source))
            slot.broken, slot.broken_as_of = error, self._admitted_count
            raise
        slot.verified, slot.broken = True, None

    def _unverified_user(self, user_id: str) -> UserRecord | None:
        slot = self._slots["user"].get(user_id)
        return cast(UserRecord, slot.record) if slot else None


def _check_minor(known: AnyRecord, record: AnyRecord) -> Verdict:
    """Check that a newer record of a user counts as minor only changes that are. If revisions in between are missing,
    its registry is believed.
    """
    if not (isinstance(known, UserRecord) and isinstance(record, UserRecord)):
        return ALLOWED
    more, revisions = record.minor - known.minor, record.revision - known.revision
    if 0 <= more <= revisions and not (
        revisions == more == 1 and not is_minor_for_user(known.state, record.state)
    ):
        return ALLOWED
    message = (
        f"revision {record.revision} of {record.sub} counts {record.minor} minor changes, and has others"
    )
    return refused(Code.REVISION_FELL, message)


def _check_history(record: AnyRecord, known: Sequence[EmbeddedCommand], trust: TrustStore) -> Verdict:
    """Check that the commands of a newer record continue those of the known one.

    A registry may append commands, and drop commands that later ones made irrelevant (`may_be_dropped`); nothing else.
    So it can leave out no suspension, register no name a second time, and slip in no command.
    """
    what, new = f"revision {record.revision} of {record.sub}", record.commands
    new_commands = {_identity(command) for command in new}
    kept: list[EmbeddedCommand] = []
    try:
        for command in known:
            if _identity(command) in new_commands:
                kept.append(command)
                continue
            before = unverified_command(kept[-1]) if kept else None
            later = new[len(kept) :]
            after = [unverified_command(one) for one in later]
            known_of = {(claims.iss, claims.jti): one for claims, one in zip(after, later, strict=True)}

            def compared(claims: Command, known_of: Any = known_of) -> bool:
                return compared_command(claims, known_of[claims.iss, claims.jti], record.state, trust)

            if not may_be_dropped(unverified_command(command), before, after, compared):
                message = f"{what} leaves out a command of {command.appended_at_ms} ms that still counts"
                return refused(Code.HISTORY_CHANGED, message)
    except InvalidMessageError as error:
        return refused(Code.HISTORY_CHANGED, f"{what} embeds what is no command: {error}")
    added = new[len(kept) :]
    if list(new[: len(kept)]) != kept or any(c.appended_at_ms < known[-1].appended_at_ms for c in added):
        return refused(
            Code.HISTORY_CHANGED, f"{what} changes the order of its commands, or adds to their past"
        )
    return ALLOWED


def compared_command(command: Command, embedded: EmbeddedCommand, state: AnyState, trust: TrustStore) -> bool:
    """Return whether a command in a record counts only because it narrows what those before it gave.

    `state` is that of the record: it names a user's provisioner. It need not be verified, because one that lies does
    not verify later.
    """
    provisioned = state.provisioned if isinstance(state, UserState) else None
    by = subject_of(trust.trust_domain, command.iss, "user")
    alone = command.iss == trust.root_id or (provisioned is not None and provisioned.by == by)
    mode = trust.second_person(embedded.appended_at_ms / 1000)
    return is_compared(command, embedded.second, mode, alone=alone)


def _identity(command: EmbeddedCommand) -> tuple[object, ...]:
    second = command.second
    return (command.jws, command.appended_at_ms, second and (second.jws, second.proposed_at_ms))


def _record_hash(id: str, revision: int) -> int:
    return int.from_bytes(hashlib.sha256(f"{id}@{revision}".encode()).digest())
