"""Commands that change a user."""

from __future__ import annotations

from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.messages.registry import (
    Provisioned,
    UserDisable,
    UserSet,
    UserState,
)
from ringfence.model.lifecycle.context import (
    CommandRefusedError,
    Context,
    check_keys,
    check_scope,
    ended_keys,
    operator_only,
)
from ringfence.model.lifecycle.provisioners import disable_by_provisioner, provisioned_of, set_by_provisioner
from ringfence.model.scope.scope import missing


def apply_to_user(state: UserState | None, command: UserSet | UserDisable, context: Context) -> UserState:
    """Return the user after `command`. `state` is None if there was none. Raises CommandRefusedError."""
    if isinstance(command, UserDisable):
        return _disable(state, command, context)
    if context.actor.delegation is not None:
        return set_by_provisioner(state, command, context)
    if not context.actor.is_root:
        operator_only(context, "set or disable users")
    provisioned = _left_to_provisioner(state, command)
    check_scope(command.entitlements.scope, allow_empty=True)
    check_keys(command.keys, context.at_s, at_least=0)
    if command.entitlements.as_of > context.at_s + LEEWAY_S:
        raise CommandRefusedError(
            "entitlements are as of a moment to come: they would never grow old; set as_of to when they were read",
            code="as_of_in_future",
        )
    if context.actor.user_id == command.user_id:
        _refuse_self_widening(state, command)
    return UserState(
        user_id=command.user_id,
        name=command.name,
        roles=command.roles,
        keys=(*command.keys, *ended_keys(state, command.keys, context.at_s)),
        entitlements=command.entitlements,
        status="active" if provisioned is None or provisioned.active else "disabled",
        provisioned=provisioned,
    )


def _disable(state: UserState | None, command: UserDisable, context: Context) -> UserState:
    by_provisioner = context.actor.delegation is not None
    if not (context.actor.is_root or by_provisioner):
        operator_only(context, "set or disable users")
    if state is None:
        raise CommandRefusedError(f"there is no user {command.user_id}", code="unknown_user")
    if by_provisioner:
        return disable_by_provisioner(state, command, context)
    blocked = state.provisioned and state.provisioned.model_copy(update={"blocked": True})
    return state.model_copy(update={"status": "disabled", "provisioned": blocked})


def _left_to_provisioner(state: UserState | None, command: UserSet) -> Provisioned | None:
    """Return what an operator's command leaves of the user's provisioning data. Raises CommandRefusedError."""
    if state is not None and state.delegation is not None:
        raise CommandRefusedError(
            f"{command.user_id} is a provisioner, and no person; set it with: ringfence provisioner set",
            code="is_provisioner",
        )
    if command.provisioned is None:
        return None
    if state is None or state.provisioned is None:
        raise CommandRefusedError(
            f"{command.user_id} comes from no provisioner; leave out `provisioned`", code="not_provisioned"
        )
    return provisioned_of(command.provisioned, state.provisioned.by)


def _refuse_self_widening(state: UserState | None, command: UserSet) -> None:
    """Refuse users, operators included, who widen their own roles or entitlements, or renew old entitlements."""
    if state is None or set(command.roles) - set(state.roles):
        raise CommandRefusedError(
            "nobody gives roles to themselves; another operator must sign", code="self_widening"
        )
    if state.provisioned is not None and command.provisioned is None:
        raise CommandRefusedError(
            "nobody takes themselves away from their provisioner; another operator must sign",
            code="self_widening",
        )
    if missing(command.entitlements.scope, state.entitlements.scope):
        raise CommandRefusedError(
            "nobody widens their own entitlements; another operator must sign", code="self_widening"
        )
    if command.entitlements.as_of > state.entitlements.as_of:
        raise CommandRefusedError(
            "nobody refreshes their own entitlements; another operator must sign", code="self_widening"
        )
