"""What a tool says about an error: code, message, the missing permission and its side, and what to do next.

Only errors of Ringfence's own are quoted. Anything else may hold what a program was given, so only its type is named.
"""

from __future__ import annotations

import shlex
from typing import Any, Final

import orjson

from ringfence.client.errors import RefusedError, RequestDeniedError, RequestTimeoutError
from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.credential import Reason
from ringfence.messages.permission import Permission

_ASK_BY_CODE: Final = {
    "approval_denied": "a person said no: do not ask again for the same without new reasons",
    "approval_expired": "nobody approved in time: ask again, and tell the person who has to approve",
    "call_invalid": "correct the arguments",
    "overloaded": "ask again later",
    "request_unknown": "call request_credential again",
    "requests_limit": "withdraw what is no longer needed, or wait for it: withdraw_request, wait_for_approval",
    "scope_invalid": "correct the permissions",
    "several_targets": "make one request for each target",
    "task_missing": "name the task in task_id; whoever assigned it knows the id",
    "task_ended": "the user has to assign a new task: ringfence task assign AGENT",
    "task_unknown": "name a task of this agent; whoever assigned it knows the id",
    "timeout": "ask again, and tell the person who has to approve",
    "unavailable": "try again later; if it lasts, an operator runs: ringfence doctor",
}


class ToolError(RingfenceError):
    """Raised by a tool for arguments that it cannot act on. Nothing was sent."""

    code = "call_invalid"


def problem_of(error: BaseException) -> dict[str, Any]:
    """The error as a JSON object: `code`, `message`, and, where known, `reasons`, `ask` and `retry_after_s`."""
    if not isinstance(error, RingfenceError):
        return {
            "code": "internal",
            "message": f"the tool failed ({type(error).__name__}); the log of the server says more",
            "ask": "try again; if it lasts, tell the person who runs this server",
        }
    problem: dict[str, Any] = {"code": error.code, "message": error.message}
    reasons: tuple[Reason, ...] = ()
    if isinstance(error, RequestDeniedError | RefusedError):
        reasons = error.reasons
        problem["by"] = error.by
    if isinstance(error, RequestDeniedError):
        problem["request_id"] = error.request_id
        if error.retry_after_s is not None:
            problem["retry_after_s"] = error.retry_after_s
    if isinstance(error, RequestTimeoutError):
        problem |= {"request_id": error.request_id, "waiting_for": error.waiting_for}
    if reasons:
        problem["reasons"] = [_reason(reason) for reason in reasons]
    asks = dict.fromkeys(ask for reason in reasons if (ask := how_to_ask(reason)) is not None)
    ask = "; ".join(asks) or error.remedy or _ASK_BY_CODE.get(error.code)
    if ask is not None:
        problem["ask"] = ask
    return problem


def how_to_ask(reason: Reason) -> str | None:
    """Who can give the permission that a denial misses, and by which command; None if nobody can."""
    if reason.permission is None or reason.side is None:
        return _ASK_BY_CODE.get(reason.code)
    wanted, (side, _, who) = shlex.quote(_text(reason.permission)), reason.side.partition(":")
    if side == "task":
        command = f"ringfence task assign AGENT --purpose WHY --for TIME --allow {wanted}"
        return f"the user assigns a task that allows it: {command}"
    if side == "ceiling":
        return (
            f"the sponsor of agent {who} widens its ceiling: ringfence agent set-ceiling {who} --add {wanted}"
        )
    if side == "entitlements":
        return f"user {who} lacks it too; an operator gives it: ringfence user set {who} --add {wanted}"
    return None


def _reason(reason: Reason) -> dict[str, Any]:
    found: dict[str, Any] = {"code": reason.code, "message": reason.message}
    if reason.permission is not None:
        found["permission"] = reason.permission.model_dump(mode="json")
    if reason.side is not None:
        found["side"] = reason.side
    return found


def _text(permission: Permission) -> str:
    """As `--allow` takes it: `target:verbs:resources`, or JSON where a resource has a separator in it."""
    if any("," in resource or ":" in resource for resource in permission.resources):
        return orjson.dumps(permission.model_dump(mode="json")).decode()
    return f"{permission.target}:{','.join(permission.verbs)}:{','.join(permission.resources)}"
