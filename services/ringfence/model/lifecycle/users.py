"""What a command does to a user."""

from __future__ import annotations

from ringfence.kernel.jws import LEEWAY_S
from ringfence.messages.registry import (
    UserDisable,
    UserSet,
    UserState,
)
from ringfence.model.lifecycle.checks import check_keys, check_scope, operator_only
from ringfence.model.lifecycle.context import CommandRefusedError, Context
from ringfence.model.scope import missing


def apply_to_user(state: UserState | None, command: UserSet | UserDisable, context: Context) -> UserState:
    """The user after `command`; `state` is None where there was none. Raises CommandRefusedError."""
    if not context.actor.is_root:
        operator_only(context, "set or disable users")
    if isinstance(command, UserDisable):
        if state is None:
            raise CommandRefusedError(f"there is no user {command.user_id}", code="unknown_user")
        return state.model_copy(update={"status": "disabled"})
    check_scope(command.entitlements.scope, allow_empty=True)
    check_keys(command.keys, context.at_s, at_least=0)
    if command.entitlements.as_of > context.at_s + LEEWAY_S:
        raise CommandRefusedError(
            "entitlements are as of a moment to come: they would never grow old; set as_of to when they were read",
            code="as_of_in_future",
        )
    if context.actor.user_id == command.user_id:
        _refuse_self_widening(state, command)
    kept = [key for key in (state.keys if state else ()) if key.kid not in {k.kid for k in command.keys}]
    ended = [key.model_copy(update={"not_after": min(key.not_after, context.at_s)}) for key in kept]
    return UserState(
        user_id=command.user_id,
        name=command.name,
        roles=command.roles,
        keys=(*command.keys, *ended),
        entitlements=command.entitlements,
        status="active",
    )


def _refuse_self_widening(state: UserState | None, command: UserSet) -> None:
    """Nobody, operators included, widens their own roles or entitlements, or makes old entitlements young again."""
    if state is None or set(command.roles) - set(state.roles):
        raise CommandRefusedError(
            "nobody gives roles to themselves; another operator must sign", code="self_widening"
        )
    if missing(command.entitlements.scope, state.entitlements.scope):
        raise CommandRefusedError(
            "nobody widens their own entitlements; another operator must sign", code="self_widening"
        )
    if command.entitlements.as_of > state.entitlements.as_of:
        raise CommandRefusedError(
            "nobody refreshes their own entitlements; another operator must sign", code="self_widening"
        )
