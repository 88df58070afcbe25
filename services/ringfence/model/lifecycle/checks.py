"""What commands about different subjects have in common: each raises CommandRefusedError where it does not hold."""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.kernel.crypto.keys import public_key
from ringfence.messages.enrolment import AttestationSelector
from ringfence.messages.keys import KeyRecord
from ringfence.messages.permission import Scope
from ringfence.messages.registry import UserState
from ringfence.model.identity.attestation import problem, selector_id
from ringfence.model.lifecycle.context import CommandRefusedError, Context
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.scope import validate_scope


def operator_only(context: Context, what: str) -> None:
    """The signer is an operator; `what` says what only they may do."""
    if not context.actor.is_operator:
        raise CommandRefusedError(f"only an operator may {what}", code="not_operator")


def check_sponsor(user_id: str, context: Context) -> None:
    """The user is active and has the role sponsor."""
    if "sponsor" not in context.roles_of(user_id):
        raise CommandRefusedError(
            f"{user_id} is no active user with the role sponsor; give it with: ringfence user set",
            code="not_a_sponsor",
        )


def check_keys(keys: Sequence[KeyRecord], at_s: int, *, at_least: int) -> None:
    """Public keys, each under its own thumbprint and listed once, `at_least` so many of them valid at `at_s`."""
    if len({key.kid for key in keys}) != len(keys):
        raise CommandRefusedError("one key is listed twice", code="key_twice")
    for key in keys:
        if "d" in (key.jwk.model_extra or {}):
            raise CommandRefusedError(
                f"key {key.kid} comes with its private part, which everyone can now read; make another key",
                code="private_key",
            )
        try:
            thumbprint = public_key(key.jwk).kid
        except ValueError as error:
            raise CommandRefusedError(f"key {key.kid} cannot be used: {error}", code="key_invalid") from None
        if thumbprint != key.kid:
            raise CommandRefusedError(
                f"key {key.kid} is not named by its RFC 7638 thumbprint, {thumbprint}", code="key_invalid"
            )
    if sum(key.not_before <= at_s < key.not_after for key in keys) < at_least:
        raise CommandRefusedError("no key is valid now; see not_before and not_after", code="no_valid_key")


def check_attestation(selectors: Sequence[AttestationSelector]) -> None:
    """Selectors, each of which says whose workload it lets in."""
    if len({selector_id(selector) for selector in selectors}) != len(selectors):
        raise CommandRefusedError("one selector is listed twice", code="selector_twice")
    for selector in selectors:
        if found := problem(selector):
            raise CommandRefusedError(found, code="selector_too_wide")


def ended_keys(state: UserState | None, new: Sequence[KeyRecord], at_s: int) -> tuple[KeyRecord, ...]:
    """The keys that a user had and that are not among the new ones: they end at `at_s`, and stay known."""
    listed = {key.kid for key in new}
    kept = [key for key in (state.keys if state else ()) if key.kid not in listed]
    return tuple(key.model_copy(update={"not_after": min(key.not_after, at_s)}) for key in kept)


def check_scope(scope: Scope, *, allow_empty: bool = False) -> None:
    """A scope that can be compared."""
    try:
        validate_scope(scope, allow_empty=allow_empty)
    except ScopeError as error:
        raise CommandRefusedError(str(error), code="scope_invalid") from None
