"""Group entitlements under a delegation, computed alike by writers of commands and readers of records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ringfence.messages.base import Scope
from ringfence.messages.registry import Delegation, Role, UserState
from ringfence.model.unknown_fields import is_understood


@dataclass(frozen=True, slots=True)
class GroupEntitlements:
    """The rights that group membership gives. `groups` are the delegated groups among those given."""

    groups: tuple[str, ...]
    roles: tuple[Role, ...]
    scope: Scope


def given_by(delegation: Delegation, groups: Iterable[str]) -> GroupEntitlements:
    """Return all rights that these groups may give.

    A group that is not delegated (any more) gives nothing. A group whose entry has an unknown field gives nothing
    either: the field may limit the delegation.
    """
    understood_groups = set(groups) if not delegation.model_extra else set()
    delegated = [one for one in delegation.groups if one.group in understood_groups and is_understood(one)]
    return GroupEntitlements(
        tuple(sorted(one.group for one in delegated)),
        tuple(sorted({role for one in delegated for role in one.roles})),
        tuple(dict.fromkeys(permission for one in delegated for permission in one.scope)),
    )


def is_of(state: UserState, provisioner_id: str) -> bool:
    """Return whether a user comes from this provisioner, and has not left for good."""
    return (
        state.provisioned is not None
        and state.provisioned.by == provisioner_id
        and not state.provisioned.gone
    )
