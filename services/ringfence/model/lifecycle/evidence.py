"""Pruning of a record's embedded commands: which ones it must keep, and which an honest registry may have dropped."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import Any, Final, TypeVar

from ringfence.messages.registry import (
    AgentRenewKey,
    AgentResume,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentSuspend,
    Command,
    Entitlements,
    ProvisionerLink,
    TargetRemove,
    TargetSet,
    UserSet,
)
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.lifecycle.holds import elements_set_by

T = TypeVar("T")


IsCompared = Callable[[Command], bool]
"""Returns whether a command counts only because it narrows what those before it gave (`is_compared`)."""


def still_needed(
    commands: Sequence[tuple[Command, T]],
    latest: Command,
    is_compared: IsCompared = lambda command: False,
) -> list[T]:
    """Drop the commands that `latest` makes irrelevant, so that a record does not grow with every change.

    Args:
        commands: the embedded commands and anything that stands for them, oldest first.
        latest: the command that was just accepted and comes after them.
        is_compared: nothing is dropped before such a command, which could widen what is left.

    Returns:
        The second elements of those to keep. Applying them and the latest gives the same state as applying all. What a
        user could sign, or was, at any time stays known. So do all keys that an agent ever had: otherwise nobody could
        say that a key has ended, or whose it was. What came before the last renewal of an agent's key stays as well: it
        says until when the agent could renew.
    """
    renewals = [i for i, (command, _) in enumerate(commands) if isinstance(command, AgentRenewKey)]
    since = renewals[-1] + 1 if renewals else 0
    kept = [*(item for _, item in commands[:since]), *_needed_since(commands[since:], latest)]
    left = {id(item) for item in kept}
    first_dropped = next((i for i, (_, item) in enumerate(commands) if id(item) not in left), len(commands))
    later = [command for command, item in commands[first_dropped:] if id(item) in left]
    if any(map(is_compared, (*later, latest))):
        return [item for _, item in commands]
    return kept


def _needed_since(commands: Sequence[tuple[Command, T]], latest: Command) -> list[T]:
    superseded: tuple[type[Any], ...] = ()
    if isinstance(latest, AgentSetCeiling):
        superseded = (AgentSetCeiling,)
    elif isinstance(latest, AgentSetAttestation):
        superseded = (AgentSetAttestation,)
    elif isinstance(latest, TargetSet):
        superseded = (TargetSet, TargetRemove)
    elif isinstance(latest, ProvisionerLink):
        superseded = (ProvisionerLink,)
    elif isinstance(latest, AgentSuspend):
        stops = [command for command, _ in commands if isinstance(command, AgentSuspend | AgentResume)]
        # Not while it is suspended: who suspended it decides who may resume it.
        if stops and isinstance(stops[-1], AgentResume):
            return _without_stops_of(latest.iss, commands)
    elif isinstance(latest, UserSet) and len(commands) > 1:
        # Only the entitlements (or the name) changed, and changed again: the command in between is not needed.
        (first, _), (between, _) = commands[-2:]
        same = _givers(commands[:-1], latest) == _givers(commands, latest)
        if (
            same
            and _same_standing(first, between, latest)
            and not (_by_oneself(latest) or _by_root(between))
            # Else a minor change would look to readers like the change before it.
            and (_same_rights(first, between) or not _same_rights(between, latest))
        ):  # what the root set rests on nobody, and says so
            return [item for _, item in commands[:-1]]
    kept = 0
    left = list(commands)
    for at in reversed(range(len(commands))):
        if not isinstance(commands[at][0], superseded):
            continue
        rest = left[:at] + left[at + 1 :]
        if kept == MAX_FIRST_GIVERS or _givers(rest, latest) == _givers(left, latest):
            left = rest
        else:
            kept += 1
    return [item for _, item in left]


MAX_FIRST_GIVERS: Final = 16
"""The most superseded commands of one type that stay because they gave something first. Beyond, the oldest go."""


def _givers(commands: Sequence[tuple[Command, Any]], latest: Command) -> dict[tuple[str, str], str]:
    """Return the `jti` of the command that gave each element of what `latest` sets, and gave it without a break since.

    Who gave something decides what ends with a compromised key (`holds`).
    """
    givers: dict[tuple[str, str], str] = {}
    parts = elements_set_by(latest)
    for command in (*(command for command, _ in commands), latest):
        for part, elements in elements_set_by(command).items():
            if part in parts:
                before = {key: by for key, by in givers.items() if key[0] != part}
                same = {
                    (part, one): givers.get((part, one), f"{command.iss} {command.jti}") for one in elements
                }
                givers = before | same
    return givers


def _without_stops_of(iss: str, commands: Sequence[tuple[Command, T]]) -> list[T]:
    """Drop suspensions by one person that are over, and the resumptions from only those."""
    kept: list[T] = []
    stopped = False
    for command, item in commands:
        if isinstance(command, AgentSuspend):
            if command.iss == iss:
                continue
            stopped = True
        elif isinstance(command, AgentResume):
            if not stopped:
                continue
            stopped = False
        kept.append(item)
    return kept


def may_be_dropped(
    command: Command,
    before: Command | None,
    after: Sequence[Command],
    is_compared: IsCompared = lambda command: False,
) -> bool:
    """Return whether an honest registry may have dropped `command` from a record that now holds others.

    Args:
        before: the last remaining command that came before it.
        after: those that came after it, oldest first.
        is_compared: such a command replaces none (`still_needed`).
    """
    # What a renewal of a key rests on stays.
    after = list(takewhile(lambda later: not isinstance(later, AgentRenewKey), after))
    # A replacement was signed later: an old command must not be replayed to undo a newer one.
    newer = [later for later in after if later.iat >= command.iat and not is_compared(later)]
    match command:
        case AgentSetCeiling():
            return any(isinstance(later, AgentSetCeiling) for later in newer)
        case AgentSetAttestation():
            return any(isinstance(later, AgentSetAttestation) for later in newer)
        case AgentSuspend():  # no sponsor's command replaces an operator's
            return any(isinstance(later, AgentSuspend) and later.iss == command.iss for later in after)
        case AgentResume():
            return any(isinstance(later, AgentSuspend) for later in after)
        case ProvisionerLink():
            return any(isinstance(later, ProvisionerLink) for later in newer)
        case TargetSet() | TargetRemove():
            return any(isinstance(later, TargetSet) for later in newer)
        case UserSet():
            # A user's change of themself was checked against earlier commands. Those stay, as in `still_needed`.
            follows = bool(after) and after[0] in newer and not _by_oneself(after[0])
            return before is not None and follows and _same_standing(before, command, after[0])
        case _:
            return False


def _same_standing(*commands: Command) -> bool:
    """Return whether all commands give a user the same roles and keys, and the same owner.

    Only name or entitlements may differ.
    """
    first = commands[0]
    return isinstance(first, UserSet) and all(
        isinstance(c, UserSet) and _ownership(c) == _ownership(first) for c in commands
    )


def _same_rights(one: Command, other: Command) -> bool:
    """Return whether two `user.set` give the same entitlements, whatever their `as_of`."""
    assert isinstance(one, UserSet)
    assert isinstance(other, UserSet)
    return _without_as_of(one) == _without_as_of(other) and _groups(one) == _groups(other)


def _without_as_of(command: UserSet) -> Entitlements:
    return command.entitlements.model_copy(update={"as_of": 0})


def _groups(command: UserSet) -> tuple[object, ...]:
    said = command.provisioned
    return (said.groups, said.user_name, said.external_id, said.emails) if said else ()


def _ownership(command: UserSet) -> tuple[object, ...]:
    """Return what a command settles besides entitlements, and who gave it: a provisioner's command replaces no
    operator's.
    """
    provisioned = command.provisioned
    active = provisioned.active if provisioned else None
    return command.roles, command.keys, active, command.iss if provisioned else None


def _by_root(command: Command) -> bool:
    return subject_of(command.aud, command.iss, "user") is None


def _by_oneself(command: Command) -> bool:
    return isinstance(command, UserSet) and subject_of(command.aud, command.iss, "user") == command.user_id
