"""A target's settings for its backend, parsed strictly, and the errors of targets.

`model/target_settings.py` declares the settings; unknown ones are refused. No error message holds a credential, nor
Ringfence's own access to a target.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError

from ringfence.backends.secret_sources import TargetAccess
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.base import Scope
from ringfence.messages.codes import Code
from ringfence.messages.registry import TargetState
from ringfence.model.target_settings import TargetSettings

log = logging.getLogger(__name__)


class TargetSettingsError(RingfenceError):
    """Raised when a target's record has settings that its backend does not understand."""

    code = Code.TARGET_SETTINGS_INVALID


S = TypeVar("S", bound=TargetSettings)


def settings_of(target: TargetState, kind: type[S]) -> S:
    """Return the settings in a target's record for its backend. Raises TargetSettingsError."""
    try:
        return kind.model_validate(target.backend.model_extra or {})
    except ValidationError as error:
        raise TargetSettingsError(
            f"the settings of target {target.target_id} are wrong: {explain(error)}"
        ) from None


def problem_of(
    plan: Callable[[Scope], object],
    scope: Scope,
    target: TargetState,
    kind: type[TargetSettings],
    access: TargetAccess,
) -> str | None:
    """`Backend.problem`, for backends that translate a scope into rights of the target, without asking the target.

    Args:
        plan: translates a scope; raises InexactError if the target's rights cannot express it exactly.
        kind: the settings that the target's record may have.
        access: Ringfence's own access to targets.

    Returns None if the credential can be made, else a sentence for the agent. If the target is not set up, the log has
    the cause, and the agent is only told to ask an operator.
    """
    try:
        plan(scope)
        settings_of(target, kind)
        access.check(target.target_id)
    except InexactError as error:
        return str(error)
    except RingfenceError as error:
        log.error("%s", error)
        return f"Ringfence is not set up to work at target {target.target_id}; ask an operator"
    return None


class BackendError(RingfenceError):
    """Raised at start when a backend of another package cannot be used."""

    code = Code.BACKEND_INVALID


class TargetError(RingfenceError):
    """Raised when a target does not answer, or does not let Ringfence work there. The same call may succeed later."""

    code = Code.TARGET_UNAVAILABLE


class TargetRefusedError(RingfenceError):
    """Raised when a target answered and refused this one credential. It says nothing about the target's health."""

    code = Code.TARGET_REFUSED


class CircuitOpenError(TargetError):
    """Raised while the circuit breaker of a target is open after repeated failures. Try again in `retry_ms`."""

    code = Code.TARGET_SHUT

    def __init__(self, message: str, retry_ms: int) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


class InexactError(ValueError):
    """Raised when the rights of a target cannot express a scope exactly."""
