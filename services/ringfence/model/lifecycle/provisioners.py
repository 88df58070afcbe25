"""Provisioners: what an operator delegates to the key of a directory, and what that key may do to users.

A provisioner creates users and changes the ones that it created. Each change stays within what the operator's command
allows for the user's groups. It never changes keys, nor users whom an operator created or took over.
"""

from __future__ import annotations

from typing import Any

from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    Delegation,
    Entitlements,
    Provisioned,
    ProvisionerLink,
    ProvisionerSet,
    Provisioning,
    UserDisable,
    UserSet,
    UserState,
)
from ringfence.model.lifecycle.context import (
    CommandRefusedError,
    Context,
    check_keys,
    check_scope,
    check_user_id,
    ended_keys,
    operator_only,
)
from ringfence.model.scope.scope import missing

BY_PROVISIONERS: tuple[type[Any], ...] = (UserSet, UserDisable, ProvisionerLink)


def apply_to_provisioner(
    state: UserState | None, command: ProvisionerSet | ProvisionerLink, context: Context
) -> UserState:
    """Return the provisioner after `command`. `state` is None if there was none. Raises CommandRefusedError."""
    if isinstance(command, ProvisionerLink):
        return _link(state, command, context)
    if not context.actor.is_root:
        operator_only(context, "delegate to a provisioner")
    if state is not None and state.delegation is None:
        raise CommandRefusedError(
            f"{command.provisioner_id} is a person; give the provisioner a name of its own",
            code=Code.NOT_A_PROVISIONER,
        )
    if context.actor.provisioned_by == command.provisioner_id:
        raise CommandRefusedError(
            f"nobody widens their own roles or entitlements: {context.actor.user_id} comes from this provisioner; "
            "another operator must sign",
            code=Code.SELF_WIDENING,
        )
    check_user_id(command.provisioner_id)
    check_keys(command.keys, context.at_s, at_least=1)
    _check_delegation(command.delegation)
    delegated = {one.group for one in command.delegation.groups}
    return UserState(
        user_id=command.provisioner_id,
        name=command.name,
        roles=(),
        keys=(*command.keys, *ended_keys(state, command.keys, context.at_s)),
        entitlements=Entitlements(scope=(), source="delegation", as_of=command.iat),
        status="active",
        delegation=command.delegation,
        linked=tuple(link for link in (state.linked if state else ()) if link.group in delegated),
    )


def set_by_provisioner(state: UserState | None, command: UserSet, context: Context) -> UserState:
    """Return the user after a provisioner's command. Raises CommandRefusedError if it exceeds the delegation."""
    delegation, provisioning = context.actor.delegation, command.provisioned
    if delegation is None or context.actor.user_id is None or provisioning is None:
        raise CommandRefusedError("a provisioner says which groups the user is in", code=Code.GROUPS_MISSING)
    before = _own(state, command.user_id, context)
    if before is not None and before.gone:
        raise CommandRefusedError(
            f"{command.user_id} left for good; whoever comes now is somebody else: choose another id",
            code=Code.USER_GONE,
        )
    if before is not None and before.blocked and provisioning.active:
        raise CommandRefusedError(
            f"an operator disabled {command.user_id}; only an operator lets them act again",
            code=Code.DISABLED_BY_OPERATOR,
        )
    if command.keys:
        raise CommandRefusedError(
            "a provisioner sets no keys; an operator does", code=Code.KEYS_NOT_DELEGATED
        )
    if command.entitlements.as_of > context.at_s + LEEWAY_S:
        raise CommandRefusedError("entitlements are as of a moment to come", code=Code.AS_OF_IN_FUTURE)
    check_user_id(command.user_id)
    _check_within(command, provisioning, delegation)
    provisioned = provisioned_of(
        provisioning, context.actor.user_id, blocked=before is not None and before.blocked
    )
    return UserState(
        user_id=command.user_id,
        name=command.name,
        roles=command.roles,
        keys=state.keys if state else (),
        entitlements=command.entitlements,
        status="active" if provisioning.active else "disabled",
        provisioned=provisioned,
        compromised=state.compromised if state else None,
    )


def disable_by_provisioner(state: UserState, command: UserDisable, context: Context) -> UserState:
    """Return the user after a provisioner disabled them. Their keys end if they left for good."""
    before = _own(state, command.user_id, context)
    if before is None:
        raise CommandRefusedError(f"there is no user {command.user_id}", code=Code.UNKNOWN_USER)
    provisioned = before.model_copy(update={"active": False, "gone": before.gone or command.gone})
    keys = ended_keys(state, (), context.at_s) if command.gone else state.keys
    return state.model_copy(update={"status": "disabled", "provisioned": provisioned, "keys": keys})


def provisioned_of(said: Provisioning, by: str, *, blocked: bool = False) -> Provisioned:
    """Return what a record holds of a command's provisioning data."""
    # Field by field: values that a writer adds under names that only a record has must not be copied.
    fields = {name: getattr(said, name) for name in Provisioning.model_fields}
    return Provisioned(**fields, by=by, blocked=blocked)


def _own(state: UserState | None, user_id: str, context: Context) -> Provisioned | None:
    """Return the provisioning data of a user whom the signing provisioner created; None if there is no user yet."""
    if state is None:
        return None
    if state.provisioned is None or state.provisioned.by != context.actor.user_id:
        raise CommandRefusedError(
            f"{context.actor.user_id} did not make {user_id}, and changes only whom it made",
            code=Code.NOT_ITS_USER,
        )
    return state.provisioned


def _check_within(command: UserSet, said: Provisioning, delegation: Delegation) -> None:
    by_group = {one.group: one for one in delegation.groups}
    if unknown := sorted(set(said.groups) - by_group.keys()):
        raise CommandRefusedError(f"the group {unknown[0]} is not delegated", code=Code.GROUP_NOT_DELEGATED)
    entitlements = [by_group[group] for group in said.groups]
    if command.entitlements.source != delegation.source:
        raise CommandRefusedError(
            f"entitlements from here have the source {delegation.source}", code=Code.SOURCE_NOT_DELEGATED
        )
    if roles := sorted(set(command.roles) - {role for one in entitlements for role in one.roles}):
        raise CommandRefusedError(
            f"the role {roles[0]} is not delegated to the groups of {command.user_id}",
            code=Code.BEYOND_DELEGATION,
        )
    check_scope(command.entitlements.scope, allow_empty=True)
    if missing(command.entitlements.scope, tuple(p for one in entitlements for p in one.scope)):
        raise CommandRefusedError(
            f"the entitlements reach beyond what is delegated to the groups of {command.user_id}",
            code=Code.BEYOND_DELEGATION,
        )


def _check_delegation(delegation: Delegation) -> None:
    groups = [one.group for one in delegation.groups]
    if len(set(groups)) != len(groups):
        raise CommandRefusedError("one group is delegated twice", code=Code.GROUP_TWICE)
    for one in delegation.groups:
        check_scope(one.scope, allow_empty=True)


def _link(state: UserState | None, command: ProvisionerLink, context: Context) -> UserState:
    if state is None or state.delegation is None or context.actor.user_id != command.provisioner_id:
        raise CommandRefusedError(
            "a provisioner tells of its own groups, and nobody else's", code=Code.NOT_ENTITLED
        )
    groups = [link.group for link in command.groups]
    if len(set(groups)) != len(groups):
        raise CommandRefusedError("one group is named twice", code=Code.GROUP_TWICE)
    if unknown := sorted(set(groups) - {one.group for one in state.delegation.groups}):
        raise CommandRefusedError(f"the group {unknown[0]} is not delegated", code=Code.GROUP_NOT_DELEGATED)
    return state.model_copy(update={"linked": command.groups})
