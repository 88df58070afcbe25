"""What the tools do, by the SDK, as one agent. No result and no error has a credential in it."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from pydantic import BaseModel, ValidationError

from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import GatewayCredential, IssuedCredential
from ringfence.client.agent.replies import PendingRequest
from ringfence.client.task_view import HeldLease
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.validation_problems import explain
from ringfence.mcp_server.open_requests import OpenRequest, OpenRequests
from ringfence.mcp_server.problems import ToolError, problem_of
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
    WaitForRequest,
    WithdrawnResult,
    WithdrawRequest,
)

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
                raise ToolError(f"there is no tool {name[:64]!r}; see tools/list", code="tool_unknown")
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
            return _error(ToolError("the call was given up", code="cancelled"))
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
            raise ToolError("a request is for one target", code="several_targets")

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
                    "the credential came to this server instead of the gateway", code="not_a_handle"
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
            code="task_other",
        )

    async def _leases_at_gateway(self, task_id: str) -> tuple[HeldLease, ...] | None:
        """The leases of a task by the gateway's word; None where an agent has none to ask."""
        if self._agent.connection.settings.door is None:
            return None
        return (await self._agent.task(task_id)).leases

    def _task(self, named: str | None) -> str:
        if self._task_id is not None and named not in (None, self._task_id):
            raise ToolError(
                f"this server is for task {self._task_id} alone: leave task_id out", code="task_other"
            )
        task_id = named or self._task_id
        if task_id is None:
            raise ToolError("no task is named: give task_id", code="task_missing")
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
