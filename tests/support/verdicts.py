"""What a check decided, in the form that tests compare."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.credential import Reason
from ringfence.model.verdict import Allowed, Refused


def code_of(verdict: Allowed | Refused) -> str | None:
    """The code of a refusal; None if the check passed."""
    return verdict.reason.code if isinstance(verdict, Refused) else None


def reason_of(verdict: Any) -> Reason:
    """The reason of a refusal. Fails if the check passed."""
    assert isinstance(verdict, Refused), verdict
    return verdict.reason


def refusal_code(ask: Callable[[], object]) -> str:
    """The one code with which a function refuses: that of the error which it raises, of its reason, or its result."""
    try:
        found = ask()
    except RingfenceError as error:
        return error.code
    reasons = getattr(found, "reasons", None) or [getattr(found, "reason", found)]
    (code,) = {getattr(reason, "code", reason) for reason in reasons}
    return str(code)
