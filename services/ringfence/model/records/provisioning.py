"""What a delegation gives the members of groups: the same for whoever writes commands and whoever looks at records."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ringfence.messages.permission import Scope
from ringfence.messages.registry import Delegation, Role, UserState
from ringfence.model.unknown_fields import is_understood


@dataclass(frozen=True, slots=True)
class GroupEntitlements:
    """What membership in groups gives; `groups` are those of them that are delegated."""

    groups: tuple[str, ...]
    roles: tuple[Role, ...]
    scope: Scope


def given_by(delegation: Delegation, groups: Iterable[str]) -> GroupEntitlements:
    """All that these groups may give. What is not delegated (any more) gives nothing, and is left out, and so is what
    has a field that this version does not know: it may limit the delegation.
    """
    wanted = set(groups) if not delegation.model_extra else set()
    delegated = [one for one in delegation.groups if one.group in wanted and is_understood(one)]
    return GroupEntitlements(
        tuple(sorted(one.group for one in delegated)),
        tuple(sorted({role for one in delegated for role in one.roles})),
        tuple(dict.fromkeys(permission for one in delegated for permission in one.scope)),
    )


def is_of(state: UserState, provisioner_id: str) -> bool:
    """Whether a user comes from this provisioner, and has not left for good."""
    return (
        state.provisioned is not None
        and state.provisioned.by == provisioner_id
        and not state.provisioned.gone
    )
