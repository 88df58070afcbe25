"""Blast radius of a compromised key: what rests on it since a time, in all records of a directory. Pure.

Everything follows from the signed commands that records embed, as every service verifies them. A command rests on the
key if the key signed it, or a key that rests on it, or somebody whose roles rest on it. The root's commands never do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import kid_of, parse
from ringfence.messages.registry import (
    AgentState,
    AnyState,
    Command,
    CommandSecond,
    EmbeddedCommand,
    HeldSubject,
    TargetState,
    TaskAssign,
    TaskConsent,
    TaskState,
    UserEndKey,
    UserState,
)
from ringfence.model.identity.spiffe_ids import SubjectKind, subject_of
from ringfence.model.lifecycle import KeyOrigin, elements_set_by
from ringfence.model.records.command_chain import unverified_command
from ringfence.model.records.directory import Directory, VerifiedRecord

KINDS: tuple[SubjectKind, ...] = ("user", "agent", "target", "task")


@dataclass(frozen=True, slots=True)
class Resting:
    """A subject that rests on a compromised key, and since when."""

    held: HeldSubject
    given_ms: int
    """The append time of the first command by which it does."""


@dataclass(slots=True)
class _Elements:
    """The elements of one part of a record, and which of them rest on the key: each with the time it was given."""

    resting_ms: dict[str, int] = field(default_factory=dict)
    others: frozenset[str] = frozenset()
    anew: bool = False
    """Whether a report held the part: the next command that sets it gives all of it."""

    def set(self, elements: frozenset[str], at_ms: int, *, rests: bool, anew: bool) -> None:
        former, others = self.resting_ms, self.others
        if anew or self.anew:
            former, others = {}, frozenset()
        new = elements - others if rests else elements & former.keys()
        self.resting_ms = {one: former.get(one, at_ms) for one in new}
        self.others = elements - self.resting_ms.keys()
        self.anew = False


class KeyCompromise:
    """A key of a user that may have been in other hands since `since_ms`, an append time.

    The constructor raises ChainError if the user's record does not verify.
    """

    def __init__(self, directory: Directory, user_id: str, kid: str | None, since_ms: int = 0) -> None:
        """`kid`: None for all keys that the user ever had."""
        self._directory = directory
        self.user_id = user_id
        self.since_ms = since_ms
        history = directory.key_history(user_id)
        self.own_keys = frozenset(history.origins) if kid is None else history.added_by(kid) | {kid}
        """The thumbprints that one `user.end-key` ends: the key, and all that it added to the same user."""
        self._roles: dict[str, list[tuple[int, bool]]] = {}
        """By user: since when their roles rest on the key, or no longer do."""
        self._follow_roles()

    def resting(self, now_s: float, kinds: Iterable[SubjectKind] = KINDS) -> list[Resting]:
        """Return what rests on the key, oldest first. What has ended is left out."""
        found = [
            one
            for kind in kinds
            for entry in self._directory.entries_since(kind, self.since_ms)
            if (one := self.resting_of(kind, entry, now_s)) is not None
        ]
        return sorted(found, key=lambda one: (one.given_ms, one.held.kind, one.held.id))

    def resting_of(self, kind: SubjectKind, entry: VerifiedRecord[AnyState], now_s: float) -> Resting | None:
        """Return how one verified record rests on the key, or None."""
        if _is_over(entry.state, now_s):
            return None
        id = entry.record.sub.rpartition("/")[2]
        given = {
            part: min(elements.resting_ms.values())
            for part, elements in self._parts(kind, id, entry.record.commands).items()
            if elements.resting_ms
        }
        given |= self._keys(id, entry.state, now_s)
        if not given:
            return None
        last = entry.record.commands[-1].jws
        held = HeldSubject(
            kind=kind, id=id, revision=entry.revision, digest=digest(last), parts=tuple(sorted(given)[:64])
        )
        return Resting(held, min(given.values()))

    def rests(self, command: Command, embedded: EmbeddedCommand) -> bool:
        """Return whether a verified command rests on the key."""
        at_ms = embedded.appended_at_ms
        return at_ms >= self.since_ms and any(
            self._signer_rests(iss, kid, at_ms) for iss, kid in _signers(command, embedded)
        )

    def roles_rest(self, user_id: str, at_ms: int) -> bool:
        """Return whether a role that a user had just before a moment rests on the key."""
        steps = [rest for step_ms, rest in self._roles.get(user_id, ()) if step_ms < at_ms]
        return bool(steps) and steps[-1]

    def _signer_rests(self, iss: str, kid: str, at_ms: int) -> bool:
        trust_domain = self._directory.trust.trust_domain
        if user_id := subject_of(trust_domain, iss, "user"):
            if user_id == self.user_id and kid in self.own_keys:
                return True
            origin = self._directory.chains.key_history_at(user_id, at_ms).origins.get(kid)
            return self.roles_rest(user_id, at_ms) or self._key_rests(origin)
        agent_id = subject_of(trust_domain, iss, "agent")
        return bool(agent_id) and self._key_rests(
            self._directory.agent_key_history(agent_id or "").origins.get(kid)
        )

    def _key_rests(self, origin: KeyOrigin | None) -> bool:
        return origin is not None and self._given_ms(origin) is not None

    def _given_ms(self, origin: KeyOrigin) -> int | None:
        """Return when the key, or somebody whose roles rest on it, first gave another key; None if none did."""
        times = [
            giver.at_ms
            for giver in origin.givers
            if giver.at_ms >= self.since_ms
            and (
                (giver.user_id == self.user_id and giver.kid in self.own_keys)
                or self.roles_rest(giver.user_id, giver.at_ms)
            )
        ]
        return min(times, default=None)

    def _keys(self, id: str, state: AnyState, now_s: float) -> dict[str, int]:
        match state:
            case UserState():
                origins, own = self._directory.key_history(id).origins, id == self.user_id
            case AgentState():
                origins, own = self._directory.agent_key_history(id).origins, False
            case _:
                return {}
        live = {key.kid for key in state.keys if key.not_after > now_s} - set(state.compromised or ())
        return {
            f"key:{kid}": given_ms
            for kid, origin in origins.items()
            if kid in live and not (own and kid in self.own_keys)
            if (given_ms := self._given_ms(origin)) is not None
        }

    def _parts(self, kind: SubjectKind, id: str, commands: Iterable[EmbeddedCommand]) -> dict[str, _Elements]:
        parts: dict[str, _Elements] = {}
        for embedded in commands:
            self._follow(parts, (kind, id), embedded)
        return parts

    def _follow(
        self, parts: dict[str, _Elements], subject: tuple[SubjectKind, str], embedded: EmbeddedCommand
    ) -> None:
        command = unverified_command(embedded)  # of a record that holds
        if isinstance(command, UserEndKey):
            for listed in command.holds or ():
                if (listed.kind, listed.id) == subject:
                    for part in listed.parts:
                        parts.setdefault(part, _Elements()).anew = True
            return
        root = command.iss == self._directory.trust.root_id
        set_by = elements_set_by(command)
        rests = bool(set_by) and self.rests(command, embedded)
        for part, elements in set_by.items():
            parts.setdefault(part, _Elements()).set(elements, embedded.appended_at_ms, rests=rests, anew=root)

    def _follow_roles(self) -> None:
        """Follow the roles of all users in the order of their commands, as far as they changed since `since_ms`.

        In this order each signer's own roles are known before what they signed, whatever the length of the chain.
        """
        commands = sorted(
            (
                (embedded.appended_at_ms, entry.state.user_id, number)
                for entry in _users(self._directory, self.since_ms)
                for number, embedded in enumerate(entry.record.commands)
            ),
        )
        parts: dict[str, dict[str, _Elements]] = {}
        for at_ms, user_id, number in commands:
            entry = self._directory.user(user_id)
            assert entry is not None
            of_user = parts.setdefault(user_id, {})
            self._follow(of_user, ("user", user_id), entry.record.commands[number])
            rest = any(of_user[part].resting_ms for part in ("roles", "delegation") if part in of_user)
            steps = self._roles.setdefault(user_id, [])
            if rest != (bool(steps) and steps[-1][1]):
                steps.append((at_ms, rest))


def _users(directory: Directory, since_ms: int) -> Iterator[VerifiedRecord[UserState]]:
    for entry in directory.entries_since("user", since_ms):
        assert isinstance(entry.state, UserState)
        yield VerifiedRecord(entry.state, entry.revision, entry.record, entry.compact)


def _signers(command: Command, embedded: EmbeddedCommand) -> Iterator[tuple[str, str]]:
    """Yield (`iss`, `kid`) of everybody on whose signature a verified command rests."""
    yield command.iss, kid_of(embedded.jws)
    if embedded.second is not None:
        yield parse(embedded.second.jws).unverified_claims(CommandSecond).iss, kid_of(embedded.second.jws)
    if isinstance(command, TaskAssign) and command.consent is not None:
        try:
            yield parse(command.consent).unverified_claims(TaskConsent).iss, kid_of(command.consent)
        except InvalidMessageError:
            return  # it counted for nothing


def _is_over(state: AnyState, now_s: float) -> bool:
    match state:
        case UserState():
            return state.status == "disabled"
        case AgentState():
            return state.status == "decommissioned"
        case TargetState():
            return state.status == "removed"
        case TaskState():
            return state.status == "ended" or state.not_after <= now_s
