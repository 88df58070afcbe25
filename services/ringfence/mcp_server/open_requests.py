"""Credential requests that go on while no tool call waits for them: a person may take longer than a call may.

A request ends with its answer, by `withdraw`, or with the server. The SDK withdraws what nobody waits for any more.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.agent.replies import PendingRequest
from ringfence.mcp_server.problems import ToolError

MAX_OPEN: Final = 16
"""Requests that wait at a time. A model that asks in a loop must not fill the list of whoever approves."""
MAX_ENDED: Final = 64
"""Answers that are kept for calls that come later."""

Ask = Callable[[Callable[[PendingRequest], None]], Awaitable[IssuedCredential]]
"""Sends one request and returns its credential. It calls what it is given when a person has to approve."""


@dataclass(slots=True)
class OpenRequest:
    """One request and what is known of it."""

    name: str
    """What tool calls name it by."""
    task_id: str
    reason: str
    answer: asyncio.Task[IssuedCredential] = field(repr=False)
    pending: PendingRequest | None = None
    """Set while a person is asked."""


class OpenRequests:
    """The requests of one server."""

    def __init__(self) -> None:
        self._requests: dict[str, OpenRequest] = {}
        self._number = 0

    def waiting(self, task_id: str) -> list[OpenRequest]:
        """The requests of a task that have no answer yet."""
        return [one for one in self._requests.values() if one.task_id == task_id and not one.answer.done()]

    def start(self, task_id: str, reason: str, ask: Ask) -> OpenRequest:
        """Send a request. Raises ToolError if too many wait already."""
        ended = [one for one in self._requests.values() if one.answer.done()]
        for one in ended[:-MAX_ENDED]:
            del self._requests[one.name]
        if len(self._requests) - len(ended) >= MAX_OPEN:
            raise ToolError(f"{MAX_OPEN} requests wait for an answer already", code="requests_limit")
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
                code="request_unknown",
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
            raise ToolError(f"request {request.name} was withdrawn", code="request_unknown")
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
