"""Verification of command chains. A record counts only if folding its commands gives its state, and if each command is
signed by someone who was entitled to give it, up to the root.

Verifying a signer means folding *their* commands up to just before the command in question. Every step goes back in
time, so a chain ends at the root or fails. Commands with the same millisecond do not see each other.

A chain cannot show what a registry left out. For that, the directory compares each record with the one before.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import cast

from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.jws import Signed, UnverifiedJws, is_by_passkey, parse, verify
from ringfence.kernel.crypto.keys import PublicKey, valid_key
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.messages.base import Claims, ExpiringClaims, typ_header
from ringfence.messages.codes import Code, ReceivedCode
from ringfence.messages.credential import CredentialRequest, RequestWithdraw
from ringfence.messages.lease import RevocationRequest
from ringfence.messages.registry import (
    COMMANDS,
    PROPOSAL_COMMANDS,
    AgentRenewKey,
    AgentReportReuse,
    AgentState,
    AgentTransfer,
    AgentTransferConsent,
    AnyRecord,
    AnyState,
    Command,
    CommandSecond,
    EmbeddedCommand,
    ProvisionerLink,
    ProvisionerSet,
    Role,
    SecondSignature,
    TaskAssign,
    TaskConsent,
    TaskDelegate,
    TaskEnd,
    TaskState,
    UserAddKey,
    UserDisable,
    UserEndKey,
    UserRecord,
    UserReviewCompromise,
    UserSet,
    UserState,
)
from ringfence.model.identity.spiffe_ids import SubjectKind, subject_of
from ringfence.model.lifecycle import (
    MAX_DEPTH,
    NO_HISTORY,
    NO_PROVENANCE,
    Actor,
    CommandRefusedError,
    Context,
    KeyHistory,
    KeyOrigin,
    KeyProof,
    KeyUse,
    Person,
    Provenance,
    Signatures,
    SignerKey,
    apply,
    by_person,
    check_widening,
    command_subject,
    hold_of,
    is_minor,
    sponsors_of,
    subject_key,
)
from ringfence.model.records.consent import Consent, verified_consent
from ringfence.model.records.key_proofs import PeopleThen, unverified_signers, verified_key_proof
from ringfence.model.records.user_keys import user_key
from ringfence.model.verdict import Refused

COMMAND_OF_TYP: dict[str, type[ExpiringClaims]] = {typ_header(command): command for command in COMMANDS}
"""The class of a command, by its `typ` header."""
SIGNED_COMMANDS: dict[str, type[ExpiringClaims]] = COMMAND_OF_TYP | {
    typ_header(command): command for command in PROPOSAL_COMMANDS
}
"""Those and the commands about a proposal, which no record is folded from."""
LISTED = (UserSet, UserAddKey)
"""The commands of which one second signature can name several (ADR 0102)."""
SIGNED_BY_AGENTS: dict[str, type[Claims]] = {
    typ_header(model): model
    for model in (CredentialRequest, RequestWithdraw, RevocationRequest, TaskDelegate, TaskEnd, AgentRenewKey)
}
"""The class of a message that agents sign, by its `typ` header."""


class ChainError(RingfenceError):
    """The command chain of a record does not verify. The record counts for nothing, and its signer lied."""

    code = Code.CHAIN_BROKEN


@dataclass(frozen=True, slots=True)
class Authorised:
    """A command with a verified signature, and who gave it."""

    signed: Signed[ExpiringClaims]
    actor: Actor
    appended_at_ms: int
    consent: Consent | None
    """The embedded consent, where it counts: to a task over the same terms, by a user's signature or their ID token; to
    the transfer of the same agent, by its new sponsor's signature."""
    consent_problem: str | None
    """Why an embedded consent does not count."""
    signer_key: SignerKey
    key_proof: KeyProof | None = None
    """What a `user.add-key` embeds, where all of it counts."""
    key_proof_problem: str | None = None
    """Why what a `user.add-key` embeds proves nothing."""
    reuse: KeyUse | None = None
    """What an `agent.report-reuse` embeds, where its signature holds."""
    reuse_problem: str | None = None
    provenance: Provenance = NO_PROVENANCE
    """On whose word the signer rests, if they are a user."""
    second: Authorised | None = None
    """The `command.second`, verified. What it says of the command was compared; who may second was not."""
    proposed_at_ms: int = 0
    """Of a command with a second person: its own append time. `appended_at_ms` is that of the second signature."""

    @property
    def embedded(self) -> EmbeddedCommand:
        """The command as a record embeds it."""
        given = EmbeddedCommand(jws=self.signed.compact, appended_at_ms=self.appended_at_ms)
        if self.second is None:
            return given
        second = SecondSignature(jws=self.second.signed.compact, proposed_at_ms=self.proposed_at_ms)
        return given.model_copy(update={"second": second})

    @property
    def signatures(self) -> Signatures:
        """Who signed it, for the rules about the second person."""
        return Signatures(
            Person(self.actor, self.provenance),
            self.appended_at_ms,
            Person(self.second.actor, self.second.provenance) if self.second else None,
            self.proposed_at_ms if self.second else self.appended_at_ms,
        )

    @property
    def claims(self) -> Command:
        return cast(Command, self.signed.claims)

    @property
    def command_id(self) -> str:
        return message_id(self.signed.claims.iss, self.signed.claims.jti)

    @property
    def digest(self) -> str:
        """SHA-256 of the command (compact JWS)."""
        return digest(self.signed.compact)

    @property
    def consent_by(self) -> str | None:
        """The user who consented."""
        return self.consent.user_id if self.consent else None


UserLookup = Callable[[str], UserRecord | None]
"""Returns the record of a user id in the local table. Its chain is not verified yet."""
RecordLookup = Callable[[SubjectKind, str], AnyRecord | None]
"""The same for records of any kind."""
BY_AGENTS = (TaskDelegate, TaskEnd, AgentRenewKey)
"""Commands that agents may give too."""
_ABOUT_USERS = (
    UserSet, UserDisable, UserAddKey, UserEndKey, UserReviewCompromise, ProvisionerSet, ProvisionerLink
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Step:
    """The result of folding the commands up to one of them."""

    state: AnyState
    command_id: str
    last_signed_s: int
    """The latest `iat` of a person's command up to here."""
    person_signed_s: int
    """The append time of the last command that a person signed, in seconds."""
    consent: Consent | None
    """What this one command rests on."""
    keys: KeyHistory = NO_HISTORY
    """Of a user or an agent: where their keys come from."""
    provenance: Provenance = NO_PROVENANCE
    """Of a user: on whose word they rest."""
    decided_signed_s: int = 0
    """As `last_signed_s`, of commands that were no minor changes. A proposal outlasts those (`is_minor`)."""
    changed_ms: int = 0
    """When the last command took effect that was no minor change (`is_minor`)."""


@dataclass(slots=True)
class _History:
    """The commands of a subject that others depend on, and the results of folding them: one step for each command, from
    the first on.
    """

    record: AnyRecord
    appended_ms: list[int]
    steps: list[_Step]


class Chains:
    """Verifies commands and records, from the root and the records of a local table."""

    def __init__(
        self,
        trust: TrustStore,
        unverified_user: UserLookup,
        unverified: RecordLookup = lambda *_: None,
    ) -> None:
        """`unverified` looks up agents and tasks, which commands of agents depend on."""
        self._trust = trust
        self._unverified_user = unverified_user
        self._unverified = unverified
        self._histories: dict[str, _History] = {}
        self._others: dict[tuple[SubjectKind, str], _History] = {}
        self._depth = 0

    def authorise(
        self,
        jws: UnverifiedJws,
        appended_at_ms: int,
        folded: _Step | None = None,
        second: SecondSignature | None = None,
    ) -> Authorised:
        """Verify the signature of a command, as of its append time.

        `folded` is the user or agent so far whose own record is being folded. With a `second` signature,
        `appended_at_ms` is the append time of that one.

        Raises InvalidMessageError if the command is malformed, expired, or not signed by a user or the root of this
        trust domain, or if the second signature is not of this command; and ChainError if a signer's record does not
        verify.
        """
        own = folded.state if folded is not None else None
        own_keys = folded.keys if folded is not None else NO_HISTORY
        model = SIGNED_COMMANDS.get(jws.header.typ)
        if model is None:
            raise InvalidMessageError(
                f"typ {jws.header.typ[:80]!r} names no command", code=Code.TYP_UNEXPECTED
            )

        own_agent = own if isinstance(own, AgentState) else None
        own = own if isinstance(own, UserState) else None
        signed_ms = second.proposed_at_ms if second else appended_at_ms
        signed = verify(
            jws, model, lambda iss, kid: self.signer_key(model, iss, kid, signed_ms, own, own_agent, jws),
            audience=self._trust.trust_domain, appended_at_ms=signed_ms,
        )  # fmt: skip
        seconded = None
        if second is not None:
            if self.command_key(signed.claims.iss, jws.header.kid, appended_at_ms, own) is None:
                raise InvalidMessageError(
                    f"the key {jws.header.kid} of its author ended before it was seconded",
                    code=Code.KEY_ENDED,
                )
            seconded = self._seconded(jws, signed.claims, second, appended_at_ms, folded)
        if model is AgentReportReuse:
            actor = Actor(None, frozenset(), is_service=True)
        else:
            actor = self._actor(signed.claims.iss, appended_at_ms, own, own_agent)
        # What a command embeds is judged by its own append time: a passkey's possession is fresh only then.
        people = self._people(signed_ms, own, own_keys)
        origin = people.origin_of(actor.user_id, jws.header.kid) if actor.user_id else None
        actor = replace(actor, kid=jws.header.kid, origin=origin, by_passkey=is_by_passkey(jws.compact))
        signer = SignerKey(actor.user_id, jws.header.kid, origin)
        consent, consent_problem, proof, proof_problem = None, None, None, None
        try:
            consent = self._consent(signed.claims, signed_ms)
        except InvalidMessageError as error:
            consent_problem = str(error)
        if isinstance(signed.claims, UserAddKey):
            try:
                proof = verified_key_proof(signed.claims, signer, people, self._trust, signed_ms)
            except InvalidMessageError as error:
                proof_problem = str(error)
        reuse, reuse_problem = None, None
        if isinstance(signed.claims, AgentReportReuse):
            try:
                report = signed.claims
                reuse = self.key_use(report.agent_id, parse(report.message), appended_at_ms, own_agent)
            except InvalidMessageError as error:
                reuse_problem = str(error)
        return Authorised(
            signed,
            actor,
            appended_at_ms,
            consent,
            consent_problem,
            signer,
            proof,
            proof_problem,
            reuse,
            reuse_problem,
            self._provenance_at(actor.user_id, appended_at_ms, folded),
            seconded,
            signed_ms,
        )

    def _seconded(
        self,
        jws: UnverifiedJws,
        claims: ExpiringClaims,
        second: SecondSignature,
        at_ms: int,
        folded: _Step | None,
    ) -> Authorised:
        """Verify the second signature of a command. Raises InvalidMessageError if it is of something else."""
        found = self.authorise(parse(second.jws), at_ms, folded)
        said = found.signed.claims
        if not isinstance(said, CommandSecond) or not said.names(
            claims.iss, claims.jti, digest(jws.signing_input)
        ):
            raise InvalidMessageError(
                "its second signature is of another command", code=Code.PROPOSAL_UNKNOWN
            )
        if len(said.commands) > 1 and not isinstance(claims, LISTED):
            raise InvalidMessageError(
                f"one second signature is of several commands, among them {claims.typ}: only users and keys are "
                "seconded in a list; second it alone",
                code=Code.SECOND_LISTED,
            )
        return found

    def provenance_at(self, user_id: str, at_ms: int) -> Provenance:
        """On whose word a user rested just before `at_ms`. Raises ChainError."""
        return self._provenance_at(user_id, at_ms, None)

    def _provenance_at(self, user_id: str | None, at_ms: int, folded: _Step | None) -> Provenance:
        if user_id is None:
            return NO_PROVENANCE
        if folded is not None and isinstance(folded.state, UserState) and folded.state.user_id == user_id:
            return folded.provenance
        if self.user_at(user_id, at_ms) is None:
            return NO_PROVENANCE
        history = self._histories[user_id]
        return history.steps[bisect_left(history.appended_ms, at_ms) - 1].provenance

    def signer_key(
        self,
        model: type[ExpiringClaims],
        iss: str,
        kid: str,
        at_ms: int,
        own: UserState | None = None,
        own_agent: AgentState | None = None,
        jws: UnverifiedJws | None = None,
    ) -> VerificationKey | None:
        """The key `kid` of `iss` if it may sign commands of this type at `at_ms`; else None.

        A report of a compromised key (`jws`) is verified by the key that it answers too. An agent's renewal is verified
        by its former keys too: a repeat is answered again, and another message shows that a former key is in other
        hands.
        """
        if model is AgentReportReuse:
            return self._trust.finder(*model.signed_by, at_s=at_ms / 1000)(iss, kid)
        key: VerificationKey | None = self._trust.root_key(iss, kid, at_ms / 1000)
        key = key or self.command_key(iss, kid, at_ms, own)
        if key is None and model is UserEndKey and jws is not None:
            return self._accused_key(jws, iss, kid, at_ms, own)
        if key is not None or model not in BY_AGENTS:
            return key
        agent = self._agent_of(iss, at_ms, own_agent)
        if agent is None:
            return None
        found = valid_key(agent.keys, kid, at_ms / 1000)
        return found or (known_key(agent, kid) if model is AgentRenewKey else None)

    def user_key(self, iss: str, kid: str, at_ms: int) -> VerificationKey | None:
        """The key `kid` of the user `iss` if it counted at `at_ms`, by a chain that ends at the root; else None.

        For whatever a human signs. A provisioner is not a human.
        """
        user = self._user_of(iss, at_ms, None)
        return self._key_of(user, kid, at_ms) if user and user.delegation is None else None

    def command_key(
        self, iss: str, kid: str, at_ms: int, own: UserState | None = None
    ) -> VerificationKey | None:
        """As `user_key`, but for commands: provisioners give some too."""
        user = self._user_of(iss, at_ms, own)
        return self._key_of(user, kid, at_ms) if user else None

    def _accused_key(
        self, jws: UnverifiedJws, iss: str, kid: str, at_ms: int, own: UserState | None
    ) -> VerificationKey | None:
        """An ended key that a report accuses, while that is not reviewed: it may report the reporter's key alone."""
        user = self._user_of(iss, at_ms, own)
        claims = jws.unverified_claims(UserEndKey)  # only to know whom it accuses: `verify` comes next
        if user is None or not claims.compromised or kid not in (user.compromised or ()):
            return None
        keys = tuple(
            key.model_copy(update={"not_after": at_ms // 1000 + 1})
            for key in user.keys
            for one in user.holds
            if key.kid == kid and one.user_id == user.user_id and one.status == "held"
            if (one.by, one.by_kid) == (claims.user_id, claims.kid) and key.not_after == one.at_ms // 1000
        )
        return user_key(keys[:1], kid, at_ms / 1000, self._trust)

    def agent_key(self, iss: str, kid: str, at_ms: int) -> PublicKey | None:
        """The key `kid` of the agent `iss` if it was valid at `at_ms`, whatever the agent's status; else None."""
        agent = self._agent_of(iss, at_ms, None)
        return valid_key(agent.keys, kid, at_ms / 1000) if agent else None

    def _agent_of(self, iss: str, at_ms: int, own: AgentState | None) -> AgentState | None:
        agent_id = subject_of(self._trust.trust_domain, iss, "agent")
        if own is not None and own.agent_id == agent_id:
            return own
        return self.agent_at(agent_id, at_ms) if agent_id else None

    def key_use(self, agent_id: str, jws: UnverifiedJws, at_ms: int, own: AgentState | None = None) -> KeyUse:
        """The use of a key that an agent has or had, by a message whose signature is verified.

        Raises InvalidMessageError.
        """
        model = SIGNED_BY_AGENTS.get(jws.header.typ)
        if model is None:
            raise InvalidMessageError("agents sign no such message", code=Code.TYP_UNEXPECTED)

        def find(iss: str, kid: str) -> PublicKey | None:
            agent = self._agent_of(iss, at_ms, own)
            return known_key(agent, kid) if agent and agent.agent_id == agent_id else None

        claims = verify(jws, model, find, audience=self._trust.trust_domain).claims
        if claims.iat > at_ms // 1000 + LEEWAY_S:
            raise InvalidMessageError("the message is of the future", code=Code.CLAIMS_INVALID)
        return KeyUse(jws.header.kid, claims.iat)

    def roles_at(self, user_id: str, at_ms: int) -> frozenset[Role]:
        """The roles of an active user just before `at_ms`; none where unknown or disabled."""
        user = self.user_at(user_id, at_ms)
        return frozenset(user.roles) if user and user.status == "active" else frozenset()

    def user_at(self, user_id: str, at_ms: int, own: UserState | None = None) -> UserState | None:
        """The state of a user just before `at_ms`, folded from their commands; None if there was none.

        Raises ChainError if the user's record does not verify.
        """
        if own is not None and own.user_id == user_id:
            return own
        history = self._history(user_id)
        if history is None:
            return None
        wanted = bisect_left(history.appended_ms, at_ms)
        if len(history.steps) < wanted:
            self._fold_users(user_id, at_ms)
        return cast(UserState, history.steps[wanted - 1].state) if wanted else None

    def key_history(self, user_id: str) -> KeyHistory:
        """Where the keys of a user come from, by all commands of their record in the table.

        Raises ChainError if the user's record does not verify.
        """
        history = self._history(user_id)
        return self.key_history_at(user_id, history.appended_ms[-1] + 1) if history else NO_HISTORY

    def key_history_at(self, user_id: str, at_ms: int) -> KeyHistory:
        """Where the keys of a user came from just before `at_ms`. Raises ChainError."""
        history = self._history(user_id)
        if history is None or self.user_at(user_id, at_ms) is None:
            return NO_HISTORY
        return history.steps[bisect_left(history.appended_ms, at_ms) - 1].keys

    def agent_key_history(self, agent_id: str) -> KeyHistory:
        """Where the keys of an agent come from, by all commands of its record in the table. Raises ChainError."""
        record = self._unverified("agent", agent_id)
        if record is None:
            return NO_HISTORY
        self.agent_at(agent_id, record.commands[-1].appended_at_ms + 1)
        return self._others["agent", agent_id].steps[-1].keys

    def agent_at(self, agent_id: str, at_ms: int) -> AgentState | None:
        """The state of an agent just before `at_ms`, folded from its commands. Raises ChainError."""
        return cast("AgentState | None", self._other_at("agent", agent_id, at_ms))

    def agent_after(self, agent_id: str, command: str, at_ms: int) -> AgentState | None:
        """The state of an agent if the registry took a command (compact JWS) now; None if there is no such agent.

        Raises InvalidMessageError, CommandRefusedError and ChainError.
        """
        if self.agent_at(agent_id, at_ms) is None:
            return None
        steps = self._others["agent", agent_id].steps
        return cast(AgentState, self._fold(steps, EmbeddedCommand(jws=command, appended_at_ms=at_ms)).state)

    def state_with(self, given: Authorised) -> AnyState:
        """Return the state of a command's subject as its record has it, with the command: what a proposal would give.

        Raises CommandRefusedError and ChainError.
        """
        kind, id = command_subject(given.claims, given.command_id)
        record = self._unverified_user(id) if kind == "user" else self._unverified(kind, id)
        if record is None:
            return self._applied((), given, proposed=True)
        after_ms = record.commands[-1].appended_at_ms + 1
        if kind == "user":
            self.user_at(id, after_ms)
            return self._applied(self._histories[id].steps, given, proposed=True)
        self._other_at(kind, id, after_ms)
        return self._applied(self._others[kind, id].steps, given, proposed=True)

    def task_at(self, task_id: str, at_ms: int) -> TaskState | None:
        """The state of a task just before `at_ms`, folded from its commands. Raises ChainError."""
        return cast("TaskState | None", self._other_at("task", task_id, at_ms))

    def verify(self, record: AnyRecord) -> None:
        """Raises ChainError if folding the record's commands does not give its state, or if one was not authorised."""
        state = self._folded(record)
        if state != record.state:
            raise ChainError(f"the state of {record.sub} is not what its commands say")
        if record.sub != subject_spiffe(self._trust.trust_domain, state):
            raise ChainError(f"the record of {record.sub} is about another subject")

    def forget(self) -> None:
        """Drop all results, because another trust bundle may give others."""
        self._histories.clear()
        self._others.clear()

    # --- folding ---

    def _folded(self, record: AnyRecord) -> AnyState:
        if isinstance(record, UserRecord):
            user_id = record.state.user_id
            history = self._history(user_id)
            if history is not None and history.record is record:
                self._fold_users(user_id, history.appended_ms[-1] + 1)
                return history.steps[-1].state
        _check_order(record)
        steps: list[_Step] = []
        for embedded in record.commands:
            steps.append(self._next(steps, embedded))
        return steps[-1].state

    def _history(self, user_id: str) -> _History | None:
        record = self._unverified_user(user_id)
        if record is None:
            return None
        history = self._histories.get(user_id)
        if history is None or history.record is not record:
            _check_order(record)
            same = _common(history.record.commands, record.commands) if history else 0
            history = _History(
                record,
                [command.appended_at_ms for command in record.commands],
                history.steps[:same] if history else [],
            )
            self._histories[user_id] = history
        return history

    def _fold_users(self, user_id: str, before_ms: int) -> None:
        """Fold a user's commands before a time, and first those of the signers, and of their signers before that.

        A stack replaces recursion, so that no length of chain exhausts Python's. It ends, because everything pushed
        lies earlier than what it is for.
        """
        todo = [(user_id, before_ms)]
        while todo:
            current, until_ms = todo[-1]
            history = self._history(current)
            assert history is not None  # only who has a record is put on the list
            if len(history.steps) >= bisect_left(history.appended_ms, until_ms):
                todo.pop()
                continue
            embedded = history.record.commands[len(history.steps)]
            at_ms = embedded.appended_at_ms
            before = next(
                (
                    one
                    for one in self._unverified_signers(embedded, current)
                    if one != current and not self._is_folded(one, at_ms)
                ),
                None,
            )
            if before is not None:
                todo.append((before, at_ms))
                continue
            step = self._next(history.steps, embedded)
            if subject_key(step.state) != ("user", current):
                raise ChainError(f"the commands in the record of user {current} are about something else")
            history.steps.append(step)

    def _other_at(self, kind: SubjectKind, id: str, at_ms: int) -> AnyState | None:
        record = self._unverified(kind, id)
        if record is None:
            return None
        history = self._others.get((kind, id))
        if history is None or history.record is not record:
            _check_order(record)
            same = _common(history.record.commands, record.commands) if history else 0
            times = [command.appended_at_ms for command in record.commands]
            history = _History(record, times, history.steps[:same] if history else [])
            self._others[kind, id] = history
        wanted = bisect_left(history.appended_ms, at_ms)
        # What a task was handed on from lies before it, so this ends. Of a chain that is longer than any may be the
        # rest is not looked at.
        if self._depth > 2 * MAX_DEPTH + 2:
            raise ChainError(f"the chain that leads to {record.sub} is longer than any may be")
        self._depth += 1
        try:
            while len(history.steps) < wanted:
                step = self._next(history.steps, record.commands[len(history.steps)])
                if subject_key(step.state) != (kind, id):
                    raise ChainError(f"the commands in the record of {kind} {id} are about something else")
                history.steps.append(step)
        finally:
            self._depth -= 1
        return history.steps[wanted - 1].state if wanted else None

    def _is_folded(self, user_id: str, before_ms: int) -> bool:
        history = self._history(user_id)
        return history is None or len(history.steps) >= bisect_left(history.appended_ms, before_ms)

    def _unverified_signers(self, embedded: EmbeddedCommand, user_id: str) -> tuple[str, ...]:
        """The users who signed a command in a user's record and what it embeds, as it claims: only to know whom to fold
        first. `_next` verifies it.
        """
        try:
            jws = parse(embedded.jws)
            model = COMMAND_OF_TYP.get(jws.header.typ)
            if model not in _ABOUT_USERS:
                raise ChainError(f"the record of user {user_id} embeds a command that is about no user")
            claims = jws.unverified_claims(model)
            signers = [claims.iss, *(unverified_signers(claims) if isinstance(claims, UserAddKey) else ())]
            if embedded.second is not None:
                signers.append(parse(embedded.second.jws).unverified_claims(CommandSecond).iss)
        except InvalidMessageError as error:
            raise ChainError(f"an embedded command does not hold: {error}") from None
        return tuple(subject_of(self._trust.trust_domain, iss, "user") or "" for iss in signers)

    def _next(self, steps: Sequence[_Step], embedded: EmbeddedCommand) -> _Step:
        """Fold one embedded command onto `steps`. Raises ChainError."""
        try:
            return self._fold(steps, embedded)
        except (InvalidMessageError, CommandRefusedError) as error:
            code = Code.CHAIN_INCOMPLETE if error.code == Code.UNKNOWN_PARENT else None
            raise ChainError(f"an embedded command does not hold: {error}", code=code) from None

    def _fold(self, steps: Sequence[_Step], embedded: EmbeddedCommand) -> _Step:
        """As `_next`. Raises InvalidMessageError and CommandRefusedError as they come."""
        at_ms = embedded.appended_at_ms
        before = steps[-1].state if steps else None
        signed_s = steps[-1].last_signed_s if steps else 0
        person_s = steps[-1].person_signed_s if steps else 0
        keys = steps[-1].keys if steps else NO_HISTORY
        provenance = steps[-1].provenance if steps else NO_PROVENANCE
        given = self.authorise(parse(embedded.jws), at_ms, steps[-1] if steps else None, embedded.second)
        if isinstance(given.claims, PROPOSAL_COMMANDS):
            raise ChainError(f"a record embeds a {given.claims.typ} by itself")
        if any(step.command_id == given.command_id for step in steps):
            raise ChainError("one command is embedded twice")
        if given.consent and any(step.consent and step.consent.mark == given.consent.mark for step in steps):
            raise ChainError("one consent is used twice")
        state = self._applied(steps, given)
        self._check_widening(steps, state, given)
        second = given.second.signer_key if given.second else None
        if isinstance(state, UserState | AgentState):
            assert before is None or isinstance(before, UserState | AgentState)
            keys = keys.after(
                before, state, at_ms=at_ms, signer=given.signer_key, proof=given.key_proof, second=second
            )
        if isinstance(state, UserState):
            assert before is None or isinstance(before, UserState)
            endorser = self._endorser(given, steps[-1] if steps else None)
            provenance = provenance.after(before, state, given.claims, given.signatures, endorser)
        changed_ms = steps[-1].changed_ms if steps else 0
        decided_s = steps[-1].decided_signed_s if steps else 0
        minor = is_minor(before, state, given.claims)
        if by_person(given.claims):
            signed_s, person_s = max(signed_s, given.claims.iat), at_ms // 1000
            decided_s = decided_s if minor else max(decided_s, given.claims.iat)
        return _Step(
            state,
            given.command_id,
            signed_s,
            person_s,
            given.consent,
            keys,
            provenance,
            decided_s,
            changed_ms if minor else at_ms,
        )

    def _applied(self, steps: Sequence[_Step], given: Authorised, *, proposed: bool = False) -> AnyState:
        """Apply a command onto `steps`, whether or not it needs a second person. Raises CommandRefusedError.

        `proposed`: whether it waits for one. Only minor changes came since then.
        """
        at_ms, last = given.appended_at_ms, steps[-1] if steps else None
        context = Context(
            actor=given.actor,
            at_s=at_ms // 1000,
            at_ms=at_ms,
            command_digest=given.digest,
            command_id=given.command_id,
            roles_of=lambda user_id: self.roles_at(user_id, at_ms),
            task_at=lambda task_id: self.task_at(task_id, at_ms),
            last_signed_s=(last.decided_signed_s if given.second or proposed else last.last_signed_s)
            if last
            else 0,
            consent_by=given.consent_by,
            consent_problem=given.consent_problem,
            transfer_consent=given.consent.transfer if given.consent else None,
            key_history=last.keys if last else NO_HISTORY,
            key_proof=given.key_proof,
            key_proof_problem=given.key_proof_problem,
            signer_kid=given.signer_key.kid,
            person_signed_s=last.person_signed_s if last else 0,
            reuse=given.reuse,
            reuse_problem=given.reuse_problem,
        )
        return apply(last.state if last else None, given.claims, context)

    def _check_widening(self, steps: Sequence[_Step], state: AnyState, given: Authorised) -> None:
        """Check that a widening command has the second person that it needs. Raises CommandRefusedError."""
        signatures = given.signatures
        if given.second is not None and steps and steps[-1].changed_ms > given.proposed_at_ms:
            raise CommandRefusedError("its subject changed after it was proposed", code=Code.SUBJECT_CHANGED)
        before = steps[-1].state if steps else None
        mode = self._trust.second_person(signatures.proposed_ms / 1000)
        sponsors = sponsors_of((step.state for step in steps), given.claims)
        verdict = check_widening(before, state, given.claims, signatures, mode, sponsors)
        if isinstance(verdict, Refused):
            raise CommandRefusedError(verdict.reason.message, code=ReceivedCode(verdict.reason.code))

    def _endorser(self, given: Authorised, folded: _Step | None) -> Person | None:
        """Who co-signed a `user.add-key`, with what they rest on."""
        endorser = given.key_proof.endorser if given.key_proof else None
        if endorser is None:
            return None
        provenance = self._provenance_at(endorser.user_id, given.appended_at_ms, folded)
        return Person(Actor(endorser.user_id, frozenset()), provenance)

    def _people(self, at_ms: int, own: UserState | None, own_keys: KeyHistory) -> PeopleThen:
        """The people as of just before `at_ms`; `own` as it is so far."""

        def find_key(iss: str, kid: str) -> VerificationKey | None:
            user = self._user_of(iss, at_ms, own)
            return self._key_of(user, kid, at_ms) if user and user.delegation is None else None

        def roles_of(user_id: str) -> frozenset[Role]:
            user = self.user_at(user_id, at_ms, own)
            return frozenset(user.roles) if user and user.status == "active" else frozenset()

        def origin_of(user_id: str, kid: str) -> KeyOrigin | None:
            if own is not None and own.user_id == user_id:
                return own_keys.origins.get(kid)
            return self.key_history_at(user_id, at_ms).origins.get(kid)

        return PeopleThen(find_key, roles_of, origin_of)

    def _actor(self, iss: str, at_ms: int, own: UserState | None, own_agent: AgentState | None) -> Actor:
        if iss == self._trust.root_id:
            return Actor(None, frozenset({"operator"}))
        if agent_id := subject_of(self._trust.trust_domain, iss, "agent"):
            agent = self._agent_of(iss, at_ms, own_agent)
            if agent is None:  # whose key then was it?
                raise ChainError(f"there was no agent {agent_id} then")
            return Actor(None, frozenset(), agent=agent, hold=hold_of(agent))
        user = self._user_of(iss, at_ms, own)
        if user is None:  # whose key then was it?
            raise ChainError(f"there was no user {iss} then")
        by = user.provisioned.by if user.provisioned else None
        return Actor(user.user_id, frozenset(user.roles), user.delegation, by, hold=hold_of(user))

    def _key_of(self, user: UserState, kid: str, at_ms: int) -> VerificationKey | None:
        return user_key(user.keys, kid, at_ms / 1000, self._trust)

    def _user_of(self, iss: str, at_ms: int, own: UserState | None) -> UserState | None:
        """The active user, or provisioner, that a signer was at `at_ms`."""
        user_id = subject_of(self._trust.trust_domain, iss, "user")
        user = self.user_at(user_id, at_ms, own) if user_id else None
        return user if user and user.status == "active" else None

    def _consent(self, command: ExpiringClaims, at_ms: int) -> Consent | None:
        """The consent that a command embeds; None if it embeds none. Raises InvalidMessageError, ChainError."""
        if isinstance(command, AgentTransfer):
            return self._transfer_consent(command, at_ms)
        if not isinstance(command, TaskAssign):
            return None
        if command.id_token is not None:
            if command.consent is not None:
                raise InvalidMessageError("a consent and an ID token: give one of them")
            user = self.user_at(command.on_behalf_of, at_ms)
            return verified_consent(command.id_token, command.terms, user, self._trust, at_ms)
        if command.consent is None:
            return None
        jws = parse(command.consent)
        claims = verify(
            jws, TaskConsent, lambda iss, kid: self.user_key(iss, kid, at_ms),
            audience=self._trust.trust_domain, appended_at_ms=at_ms,
        ).claims  # fmt: skip
        if claims.terms != command.terms:
            raise InvalidMessageError("the consent is to other terms", code=Code.CONSENT_OTHER_TERMS)
        user_id = subject_of(self._trust.trust_domain, claims.iss, "user") or ""
        return Consent(user_id, (claims.iss, claims.jti), jws.header.kid)

    def _transfer_consent(self, command: AgentTransfer, at_ms: int) -> Consent | None:
        """As `_consent`, for transfers. The fold compares whose the agent was, because it knows that."""
        if command.consent is None:
            return None
        jws = parse(command.consent)
        claims = verify(
            jws, AgentTransferConsent, lambda iss, kid: self.user_key(iss, kid, at_ms),
            audience=self._trust.trust_domain, appended_at_ms=at_ms,
        ).claims  # fmt: skip
        user_id = subject_of(self._trust.trust_domain, claims.iss, "user") or ""
        if (claims.agent_id, user_id) != (command.agent_id, command.sponsor):
            raise InvalidMessageError(
                f"it is {user_id}'s, to take over agent {claims.agent_id}", code=Code.CONSENT_OTHER_TERMS
            )
        return Consent(user_id, (claims.iss, claims.jti), jws.header.kid, claims)


def known_key(agent: AgentState, kid: str) -> PublicKey | None:
    """The key `kid` that an agent has or had, whenever it is or was valid. For what shows a use, never to allow one."""
    record = next((key for key in agent.keys if key.kid == kid), None)
    return valid_key((record,), kid, record.not_before) if record else None


def subject_spiffe(trust_domain: str, state: AnyState) -> str:
    """The SPIFFE ID of the subject of a state, which is the `sub` of its record."""
    kind, id = subject_key(state)
    return f"spiffe://{trust_domain}/{kind}/{id}"


def unverified_command(embedded: EmbeddedCommand) -> Command:
    """The claims of an embedded command, without verification. For records with a verified chain, or indexes over them.

    Raises InvalidMessageError.
    """
    jws = parse(embedded.jws)
    model = COMMAND_OF_TYP.get(jws.header.typ)
    if model is None:
        raise InvalidMessageError("an embedded command of an unknown type", code=Code.TYP_UNEXPECTED)
    return cast(Command, jws.unverified_claims(model))


def _check_order(record: AnyRecord) -> None:
    times = [command.appended_at_ms for command in record.commands]
    if times != sorted(times):
        raise ChainError(f"the commands in the record of {record.sub} are out of order")


def _common(old: Sequence[EmbeddedCommand], new: Sequence[EmbeddedCommand]) -> int:
    """The length of the common beginning of two histories."""
    for index, (a, b) in enumerate(zip(old, new, strict=False)):
        if (a.jws, a.appended_at_ms, a.second) != (b.jws, b.appended_at_ms, b.second):
            return index
    return min(len(old), len(new))
