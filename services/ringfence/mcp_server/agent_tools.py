"""The tools of one agent, run by the SDK, and the credential requests that go on after their tool call has returned.

No result and no error has a credential in it.

A person may take longer to approve than a call may last. A request ends with its answer, by `withdraw`, or with the
server. The SDK withdraws what no call waits for any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import GatewayCredential, IssuedCredential
from ringfence.client.agent.replies import PendingRequest
from ringfence.client.task_view import HeldLease
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.validation_problems import explain
from ringfence.mcp_server.tools import (
    TOOLS,
    LeaseResult,
    LeasesResult,
    ListLeases,
    OpenRequestResult,
    ReleaseCredential,
    ReleasedResult,
    RequestCredential,
    RequestResult,
    ShowTask,
    TaskResult,
    ToolError,
    WaitForRequest,
    WithdrawnResult,
    WithdrawRequest,
    problem_of,
)
from ringfence.messages.codes import Code

MAX_OPEN: Final = 16
"""Requests that wait at a time. A model that asks in a loop must not fill the list of whoever approves."""
MAX_ENDED: Final = 64
"""Answers that are kept for calls that come later."""

Ask = Callable[[Callable[[PendingRequest], None]], Awaitable[IssuedCredential]]
"""Sends one request and returns its credential. It calls what it is given when a person has to approve."""


@dataclass(slots=True)
class OpenRequest:
    name: str
    """What tool calls name it by."""
    task_id: str
    reason: str
    answer: asyncio.Task[IssuedCredential] = field(repr=False)
    pending: PendingRequest | None = None
    """Set while a person is asked."""


class OpenRequests:
    def __init__(self) -> None:
        self._requests: dict[str, OpenRequest] = {}
        self._number = 0

    def waiting(self, task_id: str) -> list[OpenRequest]:
        return [one for one in self._requests.values() if one.task_id == task_id and not one.answer.done()]

    def start(self, task_id: str, reason: str, ask: Ask) -> OpenRequest:
        """Send a request. Raises ToolError if too many wait already."""
        ended = [one for one in self._requests.values() if one.answer.done()]
        for one in ended[:-MAX_ENDED]:
            del self._requests[one.name]
        if len(self._requests) - len(ended) >= MAX_OPEN:
            raise ToolError(f"{MAX_OPEN} requests wait for an answer already", code=Code.REQUESTS_LIMIT)
        self._number += 1
        name = f"r{self._number}"

        def on_pending(pending: PendingRequest) -> None:
            request.pending = pending

        async def work() -> IssuedCredential:
            return await ask(on_pending)

        answer = asyncio.create_task(work(), name=f"request {name}")
        request = OpenRequest(name, task_id, reason, answer)
        self._requests[name] = request
        # Its error is for the caller that asks for it, and there may be none.
        answer.add_done_callback(lambda done: done.cancelled() or done.exception())
        return request

    def find(self, name: str) -> OpenRequest:
        """Raises ToolError if there is no such request."""
        request = self._requests.get(name)
        if request is None:
            raise ToolError(
                f"there is no request {name} here: this server has started again, or it ended long ago",
                code=Code.REQUEST_UNKNOWN,
            )
        return request

    async def wait(self, request: OpenRequest, wait_s: float) -> IssuedCredential | None:
        """The credential; None if there is no answer after `wait_s`. Raises what the request raised.

        The request goes on when the caller gives up.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(wait_s):
                await asyncio.wait({request.answer})
        if not request.answer.done():
            return None
        if request.answer.cancelled():
            raise ToolError(f"request {request.name} was withdrawn", code=Code.REQUEST_UNKNOWN)
        return request.answer.result()

    async def withdraw(self, request: OpenRequest) -> bool:
        """End a request. False if it had ended."""
        if request.answer.done():
            return False
        request.answer.cancel()
        await asyncio.wait({request.answer})
        return True

    async def close(self) -> None:
        """End all requests. Those without an answer are withdrawn."""
        for request in self._requests.values():
            request.answer.cancel()
        if self._requests:
            await asyncio.wait({request.answer for request in self._requests.values()})


log = logging.getLogger(__name__)

HOW_TO_USE: Final = (
    "send requests to the target through the gateway, which adds the credential: in a run or behind `ringfence gateway "
    "connect` just use the target's own URL; elsewhere show the handle with a proof of the agent's key"
)
_GIVE_UP_S: Final = 4 * 3600.0
"""How long a request may wait for people. Policy ends it before, by a deadline of its own."""
_RELEASE_WITHIN_S: Final = 5.0
"""How long the end of the server may take for what it gives back."""


@dataclass(frozen=True, slots=True)
class ToolAnswer:
    """The answer to a call: a JSON object, and whether it is an error."""

    content: dict[str, Any]
    is_error: bool = False


class AgentTools:
    """The tools of one agent. What it asked for ends with it."""

    def __init__(self, agent: Agent, task_id: str | None = None) -> None:
        """`agent`: connected; `task_id`: the only task that calls may name, if any."""
        self._agent = agent
        self._task_id = task_id
        self._requests = OpenRequests()
        self._held: dict[str, IssuedCredential] = {}
        """Leases that were asked for here, by id."""
        self._handlers: dict[str, Callable[[Any], Awaitable[BaseModel]]] = {
            "show_task": self._show_task,
            "request_credential": self._request,
            "wait_for_approval": self._wait,
            "withdraw_request": self._withdraw,
            "list_leases": self._list_leases,
            "release_credential": self._release,
        }

    async def call(self, name: str, arguments: dict[str, Any]) -> ToolAnswer:
        """Call a tool. Never raises, but where the call itself is cancelled."""
        try:
            spec = next((tool for tool in TOOLS if tool.name == name), None)
            if spec is None:
                raise ToolError(f"there is no tool {name[:64]!r}; see tools/list", code=Code.TOOL_UNKNOWN)
            try:
                parsed = spec.arguments.model_validate(arguments)
            except ValidationError as error:
                raise ToolError(f"the arguments: {explain(error)}") from None
            work = asyncio.ensure_future(self._handlers[name](parsed))
        except ToolError as error:
            return _error(error)
        try:
            await asyncio.wait({work})
        except asyncio.CancelledError:
            work.cancel()
            raise
        if work.cancelled():
            return _error(ToolError("the call was given up", code=Code.CANCELLED))
        if (failure := work.exception()) is not None:
            if not isinstance(failure, RingfenceError):
                # Not the error itself: it may hold what the tool was given.
                log.error("tool %s failed: %s", name, type(failure).__name__)
            return _error(failure)
        return ToolAnswer(work.result().model_dump(mode="json", exclude_none=True))

    async def close(self) -> None:
        """Withdraw requests that wait, and give back the leases that were asked for here."""
        await self._requests.close()
        now_s = time.time()
        held = [lease for lease in self._held.values() if lease.expires_at > now_s]
        self._held.clear()
        try:
            async with asyncio.timeout(_RELEASE_WITHIN_S):
                await asyncio.gather(*(self._release_quietly(lease) for lease in held))
        except TimeoutError:
            log.warning("not all leases were given back; they end at their deadlines")

    # --- tools ---

    async def _show_task(self, arguments: ShowTask) -> TaskResult:
        task = await self._agent.task(self._task(arguments.task_id))
        return TaskResult(
            task_id=task.task_id,
            agent_id=task.agent_id,
            purpose=task.purpose,
            status=task.status,
            on_behalf_of=task.on_behalf_of,
            ends_at=task.ends_at,
            permissions=task.scope,
        )

    async def _request(self, arguments: RequestCredential) -> RequestResult:
        task_id = self._task(arguments.task_id)
        scope = tuple(wanted.permission() for wanted in arguments.permissions)
        if len({permission.target for permission in scope}) > 1:
            raise ToolError("a request is for one target", code=Code.SEVERAL_TARGETS)

        async def ask(on_pending: Callable[[PendingRequest], None]) -> IssuedCredential:
            credential = await self._agent.request_scope(
                task=task_id,
                scope=scope,
                reason=arguments.reason,
                ttl_s=arguments.ttl_s,
                timeout_s=_GIVE_UP_S,
                on_pending=on_pending,
                delivery="gateway",
            )
            if not isinstance(credential, GatewayCredential):
                # Asked for as a handle: whatever else came is not passed on.
                credential.wipe()
                await self._release_quietly(credential)
                raise ToolError(
                    "the credential came to this server instead of the gateway", code=Code.NOT_A_HANDLE
                )
            self._held[credential.lease_id] = credential
            return credential

        request = self._requests.start(task_id, arguments.reason, ask)
        return self._state(request, await self._requests.wait(request, arguments.wait_s))

    async def _wait(self, arguments: WaitForRequest) -> RequestResult:
        request = self._requests.find(arguments.request)
        return self._state(request, await self._requests.wait(request, arguments.wait_s))

    async def _withdraw(self, arguments: WithdrawRequest) -> WithdrawnResult:
        withdrawn = await self._requests.withdraw(self._requests.find(arguments.request))
        return WithdrawnResult(request=arguments.request, status="withdrawn" if withdrawn else "ended")

    async def _list_leases(self, arguments: ListLeases) -> LeasesResult:
        task_id, now_s = self._task(arguments.task_id), time.time()
        found = {
            lease.lease_id: _lease(lease)
            for lease in self._held.values()
            if lease.task_id == task_id and lease.expires_at > now_s
        }
        leases_at_gateway = await self._leases_at_gateway(task_id)
        if leases_at_gateway is not None:
            # The gateway knows what was revoked, and what other programs of the task asked for.
            found = {
                lease.lease_id: LeaseResult(
                    lease_id=lease.lease_id,
                    handle=lease.lease_id,
                    target=lease.target,
                    permissions=lease.scope,
                    ends_at=lease.ends_at,
                )
                for lease in leases_at_gateway
            }
        waiting = tuple(
            OpenRequestResult(
                request=one.name,
                task_id=one.task_id,
                reason=one.reason,
                waiting_for=str(one.pending) if one.pending is not None else None,
            )
            for one in self._requests.waiting(task_id)
        )
        leases = tuple(sorted(found.values(), key=lambda lease: (lease.ends_at, lease.lease_id)))
        complete = leases_at_gateway is not None
        return LeasesResult(task_id=task_id, leases=leases, complete=complete, waiting=waiting)

    async def _release(self, arguments: ReleaseCredential) -> ReleasedResult:
        if self._task_id is not None:
            await self._check_is_of_task(arguments.lease_id, self._task_id)
        await self._agent.release(arguments.lease_id, reason=arguments.reason)
        self._held.pop(arguments.lease_id, None)
        return ReleasedResult(lease_id=arguments.lease_id, status="released")

    # --- helpers ---

    async def _check_is_of_task(self, lease_id: str, task_id: str) -> None:
        """Raises ToolError unless a lease was asked for here, or the gateway lists it for the task."""
        if lease_id in self._held or any(
            lease.lease_id == lease_id for lease in await self._leases_at_gateway(task_id) or ()
        ):
            return
        raise ToolError(
            f"this server is for task {task_id} alone, and knows no such lease of it: see list_leases",
            code=Code.TASK_OTHER,
        )

    async def _leases_at_gateway(self, task_id: str) -> tuple[HeldLease, ...] | None:
        """The leases of a task by the gateway's word; None where an agent has none to ask."""
        if self._agent.connection.settings.door is None:
            return None
        return (await self._agent.task(task_id)).leases

    def _task(self, named: str | None) -> str:
        if self._task_id is not None and named not in (None, self._task_id):
            raise ToolError(
                f"this server is for task {self._task_id} alone: leave task_id out", code=Code.TASK_OTHER
            )
        task_id = named or self._task_id
        if task_id is None:
            raise ToolError("no task is named: give task_id", code=Code.TASK_MISSING)
        return task_id

    def _state(self, request: OpenRequest, credential: IssuedCredential | None) -> RequestResult:
        if credential is not None:
            return RequestResult(
                request=request.name,
                status="allowed",
                request_id=credential.request_id,
                lease=_lease(credential),
                how_to_use=HOW_TO_USE,
            )
        pending = request.pending
        return RequestResult(
            request=request.name,
            status="waiting",
            request_id=pending.request_id if pending is not None else None,
            waiting_for=str(pending) if pending is not None else "waiting for policy's decision",
            expires_at=pending.expires_at if pending is not None else None,
        )

    async def _release_quietly(self, credential: IssuedCredential) -> None:
        try:
            await self._agent.release(credential, reason="the MCP server has ended")
        except RingfenceError as error:
            log.warning(
                "lease %s was not given back and ends at its deadline: %s", credential.lease_id, error
            )


def _error(error: BaseException) -> ToolAnswer:
    return ToolAnswer({"error": problem_of(error)}, is_error=True)


def _lease(credential: IssuedCredential) -> LeaseResult:
    return LeaseResult(
        lease_id=credential.lease_id,
        handle=credential.lease_id,
        target=credential.target,
        permissions=credential.scope,
        ends_at=credential.expires_at,
    )
