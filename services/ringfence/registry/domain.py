"""Rules for commands: the lifecycle, which every reader computes again, and the checks that only the registry can make.

Those checks need other subjects and the order of all commands. The module is pure.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ringfence.kernel.base.clock import LAST_MOMENT_S, utc_text
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.base.text import with_article
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.jws import MAX_JWS_BYTES, parse
from ringfence.kernel.crypto.keys import thumbprint
from ringfence.messages.base import KeyRecord, Message
from ringfence.messages.codes import Code, ReceivedCode, inactive_agent
from ringfence.messages.registry import (
    AgentRegister,
    AgentRenewKey,
    AgentReportReuse,
    AgentRotateKey,
    AgentState,
    AgentTransfer,
    AnyState,
    Command,
    EmbeddedCommand,
    HeldSubject,
    KeyEndorsement,
    KeyPossession,
    Proposal,
    ProvisionerSet,
    Role,
    TargetSet,
    TargetState,
    TaskAssign,
    TaskConsent,
    TaskDelegate,
    TaskState,
    TaskTerms,
    UserAddKey,
    UserEndKey,
    UserInvite,
    UserReviewCompromise,
    UserSet,
    UserState,
    WholeStateCommand,
)
from ringfence.messages.trust import OidcIssuer, SecondPerson
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle import (
    NO_HISTORY,
    CommandRefusedError,
    Context,
    KeyHistory,
    agents_of,
    apply,
    by_person,
    check_author,
    check_widening,
    command_subject,
    is_minor,
    may_widen,
    sponsors_of,
    still_needed,
    subject_key,
)
from ringfence.model.lifecycle.state_comparison import grows
from ringfence.model.model_limits import higher_limits
from ringfence.model.records.command_chain import Authorised
from ringfence.model.records.directory import VerifiedRecord
from ringfence.model.records.key_compromise import KeyCompromise
from ringfence.model.records.provisioning import given_by
from ringfence.model.target_settings import problems, reserved_name
from ringfence.model.unknown_fields import describe_unknown, unknown_fields
from ringfence.model.verdict import Allowed, Refused, Verdict

Subject = tuple[SubjectKind, str]

TASK_MAX_S = 30 * 24 * 3600
MAX_PARTS = 32
"""The most parts of one task that agents can hand on, ended parts included.

The limit keeps an agent from filling the tables.
"""
MAX_NARROWING_BYTES = 8 * 1024
MAX_RECORD_BYTES = MAX_JWS_BYTES * 3 // 4
"""The longest record after a command that grants something.

The rest stays free, so that a command that takes away always fits.
"""
MAX_ENDS_BYTES = MAX_JWS_BYTES - 6 * MAX_NARROWING_BYTES
"""The longest record after the end of single keys, of which there can be many.

The rest stays free for what ends all of them, such as two suspensions and `agent.decommission`. A record embeds a
command in base64, so each takes a third more than it has.
"""


class Surroundings(Protocol):
    """The state against which a command is checked, besides its own subject, as of the last command."""

    @property
    def latest_ms(self) -> int:
        """Return the latest append time of all commands in records."""
        ...

    def user(self, user_id: str) -> UserState | None:
        """Return a user whose record is valid, or None."""
        ...

    def agent(self, agent_id: str) -> AgentState | None:
        """Return an agent whose record is valid, or None."""
        ...

    def roles_at(self, user_id: str, at_ms: int) -> frozenset[Role]:
        """Return the roles of a user just before a moment."""
        ...

    def task_at(self, task_id: str, at_ms: int) -> TaskState | None:
        """Return a task as it was just before a moment, or None."""
        ...

    def parts_of(self, task_id: str) -> int:
        """Return how many parts of a task were handed on, ended parts included."""
        ...

    def changed_ms(self, kind: SubjectKind, id: str) -> int:
        """Return the append time of the last command in the subject's own record, or 0 if there is none."""
        ...

    def holders(self, kid: str) -> Collection[tuple[str, str]]:
        """Return (kind, id) of all subjects that have or had a key, services and the root among them."""
        ...

    def passkeys(self, credential_id: str, at_s: float) -> Sequence[tuple[UserState, KeyRecord]]:
        """Return the passkeys with a credential id that have not ended, with their users."""
        ...

    def key_history(self, user_id: str) -> KeyHistory:
        """Return the origins of a user's keys."""
        ...

    def agent_key_history(self, agent_id: str) -> KeyHistory:
        """Return the origins of an agent's keys."""
        ...

    def check_vouchers(self, iss: str, kid: str) -> Verdict:
        """Check that a key of a user or an agent rests on no compromised key."""
        ...

    def current(self, kind: SubjectKind, id: str) -> Current | None:
        """Return the verified record of a subject, or None. Raises ChainError."""
        ...

    def compromise(self, user_id: str, kid: str, since_ms: int) -> KeyCompromise:
        """Return what rests on a key of a user since a moment."""
        ...

    def roles_rest(self, user_id: str, on: str, at_ms: int) -> bool:
        """Return whether a role that a user had just before a moment rests on the word of another user, `on`."""
        ...

    def second_person(self, at_ms: int) -> SecondPerson:
        """Return whether widening commands that are appended at a moment need a second person."""
        ...

    def is_compared(self, command: Command, embedded: EmbeddedCommand, state: AnyState) -> bool:
        """Return whether a command of the record of `state` was only compared with those before it."""
        ...

    def works_for(self, agent_id: str) -> Collection[str]:
        """Return the users on whose behalf an agent has running tasks."""
        ...

    @property
    def rp_id(self) -> str | None:
        """Return the domain that passkeys are made for, by the trust bundle."""
        ...

    def issuer_of(self, id_token: str, at_ms: int) -> OidcIssuer | None:
        """Return the issuer of a user's ID token from the trust bundle, or None."""
        ...

    def task_of_consent(self, iss: str, mark: str) -> str | None:
        """Return the id of the task that a consent was used for, or None."""
        ...


@dataclass(frozen=True, slots=True)
class Embedded:
    """A command embedded in a record, with its claims."""

    claims: Command
    embedded: EmbeddedCommand


@dataclass(frozen=True, slots=True)
class Current:
    """The verified record of a subject as it is now."""

    entry: VerifiedRecord[AnyState]

    state: AnyState
    revision: int
    commands: tuple[Embedded, ...]


@dataclass(frozen=True, slots=True)
class Change:
    """The record that a command leads to."""

    state: AnyState
    revision: int
    commands: tuple[EmbeddedCommand, ...]
    minor: int = 0
    """`UserRecord.minor`."""


@dataclass(frozen=True, slots=True)
class Waits:
    """A widening command that nothing speaks against, and that waits for a second person."""

    state: AnyState
    """The subject as it would be."""
    revision: int
    """Of the subject's record as it is; 0: there is none."""


def decide(
    current: Current | None,
    authorised: Authorised,
    around: Surroundings,
    *,
    task_max_s: int = TASK_MAX_S,
) -> Change | Waits | None:
    """Decide a command: return the changed record, that it waits for a second person, or None if what the command asks
    for is already so.

    `task_max_s`: how long a new task may last, in seconds. Records of longer tasks stay valid.

    Raises CommandRefusedError with the reason. A refused command changes nothing.
    """
    command, at_ms = authorised.claims, authorised.appended_at_ms
    _check_time(authorised, around)
    compact = authorised.signed.compact
    if (only_reduces(command) and len(compact) > MAX_NARROWING_BYTES) and not isinstance(
        command, AgentReportReuse
    ):
        raise CommandRefusedError(
            f"{with_article(command.typ)} of {len(compact)} bytes; the limit is {MAX_NARROWING_BYTES}",
            code=Code.TOO_LARGE,
        )
    kind, id = command_subject(command, authorised.command_id)
    context = _context(authorised, around, current, (kind, id))
    state = apply(current.state if current else None, command, context)
    _check_signer_key(authorised, around)
    _check_apart(state, authorised, around)
    _check_fields(command, (kind, id), authorised, around)
    _check_keys(command, (kind, id), around, context.at_s)
    if isinstance(command, TargetSet):
        _check_target(command)
    if current is not None:
        _check_transfer_consent(authorised, current.revision)
    if isinstance(command, TaskAssign):
        _check_task(command, authorised, around)
        _check_limits(command.terms, around)
        _check_task_length(command.terms, at_ms, task_max_s)
    if isinstance(command, TaskDelegate) and isinstance(state, TaskState):
        _check_part(state, around)
        _check_limits(command.terms, around)
        _check_task_length(command.terms, at_ms, task_max_s)
    if current is not None and state == current.state:
        return None
    _check_revision(command, current, state)
    waits = _waits(current, state, authorised, around)
    if waits is not None:
        return waits
    embedded = authorised.embedded
    if current is None:
        return Change(state, 1, (embedded,))
    remaining = still_needed(
        [(e.claims, e.embedded) for e in current.commands], command, _compared_in(current, authorised, around)
    )
    minor = current.entry.minor + (isinstance(state, UserState) and is_minor(current.state, state, command))
    return Change(state, current.revision + 1, (*remaining, embedded), minor)


def _waits(
    current: Current | None, state: AnyState, authorised: Authorised, around: Surroundings
) -> Waits | None:
    """Return that a command waits for a second person; None if it needs none, or has one.

    Raises CommandRefusedError if nobody can second it, or if this second person may not.
    """
    before, signatures = current.state if current else None, authorised.signatures
    command, kind = authorised.claims, around.second_person(signatures.proposed_ms)
    sponsors = sponsors_of((before,), command) | _former_sponsors(current)
    verdict = check_widening(before, state, command, signatures, kind, sponsors)
    if isinstance(verdict, Allowed):
        if authorised.second is not None:
            _check_second(state, authorised, around)
        return None
    if verdict.reason.code != Code.SECOND_MISSING:
        raise _refusal(verdict)
    if isinstance(early := check_author(signatures), Refused):
        raise _refusal(early)
    return Waits(state, named_revision(current))


def _former_sponsors(current: Current | None) -> frozenset[str]:
    commands = [one.claims for one in current.commands] if current else []
    return frozenset(one.sponsor for one in commands if isinstance(one, AgentRegister | AgentTransfer))


def _check_second(state: AnyState, authorised: Authorised, around: Surroundings) -> None:
    """Make the checks of a second person that need other records: no agent of the change works for a sponsor who
    seconds, and the second key rests on no compromised key. Raises CommandRefusedError.
    """
    second = authorised.second
    assert second is not None
    who = second.actor.user_id or ""
    if (
        isinstance(state, AgentState)
        and not second.actor.is_operator
        and who in around.works_for(state.agent_id)
    ):
        raise CommandRefusedError(
            f"agent {state.agent_id} works for {who}, who may not second what it gets",
            code=Code.SECOND_NOT_ENTITLED,
        )
    if second.appended_at_ms <= around.changed_ms("user", who):
        raise CommandRefusedError(
            f"appended in the same moment as a change of its signer, {who}; sign and send it again",
            code=Code.TOO_EARLY,
        )
    if isinstance(verdict := around.check_vouchers(second.signed.claims.iss, second.signer_key.kid), Refused):
        raise _refusal(verdict)


def _refusal(verdict: Refused) -> CommandRefusedError:
    return CommandRefusedError(verdict.reason.message, code=ReceivedCode(verdict.reason.code))


def _compared_in(current: Current, authorised: Authorised, around: Surroundings) -> Callable[[Command], bool]:
    """Return the function that says of each command of a record, and of the new one, whether it was only compared with
    those before it.
    """
    of = {(one.claims.iss, one.claims.jti): one.embedded for one in current.commands}
    of[authorised.claims.iss, authorised.claims.jti] = authorised.embedded
    return lambda command: around.is_compared(command, of[command.iss, command.jti], current.state)


def check_apart(changes: Sequence[Change]) -> None:
    """Check that the changes of one list do not concern each other: each was decided as if the others were not there.

    Raises CommandRefusedError.
    """
    seen: set[object] = set()
    for change in changes:
        keys = () if isinstance(change.state, TaskState | AgentState) else change.state.keys
        subject = subject_key(change.state)
        credentials = {key.credential_id for key in keys if key.credential_id is not None}
        own = {subject, *(key.kid for key in keys), *credentials}
        if not seen.isdisjoint(own):
            raise CommandRefusedError(
                f"the list names {' '.join(subject)}, or a key of theirs, twice; second one of both alone",
                code=Code.SECOND_LISTED,
            )
        seen |= own


def _check_revision(command: Command, current: Current | None, state: AnyState) -> None:
    """Refuse a whole state that widens, and whose signer saw an older one. Narrowing always lands (ADR 0102)."""
    seen = command.revision if isinstance(command, WholeStateCommand) else None
    now = named_revision(current)
    if seen is None or seen == now or not grows(current.state if current else None, state):
        return
    raise CommandRefusedError(
        f"its signer saw revision {seen}, and it is at {now}: somebody changed it meanwhile; look at it "
        "again, and sign anew",
        code=Code.REVISION_STALE,
    )


def named_revision(current: Current | None) -> int:
    """Return the revision of a record that people name, 0 if there is none."""
    return current.entry.named_revision if current else 0


def changed_since(entry: VerifiedRecord[Any] | None, proposal: Proposal) -> bool:
    """Return whether the subject of a proposal has changed since, other than by minor changes (`is_minor`).

    `entry`: the record of the subject. Its commands are not parsed: all proposals are compared after each command.
    """
    return (entry.named_revision if entry else 0) != proposal.revision


def _key_history(around: Surroundings, kind: SubjectKind, id: str) -> KeyHistory:
    if kind == "user":
        return around.key_history(id)
    return around.agent_key_history(id) if kind == "agent" else NO_HISTORY


def changes_elsewhere(
    state: UserState, authorised: Authorised, around: Surroundings
) -> list[tuple[Subject, Change]]:
    """Return the changes that a report of a compromised key, or its review, makes in the records of other subjects.

    Records that embed the command already are left out, so a redelivery completes what is missing.

    Args:
        state: the key's user after the command.
        authorised: the command, which was accepted for the key's user.
    """
    command, at_ms = authorised.claims, authorised.appended_at_ms
    compromise: KeyCompromise | None = None
    if isinstance(command, UserEndKey) and command.holds:
        own = next((one for one in state.holds if one.report == authorised.command_id), None)
        if own is None or own.status == "proposed":
            return []
        listed = command.holds
        compromise = around.compromise(command.user_id, command.kid, own.since_ms)
    elif isinstance(command, UserReviewCompromise):
        listed = _listed(command, around)
    else:
        return []
    changes: list[tuple[Subject, Change]] = []
    for one in listed:
        subject: Subject = (one.kind, one.id)
        current = around.current(*subject)
        compact = authorised.signed.compact
        if current is None or subject == ("user", command.user_id):
            continue
        if any(known.embedded.jws == compact for known in current.commands):
            continue
        if compromise is not None:
            resting = compromise.resting_of(one.kind, current.entry, at_ms / 1000)
            if resting is None or set(resting.held.parts).isdisjoint(one.parts):
                continue
        elif isinstance(command, UserReviewCompromise) and all(
            hold.report != command.report for hold in current.state.holds
        ):
            continue
        after = apply(current.state, command, _context(authorised, around, current, subject))
        embedded = EmbeddedCommand(jws=compact, appended_at_ms=at_ms)
        commands = (*(known.embedded for known in current.commands), embedded)
        changes.append((subject, Change(after, current.revision + 1, commands, current.entry.minor)))
    return changes


def _listed(command: UserReviewCompromise, around: Surroundings) -> tuple[HeldSubject, ...]:
    """Return what the reviewed report lists, by the record of the key's user."""
    current = around.current("user", command.user_id)
    for known in current.commands if current else ():
        claims = known.claims
        if isinstance(claims, UserEndKey) and message_id(claims.iss, claims.jti) == command.report:
            return claims.holds or ()
    return ()


def _context(
    authorised: Authorised, around: Surroundings, current: Current | None, subject: Subject
) -> Context:
    at_ms, (kind, id) = authorised.appended_at_ms, subject
    people = [one for one in current.commands if by_person(one.claims)] if current else []
    return Context(
        actor=authorised.actor,
        at_s=at_ms // 1000,
        at_ms=at_ms,
        command_digest=authorised.digest,
        command_id=authorised.command_id,
        roles_of=lambda user_id: around.roles_at(user_id, at_ms),
        task_at=lambda task_id: around.task_at(task_id, at_ms),
        # Of a command with a second person this was compared when it was proposed, and only minor changes came since.
        last_signed_s=0 if authorised.second else max((one.claims.iat for one in people), default=0),
        person_signed_s=max((one.embedded.appended_at_ms // 1000 for one in people), default=0),
        consent_by=authorised.consent_by,
        consent_problem=authorised.consent_problem,
        transfer_consent=authorised.consent.transfer if authorised.consent else None,
        key_history=_key_history(around, kind, id),
        signer_kid=authorised.signer_key.kid,
        reuse=authorised.reuse,
        reuse_problem=authorised.reuse_problem,
        key_proof=authorised.key_proof,
        key_proof_problem=authorised.key_proof_problem,
        sponsor_of=lambda agent_id: agent.sponsor if (agent := around.agent(agent_id)) else None,
    )


def only_reduces(command: Command) -> bool:
    """Return whether a command can only reduce what is allowed. Nothing may stand in the way of such a command."""
    lifts = isinstance(command, UserReviewCompromise) and command.outcome == "lift"
    grants = AgentRegister | AgentRenewKey | TaskAssign | TaskDelegate
    return not (lifts or may_widen(command) or isinstance(command, grants))


def check_size(command: Command, size: int) -> None:
    """Raise CommandRefusedError if a record of `size` bytes is too long for what `command` does."""
    limit = MAX_JWS_BYTES
    if not only_reduces(command):
        limit = MAX_RECORD_BYTES
    elif isinstance(command, AgentRotateKey | UserEndKey):
        limit = MAX_ENDS_BYTES
    if size > limit:
        raise CommandRefusedError(
            f"the record would have {size} bytes, the limit is {limit}; say it shorter, or start a new subject",
            code=Code.RECORD_TOO_LARGE,
        )


def _check_time(command: Authorised, around: Surroundings) -> None:
    """Refuse a command that was not appended after the last one: every reader resolves a signer as of just before
    the append time.
    """
    if command.appended_at_ms < around.latest_ms:
        raise CommandRefusedError(
            f"appended {around.latest_ms - command.appended_at_ms} ms before a command that was accepted earlier: the "
            "broker's clock went back; sign and send it again",
            code=Code.TOO_EARLY,
        )
    user_id, agent = command.actor.user_id, command.actor.agent
    signer = agent.agent_id if agent else user_id
    kind: SubjectKind = "agent" if agent else "user"
    if signer is not None and command.appended_at_ms <= around.changed_ms(kind, signer):
        raise CommandRefusedError(
            f"appended in the same moment as a change of its signer, {signer}; sign and send it again",
            code=Code.TOO_EARLY,
        )


def _check_signer_key(command: Authorised, around: Surroundings) -> None:
    """Refuse a granting command if its key, or that of its consent, rests on a compromised key that is not ended yet.

    Only for new commands: a reader judges by the end of the key itself.
    """
    reports = isinstance(command.claims, UserEndKey) and command.claims.compromised
    own = reports and command.actor.user_id == command_subject(command.claims, command.command_id)[1]
    judges = isinstance(command.claims, UserReviewCompromise) or (reports and not own)
    if only_reduces(command.claims) and not judges:
        return
    signers = [(command.claims.iss, command.signer_key.kid)]
    if command.consent is not None and command.consent.kid is not None:
        signers.append((command.consent.mark[0], command.consent.kid))
    for iss, kid in signers:
        if isinstance(verdict := around.check_vouchers(iss, kid), Refused):
            message = f"{verdict.reason.message}; sign with another key"
            raise CommandRefusedError(message, code=Code.KEY_VOUCHER_COMPROMISED)


def _check_apart(state: AnyState, authorised: Authorised, around: Surroundings) -> None:
    """Refuse a review, or a second report, by an operator whose roles rest on one of the people concerned.

    Only for new commands: a reader judges by the keys, which it knows without other records.
    """
    command, user_id = authorised.claims, authorised.actor.user_id
    people: set[str | None] = set()
    current = around.current(*command_subject(command, authorised.command_id))
    before = current.state.holds if current else ()
    if isinstance(command, UserReviewCompromise):
        people = {
            person for one in before if one.report == command.report for person in (one.by, one.user_id)
        }
    elif (
        isinstance(command, UserEndKey)
        and len(state.holds) > len(before)
        and state.holds[-1].status == "held"
    ):
        people = {one.by for one in before if one.kid == command.kid and one.status == "proposed"}
    if user_id is None:
        return
    for person in sorted(people - {None, user_id}, key=str):
        if around.roles_rest(user_id, str(person), authorised.appended_at_ms):
            raise CommandRefusedError(
                f"the roles of {user_id} rest on the word of {person}: another operator, or the root, has to sign",
                code=Code.ENDORSEMENT_NOT_APART,
            )


def _check_fields(command: Command, subject: Subject, authorised: Authorised, around: Surroundings) -> None:
    """Refuse a granting command with an unknown field, because the field could limit what is granted.

    A command that takes away is accepted and stops as much as it can. The check is for new commands alone: every reader
    computes old records, with their commands, again.
    """
    if only_reduces(command):
        return
    _require_understood(command, " ".join(subject))
    if isinstance(command, TaskAssign) and authorised.consent is not None:  # it was verified with the command
        if command.consent is not None:
            _require_understood(parse(command.consent).unverified_claims(TaskConsent), "the consent")
        elif command.id_token is not None:
            issuer = around.issuer_of(command.id_token, authorised.appended_at_ms)
            if issuer is not None:
                _require_understood(issuer, f"issuer {issuer.issuer} in the trust bundle")
    if isinstance(command, UserAddKey):
        for embedded, model, what in (
            (command.invitation, UserInvite, "the invitation"),
            (command.possession, KeyPossession, "the possession"),
            (command.endorsement, KeyEndorsement, "the co-signature"),
        ):
            if embedded is not None:
                _require_understood(parse(embedded).unverified_claims(model), what)
    delegation = authorised.actor.delegation
    if isinstance(command, UserSet) and delegation is not None and command.provisioned is not None:
        groups = command.provisioned.groups
        gives = bool(command.roles or command.entitlements.scope)
        if gives and set(given_by(delegation, groups).groups) != set(groups):
            _require_understood(delegation, f"what is delegated to {authorised.actor.user_id}")


def _require_understood(message: Message, what: str) -> None:
    if unknown := unknown_fields(message):
        raise CommandRefusedError(describe_unknown(unknown, what)[:2048], code=Code.UNKNOWN_FIELD)


def _check_keys(command: Command, subject: Subject, around: Surroundings, at_s: int) -> None:
    match command:
        case UserSet() | ProvisionerSet() | AgentRegister() | TargetSet():
            keys = command.keys
        case AgentRotateKey() | UserAddKey():
            keys = (command.key,) if command.key else ()
        case AgentRenewKey():
            keys = (KeyRecord(kid=thumbprint(command.key), jwk=command.key, not_after=at_s),)
        case _:
            return
    for key in keys:
        if other_holders := [holder for holder in around.holders(key.kid) if holder != subject]:
            kind, id = min(other_holders)
            raise CommandRefusedError(
                f"key {key.kid} belongs to {kind} {id}; a key has one owner: make another",
                code=Code.KEY_TAKEN,
            )
        if key.not_after > LAST_MOMENT_S:
            raise CommandRefusedError(
                f"key {key.kid} would end after the year 9999; give it an earlier not_after",
                code=Code.KEY_INVALID,
            )
    for key in keys:
        if key.credential_id is None or key.not_after <= at_s:
            continue
        for user, known in around.passkeys(key.credential_id, at_s):
            if known.kid != key.kid:
                raise CommandRefusedError(
                    f"the credential id of key {key.kid} is that of key {known.kid} of {user.user_id}; end that one "
                    "first, or make another passkey",
                    code=Code.CREDENTIAL_TAKEN,
                )
    if isinstance(command, UserAddKey) and command.key.use is not None and command.key.rp_id != around.rp_id:
        raise CommandRefusedError(
            f"the passkey was made for {command.key.rp_id}, and the trust bundle names {around.rp_id or 'no domain'}; "
            "make one on the sign page of this organisation",
            code=Code.RP_ID_UNEXPECTED,
        )


def _check_target(command: TargetSet) -> None:
    """Refuse a reserved name, and settings that a built-in backend would not understand.

    Only the issuer knows the backends of other packages.
    """
    if reserved := reserved_name(command.target_id, command.backend):
        raise CommandRefusedError(reserved, code=Code.NAME_RESERVED)
    if mistakes := problems(command.backend):
        raise CommandRefusedError(
            f"the settings of target {command.target_id} are wrong: {'; '.join(mistakes)}",
            code=Code.TARGET_SETTINGS_INVALID,
        )


def _check_transfer_consent(authorised: Authorised, revision: int) -> None:
    """Refuse a consent to a transfer that is to another revision. Readers do not know the revision of that day."""
    consent = authorised.consent
    if consent is None or consent.transfer is None:
        return
    transfer = consent.transfer
    _require_understood(transfer, "the consent")
    if transfer.revision != revision:
        raise CommandRefusedError(
            f"{consent.user_id} consented to revision {transfer.revision} of agent {transfer.agent_id}, which has "
            f"changed since, to revision {revision}; ask for another consent",
            code=Code.CONSENT_STALE,
        )


def _check_task(command: TaskAssign, authorised: Authorised, around: Surroundings) -> None:
    _check_people((command.terms.agent_id,), command.on_behalf_of, around)
    used = authorised.consent if uses_consent(command, authorised.actor.user_id) else None
    if used is not None and used.address_unverified:
        raise CommandRefusedError(
            "the ID token does not say that its email was verified (email_verified): take another claim, or let the "
            "root say that this issuer verifies all of them: ringfence init --oidc-issuer ... --oidc-emails-verified",
            code=Code.EMAIL_UNVERIFIED,
        )
    if used is not None and (task := around.task_of_consent(*used.mark)):
        raise CommandRefusedError(
            f"this consent was used for task {task}; ask {command.on_behalf_of} for another",
            code=Code.CONSENT_USED,
        )


def task_is_longer(not_after: int, assigned_ms: int, task_max_s: int) -> bool:
    """Return whether a task that was assigned then lasts longer than new tasks may.

    The command's signer computed the end by their own clock, which may be a little ahead.
    """
    return not_after - assigned_ms / 1000 > task_max_s + LEEWAY_S


def _check_task_length(terms: TaskTerms, at_ms: int, task_max_s: int) -> None:
    """Refuse a new task that would last longer than the limit.

    Only the registry checks this, when a command arrives: readers accept records that were made under another limit.
    """
    if task_is_longer(terms.not_after, at_ms, task_max_s):
        latest = utc_text(at_ms // 1000 + task_max_s)
        raise CommandRefusedError(
            f"the task would end later than a new task may, which is {latest} (RINGFENCE_TASK_MAX_S is {task_max_s}); "
            "give it an earlier end",
            code=Code.TASK_TOO_LONG,
        )


def _check_part(task: TaskState, around: Surroundings) -> None:
    """Refuse a part of a task unless all its agents can act now and the limit of parts is kept."""
    _check_people(agents_of(task), task.on_behalf_of, around)
    parent = task.parent or ""
    if around.parts_of(parent) >= MAX_PARTS:
        raise CommandRefusedError(
            f"{MAX_PARTS} parts of task {parent} were handed on, and no more can be; have another task assigned",
            code=Code.TOO_MANY_PARTS,
        )


def _check_limits(terms: TaskTerms, around: Surroundings) -> None:
    """Refuse limits of a task that its agent's ceiling does not have. Gateways apply the ceiling's in any case."""
    agent = around.agent(terms.agent_id)
    if higher := higher_limits(terms.limits, agent.limits if agent is not None else None):
        raise CommandRefusedError(
            f"the ceiling of {terms.agent_id} has a lower limit of {' and '.join(higher)}: give the task as much, or "
            "less",
            code=Code.LIMIT_BEYOND_CEILING,
        )


def _check_people(agent_ids: Iterable[str], user_id: str, around: Surroundings) -> None:
    for agent_id in agent_ids:
        agent = around.agent(agent_id)
        if agent is None:
            raise CommandRefusedError(f"there is no agent {agent_id}", code=Code.UNKNOWN_AGENT)
        if agent.status != "active":
            raise CommandRefusedError(
                f"agent {agent_id} is {agent.status}", code=inactive_agent(agent.status)
            )
    user = around.user(user_id)
    if user is None or user.status != "active":
        raise CommandRefusedError(f"{user_id} is no active user", code=Code.USER_DISABLED)


def uses_consent(command: TaskAssign, signer: str | None) -> bool:
    """Return whether a task rests on the embedded consent.

    If the signer acts for themself, the consent is not used up.
    """
    embedded = command.consent is not None or command.id_token is not None
    return embedded and command.on_behalf_of != signer


def keys_of(state: AnyState) -> frozenset[str]:
    """Return the thumbprints of all keys that a subject has or had."""
    if isinstance(state, UserState | AgentState | TargetState):
        return frozenset(key.kid for key in state.keys)
    return frozenset()
