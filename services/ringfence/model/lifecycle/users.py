"""Commands that change a user."""

from __future__ import annotations

from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.messages.base import KeyRecord
from ringfence.messages.codes import Code
from ringfence.messages.registry import (
    MAX_KEYS,
    Provisioned,
    UserAddKey,
    UserDisable,
    UserEndKey,
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
from ringfence.model.lifecycle.holds import report
from ringfence.model.lifecycle.provisioners import disable_by_provisioner, provisioned_of, set_by_provisioner
from ringfence.model.scope.scope import missing

UserCommand = UserSet | UserDisable | UserAddKey | UserEndKey


def apply_to_user(state: UserState | None, command: UserCommand, context: Context) -> UserState:
    """Return the user after `command`. `state` is None if there was none. Raises CommandRefusedError."""
    match command:
        case UserSet():
            return _set(state, command, context)
        case UserDisable():
            return _disable(state, command, context)
        case UserAddKey():
            return _add_key(_person(state, command.user_id), command, context)
        case UserEndKey():
            return _end_key(_person(state, command.user_id), command, context)


def _set(state: UserState | None, command: UserSet, context: Context) -> UserState:
    if context.actor.delegation is not None:
        return set_by_provisioner(state, command, context)
    if not context.actor.is_root:
        operator_only(context, "set or disable users")
    provisioned = _left_to_provisioner(state, command)
    check_user_id(command.user_id)
    check_scope(command.entitlements.scope, allow_empty=True)
    check_keys(command.keys, context.at_s, at_least=0, passkeys=True)
    _check_known_keys(state, command.keys, context.at_s)
    if command.entitlements.as_of > context.at_s + LEEWAY_S:
        raise CommandRefusedError(
            "entitlements are as of a moment to come: they would never grow old; set as_of to when they were read",
            code=Code.AS_OF_IN_FUTURE,
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
        compromised=state.compromised if state else None,
    )


def _disable(state: UserState | None, command: UserDisable, context: Context) -> UserState:
    by_provisioner = context.actor.delegation is not None
    if not (context.actor.is_root or by_provisioner):
        operator_only(context, "set or disable users")
    if state is None:
        raise CommandRefusedError(f"there is no user {command.user_id}", code=Code.UNKNOWN_USER)
    if by_provisioner:
        return disable_by_provisioner(state, command, context)
    blocked = state.provisioned and state.provisioned.model_copy(update={"blocked": True})
    return state.model_copy(update={"status": "disabled", "provisioned": blocked})


def _person(state: UserState | None, user_id: str) -> UserState:
    """Return the state of a user who is a person. Raises CommandRefusedError."""
    if state is None:
        raise CommandRefusedError(f"there is no user {user_id}", code=Code.UNKNOWN_USER)
    if state.delegation is not None:
        raise CommandRefusedError(
            f"{user_id} is a provisioner, and no person; give it keys with: ringfence provisioner set",
            code=Code.IS_PROVISIONER,
        )
    return state


def _add_key(state: UserState, command: UserAddKey, context: Context) -> UserState:
    user_id, key, at_s = state.user_id, command.key, context.at_s
    by_oneself = context.actor.user_id == user_id
    if not (context.actor.is_root or by_oneself):
        operator_only(context, f"add a key to {user_id}, besides {user_id} with a key file of their own")
    if state.status != "active":
        raise CommandRefusedError(
            f"user {user_id} is disabled; let them act again first: ringfence user set {user_id}",
            code=Code.USER_DISABLED,
        )
    check_keys((key,), at_s, at_least=1, passkeys=True)
    _check_new_key(state, key, at_s)
    if key.attested and (by_oneself or not context.actor.is_operator):
        raise CommandRefusedError(
            "nobody says of their own key that it is attested; an operator verifies its attestation, and signs",
            code=Code.ATTESTATION_NOT_VERIFIED,
        )
    if context.key_proof is None:
        reason = context.key_proof_problem or "it embeds no invitation and no possession"
        raise CommandRefusedError(
            f"nothing proves that {user_id} has this key: {reason}", code=Code.POSSESSION_INVALID
        )
    if context.key_proof.invitation_id in context.key_history.invitations:
        raise CommandRefusedError(
            f"this invitation of {user_id} was used before, and counts once; make another with: "
            f"ringfence user invite {user_id}",
            code=Code.INVITATION_USED,
        )
    former = tuple(one for one in state.keys if one.kid != key.kid)
    return state.model_copy(update={"keys": (key, *former)})


def _check_new_key(state: UserState, key: KeyRecord, at_s: int) -> None:
    """Refuse a key that the user has already, or that must not come back. Raises CommandRefusedError."""
    if key.kid in (state.compromised or ()):
        raise CommandRefusedError(_compromised_text(key.kid), code=Code.KEY_COMPROMISED)
    live = [one.kid for one in state.keys if one.not_after > at_s]
    if key.kid in live:
        raise CommandRefusedError(f"{state.user_id} has key {key.kid} already", code=Code.KEY_TWICE)
    if len(live) >= MAX_KEYS:
        raise CommandRefusedError(
            f"{state.user_id} has {len(live)} keys, and no more can be; end one with: "
            f"ringfence user end-key {state.user_id} KID",
            code=Code.TOO_MANY_KEYS,
        )


def _check_known_keys(state: UserState | None, keys: tuple[KeyRecord, ...], at_s: int) -> None:
    """Refuse a `user.set` that makes a key into another kind of key, adds a passkey, or revives a compromised key.

    A passkey needs the proof that only `user.add-key` has. Raises CommandRefusedError.
    """
    known = {key.kid: key for key in state.keys} if state else {}
    for key in keys:
        former = known.get(key.kid)
        if former is None and _passkey_fields(key) != _NO_PASSKEY:
            raise CommandRefusedError(
                f"key {key.kid} is a passkey: add it with: ringfence user add-key",
                code=Code.POSSESSION_INVALID,
            )
        if former is not None and _passkey_fields(key) != _passkey_fields(former):
            raise CommandRefusedError(
                f"key {key.kid} is given as another kind of key than it is; list it as its record has it",
                code=Code.KEY_CHANGED,
            )
        if state and key.kid in (state.compromised or ()) and key.not_after > at_s:
            raise CommandRefusedError(_compromised_text(key.kid), code=Code.KEY_COMPROMISED)


def _passkey_fields(key: KeyRecord) -> tuple[object, ...]:
    return (key.use, key.credential_id, key.rp_id, key.aaguid, key.backup_eligible, key.attested)


_NO_PASSKEY = (None,) * 6


def _compromised_text(kid: str) -> str:
    return f"key {kid} was ended as compromised, and never counts again; make another key"


def _end_key(state: UserState, command: UserEndKey, context: Context) -> UserState:
    """End a key; as compromised, also those that the user added by it, whenever. Old keys stay known, with their
    end.
    """
    if not (context.actor.is_root or context.actor.user_id == state.user_id):
        operator_only(context, f"end a key of {state.user_id}, besides {state.user_id}")
    if command.kid not in {key.kid for key in state.keys}:
        raise CommandRefusedError(
            f"{state.user_id} has no key {command.kid}; see: ringfence user keys {state.user_id}",
            code=Code.UNKNOWN_KEY,
        )
    if command.holds and not context.actor.is_root:
        operator_only(context, "hold what rests on a compromised key")
    reported, acts = None, True
    if command.compromised and context.actor.is_operator:
        reported, acts = report(state, command, context)
    holds = (*state.holds, reported) if reported else state.holds
    if reported and not acts:
        return state.model_copy(update={"holds": holds})
    ended = {command.kid}
    if command.compromised:
        ended |= context.key_history.added_by(command.kid)
    keys = tuple(
        key.model_copy(update={"not_after": min(key.not_after, context.at_s)}) if key.kid in ended else key
        for key in state.keys
    )
    if command.since_ms is None:
        return state.model_copy(update={"keys": keys})
    # It voids what others have now: only for an operator's word, since anybody may end a key of their own.
    since_ms = reported.since_ms if reported else context.at_s * 1000
    known = state.compromised or {}
    new = {
        key.kid: min(since_ms, known.get(key.kid, since_ms)) for key in keys if key.kid in ended
    }  # an earlier time adds to what ends, a later one takes nothing back
    return state.model_copy(update={"keys": keys, "compromised": {**known, **new}, "holds": holds})


def _left_to_provisioner(state: UserState | None, command: UserSet) -> Provisioned | None:
    """Return what an operator's command leaves of the user's provisioning data. Raises CommandRefusedError."""
    if state is not None and state.delegation is not None:
        raise CommandRefusedError(
            f"{command.user_id} is a provisioner, and no person; set it with: ringfence provisioner set",
            code=Code.IS_PROVISIONER,
        )
    if command.provisioned is None:
        return None
    if state is None or state.provisioned is None:
        raise CommandRefusedError(
            f"{command.user_id} comes from no provisioner; leave out `provisioned`", code=Code.NOT_PROVISIONED
        )
    return provisioned_of(command.provisioned, state.provisioned.by)


def _refuse_self_widening(state: UserState | None, command: UserSet) -> None:
    """Refuse users, operators included, who widen their own roles or entitlements, or renew old entitlements."""
    if state is None or set(command.roles) - set(state.roles):
        raise CommandRefusedError(
            "nobody gives roles to themselves; another operator must sign", code=Code.SELF_WIDENING
        )
    if state.provisioned is not None and command.provisioned is None:
        raise CommandRefusedError(
            "nobody takes themselves away from their provisioner; another operator must sign",
            code=Code.SELF_WIDENING,
        )
    if missing(command.entitlements.scope, state.entitlements.scope):
        raise CommandRefusedError(
            "nobody widens their own entitlements; another operator must sign", code=Code.SELF_WIDENING
        )
    if command.entitlements.as_of > state.entitlements.as_of:
        raise CommandRefusedError(
            "nobody refreshes their own entitlements; another operator must sign", code=Code.SELF_WIDENING
        )
