"""What a target's record says to its backend, read as `model/target_settings.py` declares it; none unknown."""

from __future__ import annotations

import logging
from typing import TypeVar

from pydantic import ValidationError

from ringfence.backends.access import TargetAccess
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.crypto.jws import explain
from ringfence.messages.registry import TargetState
from ringfence.model.target_settings import TargetSettings

log = logging.getLogger(__name__)


class TargetSettingsError(RingfenceError):
    """The record of a target says something to its backend that it does not understand."""

    code = "target_settings_invalid"


S = TypeVar("S", bound=TargetSettings)


def settings_of(target: TargetState, kind: type[S]) -> S:
    """What the record of a target says to its backend. Raises TargetSettingsError."""
    try:
        return kind.model_validate(target.backend.model_extra or {})
    except ValidationError as error:
        raise TargetSettingsError(
            f"the settings of target {target.target_id} are wrong: {explain(error)}"
        ) from None


def not_set_up(target: TargetState, kind: type[TargetSettings], access: TargetAccess) -> str | None:
    """What an agent is told where its target is not set up as its backend needs it, or None. What it is, is logged."""
    try:
        settings_of(target, kind)
        access.check(target.target_id)
    except RingfenceError as error:
        log.error("%s", error)
        return f"Ringfence is not set up to work at target {target.target_id}; ask an operator"
    return None
