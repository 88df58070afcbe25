"""In-memory state of the registry besides the records, rebuilt from Kafka at start.

It holds where each command was handled, which tells a redelivery from a replay. It also holds who owns which key, which
consents are used up, how many parts of a task were handed on, and the latest append time.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.claims import LEEWAY_S, MAX_LIFE_S
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.oidc import TokenError, unverified_issuer
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import KeyRecord
from ringfence.messages.credential import Coordinates
from ringfence.messages.registry import (
    AgentState,
    AnyState,
    Command,
    CommandSecond,
    EmbeddedCommand,
    Role,
    TaskAssign,
    TaskConsent,
    TaskState,
    UserState,
)
from ringfence.messages.trust import OidcIssuer, SecondPerson
from ringfence.model.identity.spiffe_ids import SubjectKind, subject_of
from ringfence.model.lifecycle import KeyHistory, agents_of
from ringfence.model.records.command_chain import ChainError, unverified_command
from ringfence.model.records.consent import unverified_mark
from ringfence.model.records.directory import Directory, compared_command
from ringfence.model.records.key_compromise import KeyCompromise
from ringfence.model.verdict import Verdict
from ringfence.registry.domain import Current, Embedded, Subject, keys_of, uses_consent

REMEMBERED_MS = (MAX_LIFE_S + LEEWAY_S + 600) * 1000
"""How long a command is remembered: the longest life of a command, and ten minutes more.

A command appended later has expired.
"""
_SWEEP_MS = 3_600_000

MessageKey = tuple[str, str]
"""(`iss`, `jti`)."""


@dataclass(frozen=True, slots=True)
class _Consent:
    task_id: str
    at_ms: int


class Memory:
    """Implements `domain.Surroundings` over the records that a directory holds."""

    def __init__(self, directory: Directory, trust: TrustStore, since_ms: int) -> None:
        """`since_ms`: commands that were appended earlier have expired by now and need not be remembered."""
        self._directory = directory
        self._trust = trust
        self._horizon_ms = since_ms
        self._places: dict[MessageKey, Coordinates] = {}
        self._embedded: dict[MessageKey, EmbeddedCommand] = {}
        self._consents: dict[MessageKey, _Consent] = {}
        self._keys: dict[Subject, frozenset[str]] = {}
        self._holders: dict[str, set[Subject]] = {}
        self._credentials: dict[str, set[str]] = {}
        """Users who have or had a passkey with a credential id."""
        self._enrolled: dict[str, tuple[str, int]] = {}
        """Keys of running instances: the agent, and until when (s)."""
        self._parts: dict[str, set[str]] = {}
        self._latest_ms = 0
        directory.on_change(self._on_change)

    # --- commands that were handled ---

    def remember(self, iss: str, jti: str, at: Coordinates) -> None:
        """Note where a command was handled to its end. The first position stands."""
        if at.appended_at_ms >= self._horizon_ms:
            self._places.setdefault((iss, jti), at)

    def place(self, iss: str, jti: str) -> Coordinates | None:
        """Return the position at which a command was handled, or None."""
        return self._places.get((iss, jti))

    def embedded(self, iss: str, jti: str) -> EmbeddedCommand | None:
        """Return a command as a record embeds or once embedded it, or None."""
        return self._embedded.get((iss, jti))

    def enrol(self, kid: str, agent_id: str, until_s: int) -> None:
        """Note that a running instance of an agent has this key until `until_s`."""
        former = self._enrolled.get(kid)
        self._enrolled[kid] = (former[0] if former else agent_id, max(until_s, former[1] if former else 0))

    def forget_enrolled(self, now_s: int) -> None:
        """Drop the keys of instances whose enrolment has expired."""
        self._enrolled = {kid: one for kid, one in self._enrolled.items() if one[1] > now_s}

    # --- surroundings ---

    @property
    def latest_ms(self) -> int:
        return self._latest_ms

    def user(self, user_id: str) -> UserState | None:
        try:
            entry = self._directory.user(user_id)
        except ChainError:
            return None
        return entry.state if entry else None

    def agent(self, agent_id: str) -> AgentState | None:
        try:
            entry = self._directory.agent(agent_id)
        except ChainError:
            return None
        return entry.state if entry else None

    def roles_at(self, user_id: str, at_ms: int) -> frozenset[Role]:
        return self._directory.chains.roles_at(user_id, at_ms)

    def task_at(self, task_id: str, at_ms: int) -> TaskState | None:
        return self._directory.chains.task_at(task_id, at_ms)

    def parts_of(self, task_id: str) -> int:
        return len(self._parts.get(task_id, ()))

    def changed_ms(self, kind: SubjectKind, id: str) -> int:
        record = self._directory.unverified(kind, id)
        return record.commands[-1].appended_at_ms if record else 0

    def holders(self, kid: str) -> Collection[tuple[str, str]]:
        agent_id = self.enrolled_by(kid)
        return {*self.registered_by(kid), *([("agent", agent_id)] if agent_id else [])}

    def passkeys(self, credential_id: str, at_s: float) -> list[tuple[UserState, KeyRecord]]:
        """Return the passkeys with this credential id that have not ended at `at_s`, with their users."""
        users = [self.user(user_id) for user_id in sorted(self._credentials.get(credential_id, ()))]
        return [
            (user, key)
            for user in users
            if user is not None
            for key in user.keys
            if key.credential_id == credential_id and at_s < key.not_after
        ]

    def enrolled_by(self, kid: str) -> str | None:
        """Return the agent whose running instance has this key, or None."""
        enrolled = self._enrolled.get(kid)
        return enrolled[0] if enrolled else None

    def registered_by(self, kid: str) -> Collection[tuple[str, str]]:
        """Return (kind, id) of all that have or had this key by a record or by the trust bundle."""
        holders: set[tuple[str, str]] = set(self._holders.get(kid, ()))
        if self._trust.root_key(self._trust.root_id, kid):
            holders.add(("root", self._trust.root_id))
        for service in self._trust.require().services:
            if any(key.kid == kid for key in service.keys):
                holders.add(("service", service.id))
        return holders

    def key_history(self, user_id: str) -> KeyHistory:
        return self._directory.key_history(user_id)

    def agent_key_history(self, agent_id: str) -> KeyHistory:
        return self._directory.agent_key_history(agent_id)

    def check_vouchers(self, iss: str, kid: str) -> Verdict:
        return self._directory.check_vouchers(iss, kid)

    def current(self, kind: SubjectKind, id: str) -> Current | None:
        entry = self._directory.entry(kind, id)
        if entry is None:
            return None
        commands = tuple(Embedded(unverified_command(c), c) for c in entry.record.commands)
        return Current(entry, entry.state, entry.revision, commands)

    def compromise(self, user_id: str, kid: str, since_ms: int) -> KeyCompromise:
        return KeyCompromise(self._directory, user_id, kid, since_ms)

    def roles_rest(self, user_id: str, on: str, at_ms: int) -> bool:
        return KeyCompromise(self._directory, on, None).roles_rest(user_id, at_ms)

    def second_person(self, at_ms: int) -> SecondPerson:
        return self._trust.second_person(at_ms / 1000)

    def is_compared(self, command: Command, embedded: EmbeddedCommand, state: AnyState) -> bool:
        return compared_command(command, embedded, state, self._trust)

    def works_for(self, agent_id: str) -> Collection[str]:
        tasks = (entry.state for entry in self._directory.entries("task"))
        return {
            task.on_behalf_of
            for task in tasks
            if isinstance(task, TaskState) and task.status == "active" and agent_id in agents_of(task)
        }

    @property
    def rp_id(self) -> str | None:
        return self._trust.require().rp_id

    def issuer_of(self, id_token: str, at_ms: int) -> OidcIssuer | None:
        """Return the issuer of a user's ID token from the trust bundle, or None."""
        return self._trust.oidc_issuer(unverified_issuer(id_token), "users", at_ms / 1000)

    def task_of_consent(self, iss: str, mark: str) -> str | None:
        consent = self._consents.get((iss, mark))
        return consent.task_id if consent else None

    # --- updates ---

    def _on_change(self, kind: SubjectKind, id: str) -> None:
        record = self._directory.unverified(kind, id)
        if record is None:
            return
        subject = (kind, id)
        keys = keys_of(record.state)
        for kid in self._keys.get(subject, frozenset()) - keys:
            self._holders[kid].discard(subject)
        for kid in keys:
            self._holders.setdefault(kid, set()).add(subject)
        self._keys[subject] = keys
        if isinstance(record.state, UserState):
            for key in record.state.keys:
                if key.credential_id is not None:
                    self._credentials.setdefault(key.credential_id, set()).add(id)
        if isinstance(record.state, TaskState) and record.state.parent:
            self._parts.setdefault(record.state.parent, set()).add(id)
        for embedded in record.commands:
            if embedded.appended_at_ms >= self._horizon_ms:
                self._on_embedded(embedded, id)
        self._latest_ms = max(self._latest_ms, record.commands[-1].appended_at_ms)
        self._sweep()

    def _on_embedded(self, embedded: EmbeddedCommand, id: str) -> None:
        try:
            claims = unverified_command(embedded)
            self._embedded.setdefault((claims.iss, claims.jti), embedded)
            if embedded.second is not None:
                second = parse(embedded.second.jws).unverified_claims(CommandSecond)
                self._embedded.setdefault((second.iss, second.jti), embedded)
            if isinstance(claims, TaskAssign) and uses_consent(
                claims, subject_of(claims.aud, claims.iss, "user")
            ):
                self._consents[_memory_key(claims)] = _Consent(id, embedded.appended_at_ms)
        except (InvalidMessageError, TokenError):
            return  # a record with an invalid embedded command counts for nothing

    def _sweep(self) -> None:
        horizon_ms = self._latest_ms - REMEMBERED_MS
        if horizon_ms < self._horizon_ms + _SWEEP_MS:
            return
        self._horizon_ms = horizon_ms
        self._places = {k: v for k, v in self._places.items() if v.appended_at_ms >= horizon_ms}
        self._embedded = {k: v for k, v in self._embedded.items() if v.appended_at_ms >= horizon_ms}
        self._consents = {k: v for k, v in self._consents.items() if v.at_ms >= horizon_ms}


def _memory_key(claims: TaskAssign) -> MessageKey:
    """Return the key under which an embedded consent is remembered. Raises InvalidMessageError, TokenError."""
    if claims.id_token is not None:
        return unverified_mark(claims.id_token)
    consent = parse(claims.consent or "").unverified_claims(TaskConsent)
    return consent.iss, consent.jti
