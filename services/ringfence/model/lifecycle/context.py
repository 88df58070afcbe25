"""The context in which a command is decided, besides the state of its subject, and checks that several commands
share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.crypto.keys import public_key
from ringfence.messages.base import KeyRecord, Scope
from ringfence.messages.codes import AnyCode, Code
from ringfence.messages.enrolment import AttestationSelector
from ringfence.messages.registry import (
    AgentState,
    AgentTransferConsent,
    Delegation,
    Hold,
    Role,
    TaskState,
    UserState,
)
from ringfence.model.identity.attestation import problem, selector_id
from ringfence.model.lifecycle.key_history import NO_HISTORY, KeyHistory, KeyOrigin, KeyProof
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.scope import validate_scope

ROOT_NAME: Final = "root"
"""How lists and messages name the root key where they name users."""


class CommandRefusedError(RingfenceError):
    """Raised when the signer may not give a command, or when it does not fit the state of its subject."""

    def __init__(self, message: str, *, code: AnyCode) -> None:
        super().__init__(message, code=code)


@dataclass(frozen=True, slots=True)
class Actor:
    """The verified signer of a command. The root and agents have no user id."""

    user_id: str | None
    roles: frozenset[Role]
    delegation: Delegation | None = None
    """A provisioner's delegation: all that it may do."""
    provisioned_by: str | None = None
    """The provisioner of a user who comes from a directory."""
    agent: AgentState | None = None
    """The signing agent's state at that time. Agents may give few commands."""
    is_service: bool = False
    """Whether a service signed it. Services only report what other signatures prove."""
    kid: str = ""
    """The key that signed the command."""
    origin: KeyOrigin | None = None
    by_passkey: bool = False
    hold: Hold | None = None
    """Why the signer grants nothing: their record rests on a compromised key."""

    @property
    def is_root(self) -> bool:
        return self.user_id is None and self.agent is None and not self.is_service

    @property
    def is_operator(self) -> bool:
        return "operator" in self.roles


@dataclass(frozen=True, slots=True)
class KeyUse:
    """A message with a valid signature by one key of an agent, of whatever validity."""

    kid: str
    signed_s: int
    """Its `iat`."""


@dataclass(frozen=True, slots=True)
class Context:
    """The context in which a command is decided, besides the state of its subject."""

    actor: Actor
    at_s: int
    """The append time of the command, in seconds."""
    command_id: str
    """The UUIDv5 of (`iss`, `jti`): the id of what the command creates."""
    roles_of: Callable[[str], frozenset[Role]]
    """Returns the roles that a user had at that time."""
    at_ms: int = 0
    """The append time of the command, in milliseconds."""
    command_digest: str = ""
    """SHA-256 of the command (compact JWS)."""
    last_signed_s: int = 0
    """The latest `iat` of the commands that led to the state, in seconds."""
    consent_by: str | None = None
    """Who validly signed the embedded consent over the very same terms."""
    transfer_consent: AgentTransferConsent | None = None
    """The new sponsor's consent, if it is to the transfer of the same agent."""
    consent_problem: str | None = None
    key_history: KeyHistory = NO_HISTORY
    """The origins of the keys of the user or agent whom the command is about, as of before it."""
    signer_kid: str = ""
    """The key that signed the command."""
    person_signed_s: int = 0
    """The append time of the last command about the subject that a person signed, in seconds."""
    reuse: KeyUse | None = None
    """What a report of reuse embeds, if its signature is valid."""
    reuse_problem: str | None = None
    key_proof: KeyProof | None = None
    """What a `user.add-key` embeds, if all of it is valid."""
    key_proof_problem: str | None = None
    sponsor_of: Callable[[str], str | None] | None = None
    """Returns the sponsor of an agent at that time. None for a reader of records, which no longer knows it."""
    task_at: Callable[[str], TaskState | None] = lambda task_id: None


# Checks that commands about different subjects share. Each raises CommandRefusedError.


def operator_only(context: Context, what: str) -> None:
    """Raise CommandRefusedError unless the signer is an operator.

    `what` names, in the message, what only they may do.
    """
    if not context.actor.is_operator:
        raise CommandRefusedError(f"only an operator may {what}", code=Code.NOT_OPERATOR)


def check_sponsor(user_id: str, context: Context) -> None:
    """Raise CommandRefusedError unless the user is active and has the role sponsor."""
    if "sponsor" not in context.roles_of(user_id):
        raise CommandRefusedError(
            f"{user_id} is no active user with the role sponsor; give it with: ringfence user set",
            code=Code.NOT_A_SPONSOR,
        )


def check_keys(keys: Sequence[KeyRecord], at_s: int, *, at_least: int, passkeys: bool = False) -> None:
    """Raise CommandRefusedError unless each key is listed once, under its own thumbprint, and `at_least` keys are
    valid at `at_s`. Only people have `passkeys`.
    """
    if len({key.kid for key in keys}) != len(keys):
        raise CommandRefusedError("one key is listed twice", code=Code.KEY_TWICE)
    for key in keys:
        if "d" in (key.jwk.model_extra or {}):
            raise CommandRefusedError(
                f"key {key.kid} comes with its private part, which everyone can now read; make another key",
                code=Code.PRIVATE_KEY,
            )
        try:
            thumbprint = public_key(key.jwk).kid
        except ValueError as error:
            raise CommandRefusedError(
                f"key {key.kid} cannot be used: {error}", code=Code.KEY_INVALID
            ) from None
        if thumbprint != key.kid:
            raise CommandRefusedError(
                f"key {key.kid} is not named by its RFC 7638 thumbprint, {thumbprint}", code=Code.KEY_INVALID
            )
        if reason := _kind_problem(key, passkeys=passkeys):
            raise CommandRefusedError(f"key {key.kid} cannot be used: {reason}", code=Code.KEY_INVALID)
    if sum(key.not_before <= at_s < key.not_after for key in keys) < at_least:
        raise CommandRefusedError("no key is valid now; see not_before and not_after", code=Code.NO_VALID_KEY)


def _kind_problem(key: KeyRecord, *, passkeys: bool) -> str | None:
    """Return what is wrong with the fields that only passkeys have, or None."""
    if key.use is None:
        told = (key.credential_id, key.rp_id, key.aaguid, key.backup_eligible, key.attested)
        return "it has fields that only a passkey has" if any(one is not None for one in told) else None
    if not passkeys:
        return "only people have passkeys"
    if key.jwk.kty != "EC":
        return "a passkey is a P-256 key"
    if key.credential_id is None or key.rp_id is None:
        return "a passkey has a credential id and an rpId"
    return None


def check_attestation(selectors: Sequence[AttestationSelector]) -> None:
    """Raise CommandRefusedError unless each selector names whose workload it matches."""
    if len({selector_id(selector) for selector in selectors}) != len(selectors):
        raise CommandRefusedError("one selector is listed twice", code=Code.SELECTOR_TWICE)
    for selector in selectors:
        if reason := problem(selector):
            raise CommandRefusedError(reason, code=Code.SELECTOR_TOO_WIDE)


def ended_keys(state: UserState | None, new: Sequence[KeyRecord], at_s: int) -> tuple[KeyRecord, ...]:
    """Return the user's former keys that are not among the new ones. They end at `at_s`, and stay known."""
    listed = {key.kid for key in new}
    unlisted = [key for key in (state.keys if state else ()) if key.kid not in listed]
    return tuple(key.model_copy(update={"not_after": min(key.not_after, at_s)}) for key in unlisted)


def check_user_id(user_id: str) -> None:
    """Raise CommandRefusedError for the id of a user that people would take for the root."""
    if user_id == ROOT_NAME:
        raise CommandRefusedError(
            f"{ROOT_NAME} is no id for a user: lists name the root key so; choose another",
            code=Code.NAME_RESERVED,
        )


def check_scope(scope: Scope, *, allow_empty: bool = False) -> None:
    """Raise CommandRefusedError unless the scope is well formed, so that it can be compared."""
    try:
        validate_scope(scope, allow_empty=allow_empty)
    except ScopeError as error:
        raise CommandRefusedError(str(error), code=Code.SCOPE_INVALID) from None
