"""Second person (dual control): who may second a widening command, and on whose word each of the two rests. Pure.

A widening command takes effect once two people signed it who are independent: no person is, or has made, both of them
(ADR 0102). The registry checks it before it publishes, and every reader checks it again in the record's chain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final, NamedTuple

from ringfence.kernel.base.clock import utc_text
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    MAX_PROPOSAL_S,
    AgentActivate,
    AgentRegister,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentState,
    AgentTransfer,
    AnyState,
    Command,
    TargetSet,
    UserSet,
    UserState,
)
from ringfence.messages.trust import SecondPerson
from ringfence.model.lifecycle.apply import command_subject
from ringfence.model.lifecycle.context import Actor
from ringfence.model.lifecycle.holds import hold_text
from ringfence.model.lifecycle.key_history import WAIT_S
from ringfence.model.lifecycle.state_comparison import delegates_operator, grows, widens
from ringfence.model.verdict import ALLOWED, Verdict, refused

REST_S: Final = 7 * 24 * 3600
"""How long what two independent people gave rests on both. A constant: no setting shortens it."""
PROPOSAL_MS: Final = MAX_PROPOSAL_S * 1000
_ABOUT_AGENTS = (
    AgentRegister, AgentActivate, AgentSetCeiling, AgentSetAttestation, AgentTransfer, AgentRotateKey, AgentResume
)  # fmt: skip
_WHOLE_STATE = (UserSet, AgentSetCeiling, AgentSetAttestation, TargetSet)


class Word(NamedTuple):
    """A person on whose word a user rests. A directory, that is a provisioner, is one person."""

    user_id: str
    until_ms: int | None
    """None: for good."""


@dataclass(frozen=True, slots=True)
class Provenance:
    """On whose word the keys, roles and provisioning of a user rest, as of one command."""

    words: frozenset[Word] = frozenset()
    counts_from_ms: Mapping[str, int] = field(default_factory=lambda: MappingProxyType({}))
    """Since when each key proposes and seconds: a day after somebody else gave it, other than the root."""

    def people(self, at_ms: int) -> frozenset[str]:
        """Return the ids of the people on whose word the user rests at `at_ms`."""
        return frozenset(one.user_id for one in self.words if one.until_ms is None or at_ms < one.until_ms)

    def alone(self) -> frozenset[str]:
        """Return the ids of the people each of whom gave the user something without an independent second person."""
        return frozenset(one.user_id for one in self.words if one.until_ms is None)

    def after(
        self,
        before: UserState | None,
        state: UserState,
        command: Command,
        signatures: Signatures,
        endorser: Person | None = None,
    ) -> Provenance:
        """Return the provenance after a command that made `state` of `before`.

        `endorser`: who co-signed a `user.add-key`.
        """
        at_ms, author = signatures.at_ms, signatures.author
        live = {key.kid for key in state.keys if key.not_after * 1000 > at_ms}
        had = {key.kid for key in before.keys if key.not_after * 1000 > at_ms} if before else set()
        from_ms = dict(self.counts_from_ms)
        if author.actor.is_root:
            listed = {key.kid for key in command.keys} if isinstance(command, UserSet) else set()
            from_ms |= dict.fromkeys(live - had, at_ms) | {
                kid: min(from_ms.get(kid, at_ms), at_ms) for kid in listed
            }
            words = frozenset() if isinstance(command, UserSet) else self.words
            return Provenance(words, MappingProxyType(from_ms))
        if author.actor.user_id == state.user_id:
            since_ms = max(at_ms, from_ms.get(author.actor.kid, at_ms))
            return Provenance(self.words, MappingProxyType(from_ms | dict.fromkeys(live - had, since_ms)))
        if not grows(before, state):
            return self
        from_ms |= dict.fromkeys(live - had, at_ms + WAIT_S * 1000)
        people = [author, *(one for one in (signatures.second, endorser) if one is not None)]
        given = {word for one in people for word in one.control(at_ms)}
        if signatures.second is not None:
            given = {_until(word, at_ms + REST_S * 1000) for word in given}
        return Provenance(self.words | given, MappingProxyType(from_ms))


NO_PROVENANCE: Final = Provenance()


def _until(word: Word, until_ms: int) -> Word:
    return Word(word.user_id, until_ms if word.until_ms is None else min(word.until_ms, until_ms))


@dataclass(frozen=True, slots=True)
class Person:
    """Who signed a command or seconded it, verified, and what they rest on."""

    actor: Actor
    provenance: Provenance = NO_PROVENANCE

    def control(self, at_ms: int) -> frozenset[Word]:
        """Return everybody who may be behind this person: themself, and all on whose word they rest."""
        own = {Word(self.actor.user_id, None)} if self.actor.user_id is not None else set()
        return (
            frozenset(
                word for word in self.provenance.words if word.until_ms is None or at_ms < word.until_ms
            )
            | own
        )


@dataclass(frozen=True, slots=True)
class Signatures:
    """Who signed a command, as of the moment at which it takes effect."""

    author: Person
    at_ms: int
    """When it takes effect: the append time of the second signature, or of the command if there is none."""
    second: Person | None = None
    proposed_ms: int = 0
    """The append time of the command itself."""


def needs_second(
    old: AnyState | None, new: AnyState, command: Command, signatures: Signatures, mode: SecondPerson
) -> bool:
    """Return whether a command needs a second person. `mode`: that of the moment at which it was appended.

    The root needs none: it is the beginning, and the recovery.
    """
    return mode == "required" and not signatures.author.actor.is_root and widens(old, new, command)


def check_widening(
    old: AnyState | None,
    new: AnyState,
    command: Command,
    signatures: Signatures,
    mode: SecondPerson,
    sponsors: Collection[str],
) -> Verdict:
    """Check that a command that made `new` of `old` has the second person that it needs, if it needs one.

    `sponsors`: all present and former sponsors of the command's agent, and a new one that the command names.
    """
    if signatures.second is None and not needs_second(old, new, command, signatures, mode):
        return ALLOWED
    if mode == "required" and delegates_operator(old, new):
        return refused(
            Code.OPERATOR_NEEDS_ROOT,
            "only the root lets a provisioner make operators; sign with the root's key",
        )
    if signatures.second is None:
        message = f"{command.typ} widens what somebody may do, and waits for a second person"
        return refused(Code.SECOND_MISSING, message)
    return check_second(command, signatures, sponsors)


def check_author(signatures: Signatures) -> Verdict:
    """Check that the author's key may propose: nobody else gave it within a day."""
    return _check_key(signatures.author, signatures.proposed_ms or signatures.at_ms)


def check_second(command: Command, signatures: Signatures, sponsors: Collection[str]) -> Verdict:
    """Check a second person, in this order. `sponsors`: see `check_widening`.

    1. It is within a day of the proposal (`proposal_lapsed`).
    2. It is a person, somebody else than the author (`second_is_author`), and not the user whom it is about.
    3. They have the role (`second_not_entitled`), and their record rests on no compromised key.
    4. Unless it is about an agent, one of both signs with a key file (`second_by_passkey`).
    5. Nobody else gave their keys within a day (`key_too_new`).
    6. No person is, or is behind, both (`second_not_apart`).
    """
    author, second, at_ms = signatures.author, signatures.second, signatures.at_ms
    assert second is not None
    if not 0 <= at_ms - signatures.proposed_ms < PROPOSAL_MS:
        return refused(Code.PROPOSAL_LAPSED, "nobody seconded it within a day; propose it anew")
    who = second.actor.user_id
    if who is not None and who == author.actor.user_id:
        return refused(Code.SECOND_IS_AUTHOR, f"{who} proposed it; somebody else has to second it")
    if not may_second(command, second.actor, sponsors):
        return refused(
            Code.SECOND_NOT_ENTITLED, f"{who or 'this signer'} may not second it: {_entitled_text(command)}"
        )
    if second.actor.hold is not None:
        return refused(Code.RESTS_ON_COMPROMISED, hold_text(f"user {who}", second.actor.hold))
    if author.actor.by_passkey and second.actor.by_passkey and not isinstance(command, _ABOUT_AGENTS):
        return refused(
            Code.SECOND_BY_PASSKEY,
            f"{author.actor.user_id} and {who} both signed with a passkey; one of both needs a key file for a "
            f"{command.typ}",
        )
    for person, since_ms in ((author, signatures.proposed_ms), (second, at_ms)):
        verdict = _check_key(person, since_ms)
        if verdict is not ALLOWED:
            return verdict
    behind = _people(author.control(at_ms)) & _people(second.control(at_ms))
    if behind:
        return refused(
            Code.SECOND_NOT_APART,
            f"{author.actor.user_id} and {who} are not independent: both are, or rest on the word of, "
            f"{', '.join(sorted(behind))}; somebody else has to second it",
        )
    return ALLOWED


def may_second(command: Command, actor: Actor, sponsors: Collection[str]) -> bool:
    """Return whether a person has the role to second a command, whoever proposed it."""
    if actor.user_id is None or actor.delegation is not None:
        return False
    if command_subject(command, "") == ("user", actor.user_id):
        return False
    if actor.is_operator:
        return True
    return isinstance(command, _ABOUT_AGENTS) and "sponsor" in actor.roles and actor.user_id not in sponsors


def _entitled_text(command: Command) -> str:
    if isinstance(command, _ABOUT_AGENTS):
        return (
            "an operator may, or a sponsor who neither is nor was the agent's, nor the user for whom it works"
        )
    return "an operator may, whom it is not about"


def _check_key(person: Person, at_ms: int) -> Verdict:
    kid, who = person.actor.kid, person.actor.user_id
    counts_ms = person.provenance.counts_from_ms.get(kid, 0)
    if counts_ms <= at_ms:
        return ALLOWED
    return refused(
        Code.KEY_TOO_NEW,
        f"somebody else gave {who} key {kid}: it proposes and seconds from {utc_text(counts_ms / 1000)}",
    )


def _people(words: Iterable[Word]) -> frozenset[str]:
    return frozenset(one.user_id for one in words)


def sponsors_of(states: Iterable[AnyState | None], command: Command) -> frozenset[str]:
    """Return all who ever were the sponsor of an agent by its states, and whom `command` names."""
    named = {command.sponsor} if isinstance(command, AgentRegister | AgentTransfer) else set()
    return frozenset(state.sponsor for state in states if isinstance(state, AgentState)) | named


def is_compared(command: Command, second: object | None, mode: SecondPerson, *, alone: bool) -> bool:
    """Return whether a command of a record counts only because it narrows what the commands before it gave.

    Nothing before such a command is dropped from the record: it could widen what is left.

    Args:
        second: its second signature, if there is one.
        mode: that of the moment at which it was appended.
        alone: whether its signer needs no second person: the root, and a user's provisioner.
    """
    return mode == "required" and second is None and not alone and isinstance(command, _WHOLE_STATE)
