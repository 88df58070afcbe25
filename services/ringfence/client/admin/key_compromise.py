"""Blast radius of a compromised key: the keys and rights that rest on it since a time. Reads records, sends nothing.

Everything follows from the signed commands that records embed, as every service verifies them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from ringfence.kernel.crypto.jws import kid_of, parse
from ringfence.messages.registry import (
    AgentActivate,
    AgentRegister,
    AgentResume,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentState,
    AgentTransfer,
    AnyState,
    Command,
    EmbeddedCommand,
    ProvisionerSet,
    TargetSet,
    TargetState,
    TaskAssign,
    TaskConsent,
    TaskState,
    UserSet,
    UserState,
)
from ringfence.model.identity.spiffe_ids import SubjectKind, subject_of
from ringfence.model.records.command_chain import unverified_command
from ringfence.model.records.directory import Directory

MAX_KEYS_AT_ONCE = 64
"""Keys of an agent that one command ends, so that it stays short enough for one that only narrows."""
KINDS: tuple[SubjectKind, ...] = ("user", "agent", "target", "task")


@dataclass(frozen=True, slots=True)
class RestingKey:
    """A key of a person or an agent that rests on the compromised key."""

    kind: Literal["user", "agent"]
    id: str
    kid: str
    given_ms: int
    """The first time, since the given one, at which a compromised key gave its word for it."""
    sponsor: str | None = None
    """Of an agent."""


@dataclass(frozen=True, slots=True)
class RestingRight:
    """Something else that a compromised key gave: a role, an entitlement, a ceiling, a selector, a target, a task."""

    kind: SubjectKind
    id: str
    what: str
    given_ms: int
    undo: str
    """The command that takes it back, with upper-case words to fill in."""


@dataclass(frozen=True, slots=True)
class KeyCompromise:
    """A key of a user that may have been in other hands since `since_ms`, an append time."""

    directory: Directory
    user_id: str
    kid: str
    since_ms: int = 0

    def own_keys(self) -> frozenset[str]:
        """Return the thumbprints that one `user.end-key` ends: the key, and all that it added to the same user."""
        return self.directory.key_history(self.user_id).added_by(self.kid) | {self.kid}

    def keys(self) -> list[RestingKey]:
        """Return the keys of people and agents that rest on it and have not ended as compromised, oldest first."""
        return sorted(
            (one for one, by_person in self._resting() if by_person), key=lambda one: (one.given_ms, one.kid)
        )

    def rights(self, now_s: float) -> list[RestingRight]:
        """Return what else was given with it, or with keys that rest on it, oldest first. Rights that are over are left
        out.
        """
        keys = {(self.user_id, kid) for kid in self.own_keys()}
        keys |= {(one.id, one.kid) for one, _ in self._resting(ended=True) if one.kind == "user"}
        found: list[RestingRight] = []
        for kind in KINDS:
            for entry in self.directory.entries(kind):
                if _is_over(entry.state, now_s):
                    continue
                commands = entry.record.commands
                for first, embedded in enumerate(commands):
                    if embedded.appended_at_ms < self.since_ms:
                        continue
                    command = unverified_command(embedded)  # of a record that holds
                    if keys.isdisjoint(_signers(command, embedded)):
                        continue
                    if undone := _undo(command, entry.state, created=first == 0):
                        what, undo = undone
                        id = entry.record.sub.rpartition("/")[2]
                        found.append(RestingRight(kind, id, what, embedded.appended_at_ms, undo))
        return sorted(found, key=lambda one: (one.given_ms, one.id))

    def _resting(self, *, ended: bool = False) -> Iterator[tuple[RestingKey, bool]]:
        """Yield the keys that rest on it, and whether a person or an agent has them rather than a provisioner.

        `ended`: also those that have ended as compromised.
        """
        own = self.own_keys()
        for kind in ("user", "agent"):
            for entry in self.directory.entries(kind):
                state = entry.state
                assert isinstance(state, UserState | AgentState)
                id = state.user_id if isinstance(state, UserState) else state.agent_id
                if isinstance(state, UserState):
                    history, sponsor, person = self.directory.key_history(id), None, not state.delegation
                elif state.status != "decommissioned":
                    history, sponsor, person = self.directory.agent_key_history(id), state.sponsor, True
                else:
                    continue
                for kid, origin in history.origins.items():
                    at = [
                        giver.at_ms
                        for giver in origin.givers
                        if giver.user_id == self.user_id and giver.kid in own and giver.at_ms >= self.since_ms
                    ]
                    gone = kid in (state.compromised or ()) or (id == self.user_id and kid in own)
                    if at and (ended or not gone):
                        yield RestingKey(kind, id, kid, min(at), sponsor), person


def _signers(command: Command, embedded: EmbeddedCommand) -> set[tuple[str, str]]:
    """Return (user id, `kid`) of everybody on whose signature a verified command rests."""
    signed: list[tuple[str, str]] = [(command.iss, kid_of(embedded.jws))]
    if isinstance(command, TaskAssign) and command.consent is not None:
        signed.append((parse(command.consent).unverified_claims(TaskConsent).iss, kid_of(command.consent)))
    return {(subject_of(command.aud, iss, "user") or "", kid) for iss, kid in signed}


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


def _undo(command: Command, state: AnyState, *, created: bool) -> tuple[str, str] | None:
    """Return what a command gave, and the command line that takes it back; None for keys, and where it gave nothing."""
    match command:
        case UserSet() if created:
            return "made this user", f"ringfence user disable {command.user_id} --reason REASON"
        case UserSet():
            roles = ", ".join(command.roles) or "no role"
            return (
                f"set roles ({roles}) and entitlements",
                f"ringfence user set {command.user_id} --role ROLE --allow PERMISSION",
            )
        case ProvisionerSet():
            return (
                "delegated groups and gave it its keys",
                f"ringfence provisioner set {command.provisioner_id} --delegation FILE --new-key NEW-FILE",
            )
        case AgentRegister():
            return "registered this agent", f"ringfence agent decommission {command.agent_id} --reason REASON"
        case AgentSetCeiling():
            return "set the ceiling", f"ringfence agent set-ceiling {command.agent_id} --allow PERMISSION"
        case AgentSetAttestation():
            return (
                "set the selectors",
                f"ringfence agent set-attestation {command.agent_id} --selector SELECTOR",
            )
        case AgentTransfer():
            return (
                f"made {command.sponsor} its sponsor",
                f"ringfence agent transfer {command.agent_id} --to USER",
            )
        case AgentActivate() | AgentResume():
            return "set it to work", f"ringfence agent suspend {command.agent_id} --reason REASON"
        case TargetSet():
            return "set the target", f"ringfence target remove {command.target_id} --reason REASON"
        case TaskAssign() if isinstance(state, TaskState):
            return "assigned this task", f"ringfence task end {state.task_id} --reason REASON"
        case _:
            return None
