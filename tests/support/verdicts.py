"""What a check decided, in the form that tests compare."""

from __future__ import annotations

from typing import Any

from ringfence.messages.credential import Reason
from ringfence.model.verdict import Allowed, Refused


def code_of(verdict: Allowed | Refused) -> str | None:
    """The code of a refusal; None if the check passed."""
    return verdict.reason.code if isinstance(verdict, Refused) else None


def reason_of(verdict: Any) -> Reason:
    """The reason of a refusal. Fails if the check passed."""
    assert isinstance(verdict, Refused), verdict
    return verdict.reason
