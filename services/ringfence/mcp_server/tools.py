"""The tools: names, descriptions for models, JSON schemas of arguments and results, and errors as a model reads them.

What a tool returns ends up in the context of a model, and from there in logs and in other programs. So no result has
a field that could hold a credential: an agent gets the handle of a lease, which the gateway turns into a credential.

An error has code, message, the missing permission and its side, and what to do next. Only Ringfence's own errors are
quoted. Anything else may hold what a program was given, so only its type is named.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field

from ringfence.client.errors import RefusedError, RequestDeniedError, RequestTimeoutError, grant_command
from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.base import Glob, Permission, Scope, TargetId, Uuid, Verb
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason

_ASK_BY_CODE: Final[Mapping[str, str]] = {
    Code.APPROVAL_DENIED: "a person said no: do not ask again for the same without new reasons",
    Code.APPROVAL_EXPIRED: "nobody approved in time: ask again, and tell the person who has to approve",
    Code.CALL_INVALID: "correct the arguments",
    Code.OVERLOADED: "ask again later",
    Code.REQUEST_UNKNOWN: "call request_credential again",
    Code.REQUESTS_LIMIT: "withdraw what is no longer needed, or wait for it: withdraw_request, wait_for_approval",
    Code.SCOPE_INVALID: "correct the permissions",
    Code.SEVERAL_TARGETS: "make one request for each target",
    Code.TASK_MISSING: "name the task in task_id; whoever assigned it knows the id",
    Code.TASK_ENDED: "the user has to assign a new task: ringfence task assign AGENT",
    Code.TASK_UNKNOWN: "name a task of this agent; whoever assigned it knows the id",
    Code.TIMEOUT: "ask again, and tell the person who has to approve",
    Code.UNAVAILABLE: "try again later; if it lasts, an operator runs: ringfence doctor",
}


class ToolError(RingfenceError):
    """Raised by a tool for arguments that it cannot act on. Nothing was sent."""

    code = Code.CALL_INVALID


def problem_of(error: BaseException) -> dict[str, Any]:
    """The error as a JSON object: `code`, `message`, and, where known, `reasons`, `ask` and `retry_after_s`."""
    if not isinstance(error, RingfenceError):
        return {
            "code": Code.INTERNAL,
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
    """Who can give the permission that a denial misses, and by which command; None if no person can."""
    if reason.permission is None or reason.side is None:
        return _ASK_BY_CODE.get(reason.code)
    return grant_command(reason)


def _reason(reason: Reason) -> dict[str, Any]:
    found: dict[str, Any] = {"code": reason.code, "message": reason.message}
    if reason.permission is not None:
        found["permission"] = reason.permission.model_dump(mode="json")
    if reason.side is not None:
        found["side"] = reason.side
    return found


MAX_WAIT_S: Final = 50
"""Clients give a call up after 60 s by default."""
_WAIT_S: Final = 30
_MAX_TTL_S: Final = 24 * 3600

TaskArgument = Annotated[
    Uuid | None,
    Field(description="The id of the task. Leave it out if this server was started for one task."),
]
WaitArgument = Annotated[
    int,
    Field(
        ge=0,
        le=MAX_WAIT_S,
        description="How long to wait for the answer, in seconds. 0 answers at once. The request goes on afterwards.",
    ),
]
RequestArgument = Annotated[
    str, Field(pattern=r"^r[0-9]{1,9}$", description="The `request` that request_credential returned.")
]


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


class WantedPermission(_Schema):
    """Verbs on resources at one target."""

    target: Annotated[TargetId, Field(description="The id of the target, as show_task lists it.")]
    verbs: Annotated[
        tuple[Verb, ...],
        Field(min_length=1, max_length=64, description="Verbs of that target, such as read."),
    ]
    resources: Annotated[
        tuple[Glob, ...],
        Field(
            min_length=1,
            max_length=64,
            description="Resources in the target's own names. `*` stands for what has no slash, `**` for everything.",
        ),
    ]

    def permission(self) -> Permission:
        return Permission(target=self.target, verbs=self.verbs, resources=self.resources)


class RequestCredential(_Schema):
    """Arguments of `request_credential`."""

    permissions: Annotated[
        tuple[WantedPermission, ...],
        Field(
            min_length=1,
            max_length=64,
            description="What is needed now, and no more. All at one target: use one request for each target.",
        ),
    ]
    reason: Annotated[
        str,
        Field(
            min_length=1,
            max_length=1000,
            description="Why, in one sentence. A person who approves the request reads it.",
        ),
    ]
    task_id: TaskArgument = None
    ttl_s: Annotated[int, Field(ge=1, le=_MAX_TTL_S, description="How long it is needed, in seconds.")] = 300
    wait_s: WaitArgument = _WAIT_S


class WaitForRequest(_Schema):
    """Arguments of `wait_for_approval`."""

    request: RequestArgument
    wait_s: WaitArgument = _WAIT_S


class WithdrawRequest(_Schema):
    """Arguments of `withdraw_request`."""

    request: RequestArgument


class ShowTask(_Schema):
    """Arguments of `show_task`."""

    task_id: TaskArgument = None


class ListLeases(_Schema):
    """Arguments of `list_leases`."""

    task_id: TaskArgument = None


class ReleaseCredential(_Schema):
    """Arguments of `release_credential`."""

    lease_id: Annotated[Uuid, Field(description="The lease, as request_credential or list_leases named it.")]
    reason: Annotated[
        str, Field(min_length=1, max_length=1000, description="Why; it stands in the audit trail.")
    ] = "no longer needed"


class LeaseResult(_Schema):
    """A lease. There is no credential in it: the gateway has that."""

    lease_id: Annotated[str, Field(description="The id of the lease.")]
    handle: Annotated[
        str,
        Field(
            description="What names the lease to the gateway. It is no secret, and is worth nothing elsewhere."
        ),
    ]
    target: str
    permissions: Scope
    ends_at: Annotated[
        int, Field(description="Seconds since 1970, UTC. It cannot be renewed: ask for a new one.")
    ]


class RequestResult(_Schema):
    """The state of one request."""

    request: Annotated[str, Field(description="The name of the request at this server.")]
    status: Annotated[
        Literal["allowed", "waiting"],
        Field(description="`allowed`: use the lease. `waiting`: call wait_for_approval with `request`."),
    ]
    request_id: Annotated[
        str | None, Field(description="The id of the request in the audit trail, once known.")
    ] = None
    waiting_for: Annotated[str | None, Field(description="Who has to approve it; with `waiting`.")] = None
    expires_at: Annotated[
        int | None,
        Field(description="With `waiting`: until when people can approve. Seconds since 1970, UTC."),
    ] = None
    lease: LeaseResult | None = None
    how_to_use: Annotated[
        str | None, Field(description="With `allowed`: how requests get the credential.")
    ] = None


class WithdrawnResult(_Schema):
    """The end of a request that was withdrawn, or had ended before."""

    request: str
    status: Literal["withdrawn", "ended"]


class TaskResult(_Schema):
    """A task of the agent."""

    task_id: str
    agent_id: str
    purpose: str
    status: Literal["active", "ended"]
    on_behalf_of: Annotated[str, Field(description="The user for whom the agent works in this task.")]
    ends_at: Annotated[int, Field(description="Seconds since 1970, UTC.")]
    permissions: Annotated[Scope, Field(description="The most that requests in this task can ask for.")]


class OpenRequestResult(_Schema):
    """A request without a final answer."""

    request: str
    task_id: str
    reason: str
    waiting_for: str | None = None


class LeasesResult(_Schema):
    """The leases of a task that can be used now, and the requests that wait."""

    task_id: str
    leases: tuple[LeaseResult, ...]
    complete: Annotated[
        bool,
        Field(
            description="Whether the gateway listed them. If not, only what was asked for here is known, and a "
            "lease may have been revoked."
        ),
    ]
    waiting: tuple[OpenRequestResult, ...]


class ReleasedResult(_Schema):
    """A lease that was given back."""

    lease_id: str
    status: Literal["released"]


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """One tool."""

    name: str
    title: str
    description: str
    arguments: type[_Schema]
    result: type[_Schema]
    read_only: bool
    destructive: bool = False
    idempotent: bool = False

    @property
    def input_schema(self) -> dict[str, Any]:
        return self.arguments.model_json_schema()

    @property
    def output_schema(self) -> dict[str, Any]:
        return self.result.model_json_schema(mode="serialization")


TOOLS: Final = (
    ToolSpec(
        "show_task",
        "Show the task",
        "Show what this agent's task is for, what it allows at most, and when it ends. Call it first: requests "
        "for more than the task allows are denied.",
        ShowTask,
        TaskResult,
        read_only=True,
        idempotent=True,
    ),
    ToolSpec(
        "request_credential",
        "Request a credential",
        "Ask for access to one target for this task. You get a lease with a handle, and never the credential "
        "itself: the gateway adds that to your requests. A person may have to approve it; then the status is "
        "`waiting`, and wait_for_approval tells when it was approved. Ask for as little as you need now. A denial "
        "says which permission is missing, on which side, and who can give it.",
        RequestCredential,
        RequestResult,
        read_only=False,
    ),
    ToolSpec(
        "wait_for_approval",
        "Wait for an approval",
        "Wait for the answer to a request that is `waiting`. Call it again while the status is `waiting`. An "
        "error says that it was denied, or that nobody answered in time.",
        WaitForRequest,
        RequestResult,
        read_only=True,
        idempotent=True,
    ),
    ToolSpec(
        "withdraw_request",
        "Withdraw a request",
        "Withdraw a request that is `waiting` and no longer needed. People are asked about it no more.",
        WithdrawRequest,
        WithdrawnResult,
        read_only=False,
        idempotent=True,
    ),
    ToolSpec(
        "list_leases",
        "List leases",
        "List the leases of this task that can be used now, and the requests that wait for an answer.",
        ListLeases,
        LeasesResult,
        read_only=True,
        idempotent=True,
    ),
    ToolSpec(
        "release_credential",
        "Release a credential",
        "Give a lease back as soon as it is no longer needed. Requests that rely on it are refused from then on.",
        ReleaseCredential,
        ReleasedResult,
        read_only=False,
        destructive=True,
        idempotent=True,
    ),
)
"""All tools, in the order in which an agent needs them."""
