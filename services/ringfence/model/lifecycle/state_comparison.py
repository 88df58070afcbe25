"""Widening: whether a command gives its subject, or anybody by it, more than before. Pure.

One comparison of the state before and after decides it for every command (ADR 0102). It is total: a field without a
comparison here, an unknown field, and every change that is not shown to narrow count as widening.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ringfence.messages.base import KeyRecord, Message, Scope
from ringfence.messages.registry import (
    AgentActivate,
    AgentRenewKey,
    AgentState,
    AnyState,
    Command,
    Delegation,
    Entitlements,
    GroupDelegation,
    Hold,
    ModelLimits,
    Provisioned,
    TargetState,
    TaskAssign,
    TaskDelegate,
    TaskState,
    UserAddKey,
    UserReviewCompromise,
    UserSet,
    UserState,
    VerbFloor,
)
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.scope.scope import missing

Comparison = Callable[[Any, Any], bool]
"""Takes a value before and after, and returns whether the second one is wider."""

_EXEMPT: Final[tuple[type[Any], ...]] = (
    AgentActivate,  # its sponsor takes on what two people registered
    AgentRenewKey,
    TaskAssign,  # within the ceiling and the entitlements
    TaskDelegate,
    UserReviewCompromise,  # itself the word of a second operator (ADR 0101)
)


def widens(old: AnyState | None, new: AnyState, command: Command) -> bool:
    """Return whether `command`, which made `new` of `old`, needs a second person.

    `old` is None if there was no such subject. `command` has to be verified: its `iss` says whether a user adds a key
    to themself (no passkey signs that), and whether a provisioner sets a user of its own, within its delegation.
    """
    if isinstance(command, _EXEMPT):
        return False
    signer = subject_of(command.aud, command.iss, "user")
    if isinstance(command, UserAddKey) and signer == command.user_id:
        return False
    provisioned = new.provisioned if isinstance(command, UserSet) and isinstance(new, UserState) else None
    if provisioned is not None and provisioned.by == signer:
        return False
    return grows(old, new)


def grows(old: AnyState | None, new: AnyState) -> bool:
    """Return whether a subject has, or lets anybody have, more than before, whoever signed that."""
    return old is None or _wider(old, new)


def delegates_operator(old: AnyState | None, new: AnyState) -> bool:
    """Return whether a provisioner may make operators now, and could not before. Only the root delegates that."""
    return bool(_operator_groups(new) - _operator_groups(old))


def _operator_groups(state: AnyState | None) -> frozenset[str]:
    delegation = state.delegation if isinstance(state, UserState) else None
    groups = delegation.groups if delegation else ()
    return frozenset(one.group for one in groups if "operator" in one.roles)


def is_minor(old: AnyState | None, new: AnyState, command: Command) -> bool:
    """Return whether a change is none that people decide on: what they sign names a revision without it.

    It is a renewal of an agent's key, or changes of a user only names, `as_of`, and keys in addition to those that they
    have. The registry counts such changes (`UserRecord.minor`), and readers let a proposal outlast them.
    """
    if isinstance(command, AgentRenewKey):
        return True
    return isinstance(old, UserState) and isinstance(new, UserState) and is_minor_for_user(old, new)


def is_minor_for_user(old: UserState, new: UserState) -> bool:
    """As `is_minor`, of a user, whatever the command."""
    keys = {key.kid: key for key in new.keys}
    return all(keys.get(key.kid) == key for key in old.keys) and _decided(old) == _decided(new)


def _decided(user: UserState) -> UserState:
    """Return a user without what changes as a minor change."""
    entitlements = user.entitlements.model_copy(update={"as_of": 0})
    provisioned = user.provisioned and user.provisioned.model_copy(update=dict.fromkeys(_NAMES))
    plain = {"name": "-", "keys": (), "entitlements": entitlements, "provisioned": provisioned}
    return user.model_copy(update=plain)


_NAMES: Final = ("display_name", "formatted_name", "given_name", "family_name")


def _wider(old: Message, new: Message) -> bool:
    if old == new:
        return False
    if type(old) is not type(new) or old.model_extra != new.model_extra:
        return True
    comparisons = COMPARISONS.get(type(new), {})
    return any(
        comparisons.get(name, _differs)(getattr(old, name), getattr(new, name))
        for name in type(new).model_fields
    )


def _differs(old: Any, new: Any) -> bool:
    return bool(old != new)


def _never(old: Any, new: Any) -> bool:
    """Of text for people, which gives nothing."""
    return False


def _greater(old: int, new: int) -> bool:
    return new > old


def _smaller(old: int, new: int) -> bool:
    return new < old


def _gained(old: Sequence[Any], new: Sequence[Any]) -> bool:
    return any(one not in old for one in new)


def _lost(old: Sequence[Any], new: Sequence[Any]) -> bool:
    return _gained(new, old)


def _set_to_true(old: bool, new: bool) -> bool:
    return new and not old


def _set_to_false(old: bool, new: bool) -> bool:
    return old and not new


def _scope_grows(old: Scope, new: Scope) -> bool:
    return bool(missing(new, old))


def _entitlements_grow(old: Entitlements, new: Entitlements) -> bool:
    """Entitlements without a scope give nothing, however new they are: those of each provisioner, for one."""
    return bool(new.scope or new.model_extra) and _wider(old, new)


def _optional(old: Message | None, new: Message | None) -> bool:
    """Compare messages of which there may be none. That one comes or goes may free from a limit."""
    return _differs(old, new) if old is None or new is None else _wider(old, new)


def _limits_grow(old: ModelLimits | None, new: ModelLimits | None) -> bool:
    return old is not None and (new is None or _wider(old, new))


def _limit_raised(old: int | None, new: int | None) -> bool:
    return old is not None and (new is None or new > old)


def _keys_grow(old: Sequence[KeyRecord], new: Sequence[KeyRecord]) -> bool:
    known = {key.kid: key for key in old}
    return any(key.kid not in known or _wider(known[key.kid], key) for key in new)


def _groups_grow(old: Sequence[GroupDelegation], new: Sequence[GroupDelegation]) -> bool:
    known = {one.group: one for one in old}
    repeated = len({one.group for one in new}) != len(new)
    return repeated or any(one.group not in known or _wider(known[one.group], one) for one in new)


def _verbs_grow(old: Sequence[VerbFloor], new: Sequence[VerbFloor]) -> bool:
    known = {one.verb: one for one in old}
    return any(one.verb not in known or _wider(known[one.verb], one) for one in new)


def _approval_changes(old: str | None, new: str | None) -> bool:
    """Whether other people may approve: only asking where nobody was asked narrows. A change from sponsors to operators
    lets operators approve.
    """
    return old not in (None, "none") and old != new


def _activated(old: str, new: str) -> bool:
    return old != new and (new == "active" or old in _FINAL)


_FINAL: Final = frozenset({"decommissioned", "removed", "ended"})


def _holds_shrink(old: Sequence[Hold], new: Sequence[Hold]) -> bool:
    """Whether a report of a compromised key holds less than before."""
    kept = {one.report: one for one in new}
    for one in old:
        after = kept.get(one.report)
        if after is None or _lost(one.parts, after.parts):
            return True
        if after.status == "proposed" and one.status != "proposed":
            return True
    return False


def _compromised_shrink(old: Mapping[str, int] | None, new: Mapping[str, int] | None) -> bool:
    return any((new or {}).get(kid, since_ms + 1) > since_ms for kid, since_ms in (old or {}).items())


COMPARISONS: Final[Mapping[type[Message], Mapping[str, Comparison]]] = {
    UserState: {
        "name": _never,
        "roles": _gained,
        "keys": _keys_grow,
        "entitlements": _entitlements_grow,
        "status": _activated,
        "compromised": _compromised_shrink,
        "provisioned": _optional,
        "delegation": _optional,
        "linked": _never,  # it gives nobody access
        "holds": _holds_shrink,
    },
    Entitlements: {"scope": _scope_grows, "as_of": _greater},
    Provisioned: {
        "active": _set_to_true,
        "blocked": _set_to_false,
        "gone": _set_to_false,
        "display_name": _never,
        "formatted_name": _never,
        "given_name": _never,
        "family_name": _never,
    },
    Delegation: {"groups": _groups_grow},
    GroupDelegation: {"roles": _gained, "scope": _scope_grows},
    ModelLimits: {"tokens": _limit_raised, "requests": _limit_raised},
    KeyRecord: {"not_before": _smaller, "not_after": _greater},
    AgentState: {
        "description": _never,
        "keys": _keys_grow,
        "ceiling": _scope_grows,
        "limits": _limits_grow,
        "status": _activated,
        "suspended_by_operator": _set_to_false,
        "attestation": _gained,
        "replaced": _lost,
        "compromised": _lost,
        "renewed": _lost,
        "holds": _holds_shrink,
    },
    TargetState: {
        "description": _never,
        "verbs": _verbs_grow,
        "max_ttl_s": _greater,
        "delivery": lambda old, new: (old, new) == ("gateway", "agent"),
        "keys": _keys_grow,
        "status": _activated,
        "holds": _holds_shrink,
    },
    VerbFloor: {"floor": _approval_changes, "ask": _approval_changes, "key": _approval_changes},
    TaskState: {"status": _activated, "holds": _holds_shrink},
}
"""The comparison of each field. A field without one is wider whenever it differs: among these the backend and the
request map of a target, of which every change may reach further.
"""
