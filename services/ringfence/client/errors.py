"""The errors of the SDK. All derive from `RingfenceError`; each says what was wrong and what to do next."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

from pydantic import ValidationError

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.crypto.jws import explain
from ringfence.messages.base import Message
from ringfence.messages.credential import Reason
from ringfence.model.unknown_fields import describe_unknown, unknown_fields


class InvalidCallError(RingfenceError):
    """A call with arguments that no message can be made of; nothing was sent."""

    code = "call_invalid"


class IdentityError(RingfenceError):
    """No key was given, or it speaks for another kind of identity than the call needs."""

    code = "identity_wrong"


class EnrolmentRefusedError(RingfenceError):
    """The registry does not let a running instance in; `code` says why."""

    code = "enrol_refused"


class RequestDeniedError(RingfenceError):
    """A request for a credential was denied, by policy or by the issuer. `reasons` holds every reason."""

    code = "denied"

    def __init__(
        self, request_id: str, reasons: Sequence[Reason], by: str, *, retry_after_s: int | None = None
    ) -> None:
        reasons_text = "; ".join(reason.message for reason in reasons) or "no reason was given"
        retry = f" (ask again in {retry_after_s} s)" if retry_after_s is not None else ""
        super().__init__(f"denied by {by}: {reasons_text}{retry}", code=reasons[0].code if reasons else None)
        self.request_id = request_id
        self.reasons = tuple(reasons)
        self.by = by
        self.retry_after_s = retry_after_s
        """Set where asking again with a new request may work."""


class RequestTimeoutError(RingfenceError):
    """No final answer came in time. `waiting_for` says what was still missing."""

    code = "timeout"

    def __init__(self, request_id: str, waiting_for: str, timeout_s: float, hint: str = "") -> None:
        super().__init__(
            f"no credential within {timeout_s:g} s: still waiting for {waiting_for}{'; ' if hint else ''}{hint}"
        )
        self.request_id = request_id
        self.waiting_for = waiting_for
        self.timeout_s = timeout_s


class RefusedError(RingfenceError):
    """A command was refused by the service that decides on it. `reasons` holds every reason."""

    code = "refused"

    def __init__(self, command: str, reasons: Sequence[Reason], by: str) -> None:
        reasons_text = "; ".join(reason.message for reason in reasons) or "no reason was given"
        super().__init__(
            f"{command} was refused by the {by}: {reasons_text}", code=reasons[0].code if reasons else None
        )
        self.command = command
        self.reasons = tuple(reasons)
        self.by = by


class NotAnsweredError(RingfenceError):
    """The service that decides on a command did not answer in time; whether it still will is unknown."""

    code = "not_answered"


class StaleApprovalError(RingfenceError):
    """What a person was shown is no longer what an approval would be for."""

    code = "approval_stale"


class NotYoursError(RingfenceError):
    """Somebody would answer what they have no say in. Nothing was signed."""

    code = "not_approver"


class ApiError(RingfenceError):
    """A read API refused the call, or did not answer."""

    code = "api_failed"

    def __init__(self, message: str, *, code: str | None = None, status: int | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status


class TokenRejectedError(RingfenceError):
    """A token that a resource server must not accept, or a request that has none."""

    code = "token_rejected"

    scheme: Literal["Bearer", "DPoP"] | None = None
    """How the token was presented, where one was: in words of the same scheme the request is refused."""


@contextmanager
def checked(what: str) -> Iterator[None]:
    """Turn what pydantic says about wrong arguments into an InvalidCallError without their values."""
    try:
        yield
    except ValidationError as error:
        raise InvalidCallError(f"{what}: {explain(error)}") from None


def require_understood(message: Message, what: str) -> None:
    """Raises InvalidCallError, with the nearest known name, where a message has a field that is not known."""
    if found := unknown_fields(message):
        raise InvalidCallError(describe_unknown(found, what))


class CredentialOverError(RingfenceError):
    """A credential was wiped, or its time is over. Nothing renews it by itself: ask for a new one."""

    code = "credential_over"


class CredentialUseError(RingfenceError):
    """A credential was to be used in a way that its kind does not have."""

    code = "credential_use"
