"""The result of a check: `Allowed`, or `Refused` with its reason. Never None for yes: a check that forgets to return is
then an error of types, and not a permission.

Neither has a truth value: `if verdict:` is an error of types, so a caller asks which of the two it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from ringfence.messages.base import Permission
from ringfence.messages.codes import AnyCode
from ringfence.messages.credential import Reason

MAX_MESSAGE_LENGTH: Final = 1000
"""The length in characters that the message of a reason is cut to."""


@dataclass(frozen=True, slots=True)
class Allowed:
    """Every check passed."""


@dataclass(frozen=True, slots=True)
class Refused:
    """A check failed, for this reason."""

    reason: Reason


Verdict = Allowed | Refused
ALLOWED: Final = Allowed()


def refused(
    code: AnyCode, message: str, *, permission: Permission | None = None, side: str | None = None
) -> Refused:
    """Build a refusal; a message longer than `MAX_MESSAGE_LENGTH` characters is cut.

    `permission` and `side`: the part of the scope that is not allowed, and whose limit does not allow it.
    """
    return Refused(Reason(code=code, message=message[:MAX_MESSAGE_LENGTH], permission=permission, side=side))
