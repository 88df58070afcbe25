"""What goes wrong at targets. No message holds a credential, nor the broker's own rights."""

from __future__ import annotations

from ringfence.kernel.base.errors import RingfenceError


class BackendError(RingfenceError):
    """A backend of another package cannot be used. Raised at start."""

    code = "backend_invalid"


class TargetError(RingfenceError):
    """A target does not answer, or does not let Ringfence work there; the same call may work later."""

    code = "target_unavailable"


class TargetRefusedError(RingfenceError):
    """A target answered, and refused this one credential. Says nothing about the target's health."""

    code = "target_refused"


class CircuitOpenError(TargetError):
    """A target failed again and again, and is left alone for `retry_ms` more."""

    code = "target_shut"

    def __init__(self, message: str, retry_ms: int) -> None:
        super().__init__(message)
        self.retry_ms = retry_ms


class InexactError(ValueError):
    """A scope that the rights of a target cannot say exactly."""
