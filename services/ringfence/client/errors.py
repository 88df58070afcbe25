"""The errors of the SDK. All derive from `RingfenceError`; each says what was wrong and what to do next."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

from pydantic import ValidationError

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.codes import AnyCode, Code, ReceivedCode

if TYPE_CHECKING:
    from ringfence.messages.base import Message
    from ringfence.messages.credential import Reason


class InvalidCallError(RingfenceError):
    """The arguments of a call do not make a valid message. Nothing was sent."""

    code = Code.CALL_INVALID


class IdentityError(RingfenceError):
    """No key was given, or the key belongs to another kind of identity than the call needs."""

    code = Code.IDENTITY_WRONG


class EnrolmentRefusedError(RingfenceError):
    """The registry refused to enrol a running instance; `code` says why."""

    code = Code.ENROL_REFUSED


def grant_command(reason: Reason) -> str | None:
    """Return who can give the permission that a reason names, and by which command; None if no person can."""
    if reason.permission is None or reason.side is None:
        return None
    from ringfence.messages.base import permission_argument

    lacks = reason.permission
    wanted = shlex.quote(permission_argument(lacks.target, lacks.verbs, lacks.resources))
    side, _, who = reason.side.partition(":")
    match side:
        case "task":
            command = f"ringfence task assign AGENT --purpose WHY --for TIME --allow {wanted}"
            return f"the user assigns a task that allows it: {command}"
        case "ceiling":
            command = f"ringfence agent set-ceiling {who} --add {wanted}"
            return f"the sponsor of agent {who} widens its ceiling: {command}"
        case "entitlements":
            return f"user {who} lacks it too; an operator gives it: ringfence user set {who} --add {wanted}"
        case _:
            return None


class RequestDeniedError(RingfenceError):
    """Policy or the issuer denied a credential request. `reasons` holds every reason, `by` says who."""

    code = Code.DENIED

    def __init__(
        self, request_id: str, reasons: Sequence[Reason], by: str, *, retry_after_s: int | None = None
    ) -> None:
        reasons_text = "; ".join(reason.message for reason in reasons) or "no reason was given"
        retry = f" (ask again in {retry_after_s} s)" if retry_after_s is not None else ""
        super().__init__(
            f"denied by {by}: {reasons_text}{retry}", code=ReceivedCode(reasons[0].code) if reasons else None
        )
        self.request_id = request_id
        self.reasons = tuple(reasons)
        self.by = by
        self.retry_after_s = retry_after_s
        """Set where asking again with a new request may work."""
        if commands := dict.fromkeys(found for reason in reasons if (found := grant_command(reason))):
            self.with_remedy("; ".join(commands))


class RequestTimeoutError(RingfenceError):
    """No final answer to a credential request came in time. `waiting_for` says what was missing."""

    code = Code.TIMEOUT

    def __init__(self, request_id: str, waiting_for: str, timeout_s: float, hint: str = "") -> None:
        super().__init__(
            f"no credential within {timeout_s:g} s: still waiting for {waiting_for}{'; ' if hint else ''}{hint}"
        )
        self.request_id = request_id
        self.waiting_for = waiting_for
        self.timeout_s = timeout_s


class RefusedError(RingfenceError):
    """A service refused a command. `reasons` holds every reason."""

    code = Code.REFUSED

    def __init__(self, command: str, reasons: Sequence[Reason], by: str) -> None:
        reasons_text = "; ".join(reason.message for reason in reasons) or "no reason was given"
        super().__init__(
            f"{command} was refused by the {by}: {reasons_text}",
            code=ReceivedCode(reasons[0].code) if reasons else None,
        )
        self.command = command
        self.reasons = tuple(reasons)
        self.by = by


class ProposedError(RingfenceError):
    """A widening command waits for a second person, and nothing has changed yet. `proposal` is its digest."""

    code = Code.SECOND_MISSING

    def __init__(self, message: str, proposal: str) -> None:
        super().__init__(message)
        self.proposal = proposal


class NotAnsweredError(RingfenceError):
    """A service did not answer a command in time. The command may still be carried out."""

    code = Code.NOT_ANSWERED


class StaleApprovalError(RingfenceError):
    """The records or the question changed after a person was shown them. Nothing was signed."""

    code = Code.APPROVAL_STALE


class NotYoursError(RingfenceError):
    """The person may not give this approval. Nothing was signed."""

    code = Code.NOT_APPROVER


class ApiError(RingfenceError):
    """A read API refused the call, or did not answer."""

    code = Code.API_FAILED

    def __init__(self, message: str, *, code: AnyCode | None = None, status: int | None = None) -> None:
        super().__init__(message, code=code)
        self.status = status


class TokenRejectedError(RingfenceError):
    """A resource server must refuse this request: its token is missing or invalid."""

    code = Code.TOKEN_REJECTED

    scheme: Literal["Bearer", "DPoP"] | None = None
    """How the token was presented. The refusal uses the same scheme in its challenge; None if there was no token."""


@contextmanager
def checked(what: str) -> Iterator[None]:
    """Turn pydantic's ValidationError into an InvalidCallError that does not repeat the values."""
    try:
        yield
    except ValidationError as error:
        raise InvalidCallError(f"{what}: {explain(error)}") from None


def require_understood(message: Message, what: str) -> None:
    """Raise InvalidCallError, with the nearest known name, where a message has an unknown field."""
    from ringfence.model.unknown_fields import describe_unknown, unknown_fields

    if unknown := unknown_fields(message):
        raise InvalidCallError(describe_unknown(unknown, what))


class CredentialOverError(RingfenceError):
    """The credential was wiped or has expired. Credentials are never renewed: request a new one."""

    code = Code.CREDENTIAL_OVER


class CredentialUseError(RingfenceError):
    """The credential's kind does not support this use."""

    code = Code.CREDENTIAL_USE
