"""Command handler of the registry: takes signed commands, publishes records, events and heartbeats."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from typing import Any

from aiokafka.errors import KafkaError

from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.base.ids import derived_id, digest
from ringfence.kernel.base.retry import run_periodically
from ringfence.kernel.crypto.jws import parse, sign, verify
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import Topic
from ringfence.messages.codes import AnyCode, Code
from ringfence.messages.credential import Coordinates, Reason
from ringfence.messages.operations import EventKind, EventSubject, Heartbeat, ServiceEvent
from ringfence.messages.registry import (
    PROPOSAL_COMMANDS,
    AgentRecord,
    AgentRenewKey,
    AgentReportReuse,
    AnyRecord,
    CommandSecond,
    CommandWithdraw,
    TargetRecord,
    TaskAssign,
    TaskDelegate,
    TaskRecord,
    TaskState,
    UserAddKey,
    UserRecord,
    UserSet,
)
from ringfence.messages.topics import AGENT, HEARTBEAT, TARGET, TASK, TRUST, USER
from ringfence.messages.trust import TrustBundle
from ringfence.model.identity.spiffe_ids import SubjectKind, subject_of
from ringfence.model.lifecycle import CommandRefusedError, KeyOrigin, command_subject, widens
from ringfence.model.records.command_chain import Authorised, ChainError
from ringfence.model.records.directory import Alarm, Directory
from ringfence.model.records.seconders import independent_operators
from ringfence.model.verdict import Refused
from ringfence.registry.domain import (
    Change,
    Subject,
    Waits,
    changes_elsewhere,
    check_apart,
    check_size,
    decide,
)
from ringfence.registry.proposals import Proposals, ProposalTable, author_of, proposal_digest
from ringfence.registry.store import Memory

log = logging.getLogger(__name__)

TOPICS: dict[SubjectKind, Topic[Any]] = {"user": USER, "agent": AGENT, "target": TARGET, "task": TASK}
RECORDS: dict[SubjectKind, Any] = {
    "user": UserRecord,
    "agent": AgentRecord,
    "target": TargetRecord,
    "task": TaskRecord,
}
_CATCH_UP_S = 5.0
_FINDINGS = frozenset({Code.KEY_TAKEN, Code.KEY_REUSED_LATE})
"""Refusals that are findings as well: two subjects use one key, and whoever holds it could pass as either; or an old
copy of a key is somewhere.
"""


class Registry:
    """Handles commands one after the other; see `on_command`."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        memory: Memory,
        on_alarm: Callable[[Alarm], None] = lambda alarm: None,
        on_finding: Callable[[ServiceEvent], None] = lambda event: None,
        proposals: ProposalTable | None = None,
    ) -> None:
        """`on_finding` receives each recent finding of a registry when its own events are read back.

        `proposals`: those on the topic; None: none so far.
        """
        self._runtime = runtime
        self._directory = directory
        self._memory = memory
        self._on_alarm = on_alarm
        self._on_finding = on_finding
        self.proposals = Proposals(runtime, directory, proposals or ProposalTable(runtime.trust))
        self._compared = False
        self.history: Follower | None = None
        """The reader of this registry's own events. The wiring sets it."""
        self.on_own_event: Callable[[ServiceEvent], None] = lambda event: None

    # --- commands ---

    async def on_command(self, record: Received) -> None:
        """Handle one command to its end: publish a record if something changes, and the signed answer.

        Raises InvalidMessageError if no known signer signed the command, and UnavailableError if the trust bundle lacks
        this registry's key.
        """
        self._require_own_key()
        try:
            authorised = self._directory.chains.authorise(parse(record.value), record.appended_at_ms)
        except ChainError as error:
            raise InvalidMessageError(f"its signer cannot be believed: {error}", code=error.code) from None
        iss, jti = authorised.claims.iss, authorised.claims.jti
        handled = self._memory.place(iss, jti)
        if handled is not None:
            if not _same_place(handled, record.coordinates):
                await self._answer("replayed", authorised, record, _first_at(handled))
            return
        embedded = self._memory.embedded(iss, jti)
        if embedded is not None:
            signed = embedded.jws if embedded.second is None else embedded.second.jws
            if (signed, embedded.appended_at_ms) != (authorised.signed.compact, record.appended_at_ms):
                await self._answer(
                    "replayed", authorised, record, f"handled before, at {embedded.appended_at_ms} ms"
                )
                return
            # The process ended after the record and before the answer.
            if embedded.second is not None:
                await self._handle_about_proposal(authorised, record)
                self._memory.remember(iss, jti, record.coordinates)
                return
            await self._publish_elsewhere(authorised, record.traceparent)
            await self._report_added_keys(authorised, record)
            await self._answer_done(authorised, record, changed=True)
        elif isinstance(authorised.signed.claims, PROPOSAL_COMMANDS):
            await self._handle_about_proposal(authorised, record)
        else:
            await self._handle(authorised, record)
        self._memory.remember(iss, jti, record.coordinates)
        await self.proposals.settle(record.appended_at_ms + 1)

    async def _handle(self, authorised: Authorised, record: Received) -> None:
        subject = command_subject(authorised.claims, authorised.command_id)
        try:
            change = self._decide(subject, authorised)
            if isinstance(change, Waits):
                message = await self.proposals.propose(authorised, change, record.traceparent)
                await self._answer("proposed", authorised, record, message, Code.SECOND_MISSING)
                return
            if change is not None:
                await self._publish(subject, change, authorised, record.traceparent)
            await self._publish_elsewhere(authorised, record.traceparent)
        except (CommandRefusedError, ChainError) as error:
            await self._answer("refused", authorised, record, str(error), error.code)
            if error.code in _FINDINGS:
                await self._report(authorised, record, error.code, str(error))
            return
        await self._report_added_keys(authorised, record)
        await self._answer_done(authorised, record, changed=change is not None)

    def _decide(self, subject: Subject, authorised: Authorised) -> Change | Waits | None:
        max_s = self._runtime.settings.task_max_s
        return decide(self._memory.current(*subject), authorised, self._memory, task_max_s=max_s)

    async def _handle_about_proposal(self, authorised: Authorised, record: Received) -> None:
        """Handle a second signature, which carries out the proposed commands, or a withdrawal."""
        claims, at_ms = authorised.signed.claims, authorised.appended_at_ms
        try:
            if isinstance(claims, CommandSecond):
                await self._second(claims, authorised, record)
                await self._answer("accepted", authorised, record)
            elif isinstance(claims, CommandWithdraw):
                proposal = self.proposals.required(claims, at_ms)
                if claims.iss != author_of(proposal):
                    raise CommandRefusedError(
                        "only its author withdraws a proposal; leave it, and it lapses within a day",
                        code=Code.NOT_ENTITLED,
                    )
                await self.proposals.close(proposal, "withdrawn", at_ms, claims.iss)
                await self.proposals.report("withdrawn", proposal)
                await self._answer("accepted", authorised, record)
        except (CommandRefusedError, ChainError, InvalidMessageError) as error:
            await self._answer("refused", authorised, record, str(error), error.code)

    async def _second(self, claims: CommandSecond, second: Authorised, record: Received) -> None:
        """Carry out the commands that a second person signed: all, or none if one is refused.

        If the process ended within a list, the commands in records are answered, and the others are judged again.

        Raises CommandRefusedError, ChainError, InvalidMessageError.
        """
        due: list[tuple[str, Authorised, Change | None]] = []
        for one in claims.commands:
            embedded = self._memory.embedded(one.author, one.command)
            if embedded and embedded.second and embedded.second.jws == second.signed.compact:
                await self._answer_seconded(
                    one.proposal, self.proposals.seconded_before(embedded), record, claims.iss
                )
                continue
            given = self.proposals.seconded(second, one)
            subject = command_subject(given.claims, given.command_id)
            change = self._decide(subject, given)
            assert not isinstance(change, Waits)  # it has a second person
            if change is not None:
                check_size(given.claims, len(self._signed(subject, change, given)[1]))
            due.append((one.proposal, given, change))
        check_apart([change for _, _, change in due if change is not None])
        for proposal, given, change in due:
            if change is not None:
                subject = command_subject(given.claims, given.command_id)
                await self._publish(subject, change, given, record.traceparent)
            await self._answer_seconded(proposal, given, record, claims.iss)

    async def _answer_seconded(self, digest: str, given: Authorised, record: Received, by: str) -> None:
        """Publish what became of a proposal, and the answer to its author."""
        proposal = self.proposals.table.get(digest)
        if proposal is not None and proposal.status == "open":
            await self.proposals.close(proposal, "seconded", record.appended_at_ms, by)
        await self._report_added_keys(given, record)
        await self._answer("accepted", given, record)

    async def _publish_elsewhere(self, authorised: Authorised, traceparent: str | None) -> None:
        """Publish the records of other subjects that a report of a compromised key, or its review, changes."""
        kind, id = command_subject(authorised.claims, authorised.command_id)
        user = self._directory.user(id) if kind == "user" else None
        if user is not None:
            for subject, change in changes_elsewhere(user.state, authorised, self._memory):
                await self._publish(subject, change, authorised, traceparent)

    async def _publish(
        self, subject: Subject, change: Change, authorised: Authorised, traceparent: str | None
    ) -> None:
        """Publish a record and apply it to the directory at once, because the next command is decided on it."""
        jti, compact = self._signed(subject, change, authorised)
        check_size(authorised.claims, len(compact))
        await self._report_widening(subject, change, authorised)
        await self._append(*subject, compact, jti, traceparent)

    def _signed(self, subject: Subject, change: Change, authorised: Authorised) -> tuple[str, str]:
        """Return the `jti` of a record, and the record."""
        kind, id = subject
        key = self._runtime.key
        claims: AnyRecord = RECORDS[kind](
            iss=key.id,
            aud=self._runtime.settings.trust_domain,
            # A record contains nothing of this process: whoever handles the command again writes the very same claims.
            iat=authorised.appended_at_ms // 1000,
            jti=derived_id(kind, id, change.revision),
            sub=f"spiffe://{self._runtime.settings.trust_domain}/{kind}/{id}",
            revision=change.revision,
            commands=change.commands,
            state=change.state,
            **({"minor": change.minor} if kind == "user" else {}),
        )
        return claims.jti, sign(claims, key)

    async def _report_widening(self, subject: Subject, change: Change, authorised: Authorised) -> None:
        """Publish an event if one person alone, perhaps the root, widens something by this change."""
        current, command = self._memory.current(*subject), authorised.claims
        before = current.state if current else None
        if authorised.second is not None or not widens(before, change.state, command):
            return
        root = authorised.actor.is_root
        code = Code.WIDENED_BY_ROOT if root else Code.WIDENED_ALONE
        who = "the root" if root else authorised.actor.user_id
        message = f"{who} alone widened {' '.join(subject)} by {command.typ}, without a second person"
        await self._runtime.event(
            "widened",
            command.typ,
            about=(command.iss, command.jti),
            reasons=(Reason(code=code, message=message),),
            actor=command.iss,
            ref=command.jti,
            result=f"spiffe://{self._runtime.settings.trust_domain}/{'/'.join(subject)}",
            agent_id=self._agent_id(authorised),
        )

    async def _append(
        self, kind: SubjectKind, id: str, compact: str, jti: str, traceparent: str | None = None
    ) -> None:
        topic = TOPICS[kind]
        written = await (
            await self._runtime.publisher.send(
                topic, topic.what, Outbound(id, compact, id=jti, traceparent=traceparent)
            )
        )
        at = Coordinates(
            topic=written.topic, partition=written.partition, offset=written.offset,
            appended_at_ms=written.timestamp,
        )  # fmt: skip
        verdict = self._directory.take_own(kind, compact.encode(), at)
        if isinstance(verdict, Refused):
            why = f"{verdict.reason.code}: {verdict.reason.message}"
            raise RingfenceError(f"the record that was just published does not count: {why}")

    async def _answer(
        self,
        kind: EventKind,
        authorised: Authorised,
        record: Received,
        message: str | None = None,
        code: str | None = None,
    ) -> None:
        """Publish the signed result of a command."""
        command = authorised.claims
        subject_kind, id = self._subject_of(authorised)
        at = record.coordinates
        id_parts: tuple[object, ...] = (command.iss, command.jti)
        if kind == "replayed":
            id_parts = (*id_parts, at.topic, at.partition, at.offset)
        reasons = (Reason(code=code or kind, message=message[:2048]),) if message else ()
        await self._runtime.event(
            kind,
            command.typ,
            about=id_parts,
            reasons=reasons,
            source=at,
            traceparent=record.traceparent,
            actor=command.iss,
            ref=command.jti,
            result=self._result(authorised, kind, id),
            agent_id=self._agent_id(authorised),
            task_id=id if subject_kind == "task" else None,
        )

    def _subject_of(self, authorised: Authorised) -> tuple[SubjectKind | None, str]:
        """Return (kind, id) of a command's subject; of one about a proposal, no kind and the proposal's digest."""
        claims = authorised.signed.claims
        if isinstance(claims, CommandSecond | CommandWithdraw):
            return None, claims.proposal
        return command_subject(authorised.claims, authorised.command_id)

    def _result(self, authorised: Authorised, kind: EventKind, id: str) -> str | None:
        """Return the id of what a command created; of a renewal, the end of the new key in seconds since 1970; of a
        proposal, its digest.
        """
        command = authorised.claims
        if kind == "proposed":
            return proposal_digest(parse(authorised.signed.compact))
        if kind != "accepted":
            return None
        agent = self._memory.agent(id) if isinstance(command, AgentRenewKey) else None
        if agent is None or not isinstance(command, AgentRenewKey):
            return id
        return str(next(key.not_after for key in agent.keys if key.jwk == command.key))

    async def _answer_done(self, authorised: Authorised, record: Received, *, changed: bool) -> None:
        """Publish the answer to a command that was carried out, and a finding if it ended a line of keys.

        A renewal that ended its own line is answered as refused: it gave its signer no key.
        """
        reuse = self._reuse_text(authorised) if changed else None
        if reuse is not None:
            await self._report(authorised, record, Code.KEY_REUSED, reuse)
        if reuse is not None and isinstance(authorised.claims, AgentRenewKey):
            await self._answer("refused", authorised, record, reuse, Code.KEY_REUSED)
        else:
            await self._answer("accepted", authorised, record)

    def _reuse_text(self, authorised: Authorised) -> str | None:
        """Return what a command showed about the reuse of a renewed key, or None."""
        claims, kid = authorised.claims, authorised.signer_key.kid
        if isinstance(claims, AgentReportReuse) and authorised.reuse is not None:
            kid = authorised.reuse.kid
        elif not isinstance(claims, AgentRenewKey):
            return None
        agent = self._memory.agent(claims.agent_id)
        if agent is None or kid not in agent.compromised:
            return None
        return (
            f"key {kid} of agent {agent.agent_id} was renewed, and signed again: a copy of it is in other hands. All "
            f"keys of its line and their leases ended; {agent.sponsor} gives the agent another key with: ringfence "
            f"agent rotate-key {agent.agent_id}"
        )

    async def _report(self, authorised: Authorised, record: Received, code: AnyCode, message: str) -> None:
        """Publish a finding about a command."""
        await self._runtime.event(
            "finding",
            authorised.claims.typ,
            about=(code, authorised.claims.iss, authorised.claims.jti),
            reasons=(Reason(code=code, message=message[:2048]),),
            source=record.coordinates,
            traceparent=record.traceparent,
            agent_id=self._agent_id(authorised),
        )

    async def _report_added_keys(self, authorised: Authorised, record: Received) -> None:
        """Publish a finding for each key that a command added to a user, also the first one, so that the user learns of
        it. Whoever holds such a key may soon approve in their name.
        """
        kind, id = command_subject(authorised.claims, authorised.command_id)
        if kind != "user" or not isinstance(authorised.claims, UserAddKey | UserSet):
            return
        for origin in self._directory.key_history(id).origins.values():
            if origin.added_ms != authorised.appended_at_ms:
                continue
            owner = f"spiffe://{self._runtime.settings.trust_domain}/user/{id}"
            await self._runtime.event(
                "finding",
                EventSubject.KEY,
                about=(Code.KEY_ADDED, owner, origin.kid, origin.added_ms),
                reasons=(Reason(code=Code.KEY_ADDED, message=_added_text(id, origin)),),
                source=record.coordinates,
                traceparent=record.traceparent,
                actor=authorised.claims.iss,
                ref=origin.kid,
                result=owner,
            )

    def _agent_id(self, authorised: Authorised) -> str | None:
        kind, id = self._subject_of(authorised)
        if kind is None:
            proposal = self.proposals.table.get(id)
            return subject_of(proposal.aud, proposal.sub, "agent") if proposal else None
        if kind == "agent":
            return id
        if isinstance(authorised.claims, TaskAssign | TaskDelegate):
            return authorised.claims.terms.agent_id
        task = self._directory.unverified("task", id) if kind == "task" else None
        return task.state.agent_id if task and isinstance(task.state, TaskState) else None

    def _require_own_key(self) -> None:
        """Raise UnavailableError if the trust bundle lacks this registry's key: nobody would accept its records."""
        if reason := self.untrusted():
            raise UnavailableError(reason)

    def untrusted(self) -> str | None:
        """Return the reason why no service would accept this registry's records, or None."""
        key = self._runtime.key
        now_s = self._runtime.clock.now_ms() / 1000
        if self._runtime.trust.service_key(key.id, key.kid, ("registry",), now_s) is None:
            return (
                self._runtime.trust.unready()
                or f"the trust bundle has no valid key {key.kid} of {key.id}; run: ringfence init --publish"
            )
        return None

    # --- memory ---

    def on_events(self, records: Sequence[Received]) -> None:
        """Read back which commands any replica has handled."""
        for record in records:
            if record.key != self._runtime.role:
                continue
            try:
                event = verify(
                    parse(record.value),
                    ServiceEvent,
                    self._runtime.trust.finder("registry", at_s=record.appended_at_ms / 1000),
                    audience=self._runtime.settings.trust_domain,
                ).claims
            except InvalidMessageError:
                continue  # its writer is not the registry
            if (
                event.kind in ("accepted", "refused", "proposed")
                and event.actor
                and event.ref
                and event.source
            ):
                self._memory.remember(event.actor, event.ref, event.source)
            elif event.kind == "finding":
                self._on_finding(event)
            self.on_own_event(event)

    async def catch_up(self) -> None:
        """Wait until tables and memory hold everything that the previously active replica wrote."""
        while not (
            await self._runtime.tables_caught_up(_CATCH_UP_S)
            and (self.history is None or await self.history.caught_up(_CATCH_UP_S))
        ):
            log.warning("not caught up with the records yet; no command is taken")
            await asyncio.sleep(0.5)

    # --- heartbeat ---

    async def beat(self) -> None:
        """Publish a heartbeat with digests of complete tables. First restore records that somebody overwrote."""
        if not await self._runtime.tables_caught_up(1.0):
            return
        if not self._compared:
            self._compared = True
            self._compare()
        for kind, id in self._directory.displaced():
            await self._write_again(kind, id)
        if self._runtime.bundle_overwritten:
            await self._put_bundle_back()
        now_ms = self._runtime.clock.now_ms()
        heartbeat = Heartbeat(
            iss=self._runtime.key.id,
            aud=self._runtime.settings.trust_domain,
            iat=now_ms // 1000,
            jti=derived_id("heartbeat", self._runtime.key.id, now_ms),
            at_ms=now_ms,
            tables=self._directory.digests(),
        )
        await self._runtime.publisher.publish_signed(
            HEARTBEAT, self._runtime.role, heartbeat, self._runtime.key
        )

    def _compare(self) -> None:
        """Check, before the first heartbeat of this process, that the topics still hold what the last heartbeat
        confirmed.
        """
        for found in self._directory.unmatched():
            message = f"{found}, which is not what the last heartbeat confirmed: records may be gone"
            log.error("%s", message)
            self._on_alarm(Alarm(Code.TABLE_DIFFERS, message, found.partition(" ")[0], None))

    async def _write_again(self, kind: SubjectKind, id: str) -> None:
        """Publish a record again. Compaction keeps the last record of a key, so it must be the valid one."""
        record = self._directory.unverified(kind, id)
        if record is None:
            return
        log.error("writing the record of %s again: something else stands under its key", record.sub)
        await self._append(kind, id, sign(record, self._runtime.key), record.jti)

    async def _put_bundle_back(self) -> None:
        """Publish the trust bundle again.

        Otherwise a service that starts after compaction would find the previous bundle, with the keys that the current
        one ended.
        """
        trust = self._runtime.trust
        log.error("writing trust bundle %s again: something else stands under its key", trust.version)
        id = derived_id("trust", str(trust.version), digest(trust.compact))
        await (
            await self._runtime.publisher.send(
                TRUST, TrustBundle.typ, Outbound(str(trust.version), trust.compact, id=id)
            )
        )

    # --- proposals ---

    async def settle_while(self, mine: Callable[[], bool], every_s: float) -> None:
        """End proposals whose day is over, every `every_s` seconds while `mine()` says that this replica handles the
        commands. Never returns.
        """

        async def settle() -> None:
            if mine() and self.untrusted() is None and await self._runtime.tables_caught_up(1.0):
                await self.proposals.settle(self._runtime.clock.now_ms(), forget=True)

        await run_periodically(
            every_s, settle, "proposals are settled later", log,
            expected=(KafkaError, RingfenceError, OSError), at_once=True,
        )  # fmt: skip

    def second_person_warning(self) -> str | None:
        """Return why widening commands that need a second person cannot get one, or None."""
        trust, now_s = self._runtime.trust, self._runtime.clock.now_ms() / 1000
        if trust.unready() or trust.second_person(now_s) != "required":
            return None
        count = independent_operators(self._directory, self._runtime.clock.now_ms())
        if count >= 2:
            return None
        return (
            f"widening commands need a second person; independent operators with a live key: {count} of 2; "
            "make another with the root: ringfence user set --key root.json"
        )

    async def beat_while(self, mine: Callable[[], bool], every_s: float) -> None:
        """Send a heartbeat every `every_s` seconds while `mine()` says that this replica handles the commands.

        Never returns.
        """

        async def beat() -> None:
            if mine() and self.untrusted() is None:
                await self.beat()

        await run_periodically(
            every_s, beat, "no heartbeat this time", log,
            expected=(KafkaError, RingfenceError, OSError), at_once=True,
        )  # fmt: skip


def _added_text(user_id: str, origin: KeyOrigin) -> str:
    by = origin.by or "the root"
    cosigned = f" and co-signed by {origin.endorsed_by}" if origin.endorsed_by else ""
    since = utc_text(origin.counts_from_ms / 1000)
    return (
        f"for {user_id}: key {origin.kid} was added to you by {by}{cosigned}; it counts for approvals from {since}. If "
        f"it is not yours: ringfence user end-key {user_id} {origin.kid} --compromised "
        "--since TIME --reason REASON"
    )


def _same_place(a: Coordinates, b: Coordinates) -> bool:
    return (a.topic, a.partition, a.offset) == (b.topic, b.partition, b.offset)


def _first_at(at: Coordinates) -> str:
    return f"handled before, at {at.topic}/{at.partition}@{at.offset}"
