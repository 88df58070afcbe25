"""What a target's record says to its backend: fields of its own beside `kind`, each with a type, none unknown."""

from __future__ import annotations

import logging
from typing import Annotated, Final, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ringfence.backends.access import TargetAccess
from ringfence.kernel.errors import RingfenceError
from ringfence.kernel.jws import explain
from ringfence.messages.registry import TargetState

log = logging.getLogger(__name__)

Address = Annotated[str, Field(pattern=r"^([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}$")]
"""`host:port`, where agents reach the target."""


_HOST: Final = r"([A-Za-z0-9.-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(:[0-9]{1,5})?"
TargetUrl = Annotated[
    str, Field(pattern=rf"^(https://{_HOST}|http://(127\.0\.0\.1|localhost|\[::1\])(:[0-9]{{1,5}})?)$")
]
"""Where the gateway sends requests: scheme, host and port. In clear on this machine alone."""


class TargetSettingsError(RingfenceError):
    """The record of a target says something to its backend that it does not understand."""

    code = "target_settings_invalid"


class TargetSettings(BaseModel):
    """Base of what one kind understands. A field that it does not know may limit something: refused, not ignored."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    address: Address | None = None
    """Where agents reach the target; where Ringfence itself does, if not given."""


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
