"""MCP at the gateway: each request must carry exactly one message, in a session of its own sender.

A session is bound to the lease that opened it: requests in it use that lease and no other, and the session ends with
the lease. So all its requests carry the same credential, and no request of another sender gets into the session.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ringfence.gateway.contract import Attempt, McpExchange, McpHeaders, McpOutcome, RpcErrorReply
from ringfence.gateway.decision.targets import CompiledTarget
from ringfence.gateway.domain import (
    BAD_REQUEST,
    CONTENT_TOO_LARGE,
    NOT_FOUND,
    Refusal,
    Sender,
    lease_elsewhere,
    refuse,
)
from ringfence.gateway.state.leases import LeaseTable
from ringfence.messages.lease import Lease
from ringfence.messages.permission import Permission
from ringfence.model.mcp.messages import McpMessage, McpMessageError, read_message
from ringfence.model.http_targets.request_map import MAX_BODY_BYTES, Action
from ringfence.model.scope.scope import intersect

_JSON: Final = re.compile(r'application/json(?:[ \t]*;[ \t]*charset="?utf-8"?)?', re.IGNORECASE)
_SESSION: Final = re.compile(r"[!-~]{1,256}")
_MAX_SESSIONS: Final = 256
"""Per lease. A new session evicts the oldest."""
_INITIALIZE: Final = "initialize"


@dataclass(frozen=True, slots=True)
class McpRequest:
    """A parsed request to an MCP endpoint, with the lease that it is bound to."""

    sender: Sender
    message: McpMessage | None
    """None if nothing is posted: the request opens a stream, or ends a session."""

    def action(self, target: CompiledTarget, attempt: Attempt) -> Action | None:
        """The action of the request at the target; None if no rule of the map covers it."""
        if self.message is None:
            return target.map.action(attempt.method, attempt.target, attempt.body)
        return target.map.mcp_action(attempt.target, self.message)


class SessionTable:
    """Maps the sessions at each target to the leases that opened them."""

    def __init__(self) -> None:
        self._lease: dict[tuple[str, str], str] = {}
        self._of: dict[str, dict[tuple[str, str], None]] = {}

    def open(self, target_id: str, session: str, lease_id: str) -> bool:
        """Bind a session to a lease. False if it is bound to another one, or if it is no valid session id."""
        if _SESSION.fullmatch(session) is None:
            return False
        key = (target_id, session)
        if self._lease.setdefault(key, lease_id) != lease_id:
            return False
        sessions = self._of.setdefault(lease_id, {})
        sessions[key] = None
        if len(sessions) > _MAX_SESSIONS:
            oldest = next(iter(sessions))
            del sessions[oldest], self._lease[oldest]
        return True

    def lease_of(self, target_id: str, session: str) -> str | None:
        """The live lease that a session is bound to."""
        return self._lease.get((target_id, session))

    def end(self, lease_id: str) -> None:
        """Forget all sessions of a lease that ended."""
        for key in self._of.pop(lease_id, {}):
            del self._lease[key]


class McpSessions:
    """Parses requests to MCP endpoints, and binds their sessions to leases."""

    def __init__(self, table: LeaseTable) -> None:
        self._table = table
        self._sessions = SessionTable()
        table.on_lease_end(self._sessions.end)

    def read(self, attempt: Attempt, target: CompiledTarget, sender: Sender) -> McpRequest | Refusal:
        """Parse a request. Refuses it if it is ambiguous, or if the session belongs to another sender."""
        carried, id = attempt.mcp_headers, target.state.target_id
        if carried is None:
            message = (
                f"{id} speaks MCP there: go through the gateway's own data plane, which sees the answers too"
            )
            return refuse("mcp_needs_plane", message)
        try:
            posted = _message(attempt, carried) if attempt.method == "POST" else None
        except McpMessageError as error:
            status = CONTENT_TOO_LARGE if error.code == "body_unseen" else BAD_REQUEST
            return refuse(error.code, error.message, status=status)
        if carried.session_id is None:
            if carried.resumes_stream:
                return refuse(
                    "mcp_resume_unbound", "a stream is resumed in a session: name it in Mcp-Session-Id"
                )
            return McpRequest(sender, posted)
        bound = self._bind(sender, id, carried.session_id)
        return bound if isinstance(bound, Refusal) else McpRequest(bound, posted)

    def _bind(self, sender: Sender, target_id: str, session: str) -> Sender | Refusal:
        """The sender, restricted to the lease of its session."""
        lease_id = self._sessions.lease_of(target_id, session)
        lease = self._table.get(lease_id) if lease_id is not None else None
        if lease is None or self._table.problem(lease) is not None:
            message = "there is no such session here, or its lease has ended: initialize a new one"
            return refuse("mcp_session_unknown", message, status=NOT_FOUND)
        if lease.agent_id != sender.agent_id:
            return refuse("mcp_session_other_agent", f"the session is one of agent {lease.agent_id}")
        if sender.task_id not in (None, lease.task_id):
            return refuse("mcp_session_other_task", "the session is one of another task")
        if sender.lease_id not in (None, lease.lease_id):
            message = (
                "the session was opened by another lease: show that one's handle, or initialize a new session"
            )
            return refuse("mcp_session_other_lease", message, side="lease")
        return dataclasses.replace(sender, lease_id=lease.lease_id, task_id=lease.task_id)

    def exchange(
        self,
        mcp_request: McpRequest,
        attempt: Attempt,
        target: CompiledTarget,
        lease: Lease,
        record_outcome: Callable[[McpOutcome], None],
    ) -> McpExchange:
        """The exchange that `lease` allowed, for the data plane. `record_outcome` is called once, with its outcome."""
        target_id, message = target.state.target_id, mcp_request.message

        def visible(method: str, name: str) -> bool:
            named = [lease] if mcp_request.sender.lease_id is not None else None
            leases = named or self._table.usable(lease.agent_id, lease.task_id, target_id)
            return any(
                intersect((_permission(target_id, offer),), usable_lease.scope)
                for offer in target.map.mcp_offers(attempt.target, method, name)
                for usable_lease in leases
                if lease_elsewhere(mcp_request.sender, usable_lease) is None
            )

        def opened(session: str) -> bool:
            alive = self._table.problem(lease) is None
            return alive and self._sessions.open(target_id, session, lease.lease_id)

        return McpExchange(
            method=message.method if message is not None else None,
            id=message.id if message is not None and message.kind == "request" else None,
            opens_session=message is not None and message.method == _INITIALIZE,
            is_visible=visible,
            bind_session=opened,
            record_outcome=record_outcome,
        )


def rpc_error_reply(attempt: Attempt) -> RpcErrorReply:
    """The JSON-RPC error reply to a refused message: it names the id of the request, if that can be read."""
    try:
        message = read_message(attempt.body) if attempt.body is not None else None
    except McpMessageError as error:
        return RpcErrorReply(error.id)
    return RpcErrorReply(message.id if message is not None and message.kind == "request" else None)


def _message(attempt: Attempt, mcp_headers: McpHeaders) -> McpMessage:
    """Raises McpMessageError."""
    if mcp_headers.content_encoding not in (None, "", "identity"):
        raise McpMessageError("mcp_compressed", "a message is sent as it is: leave out Content-Encoding")
    if mcp_headers.content_type is None or _JSON.fullmatch(mcp_headers.content_type) is None:
        raise McpMessageError("mcp_media_type", "a message is application/json, in UTF-8")
    if attempt.body is None or len(attempt.body) > MAX_BODY_BYTES:
        raise McpMessageError(
            "body_unseen", "what this request does stands in its body, which was not seen whole"
        )
    message = read_message(attempt.body)
    expected = {"mcp-method": message.method, "mcp-name": message.name}
    for name, value in mcp_headers.mcp_fields:
        if expected.get(name) != value:
            text = f"the header {name} is not known here, or says another thing than the message does"
            raise McpMessageError("mcp_header", text, id=message.id)
    return message


def _permission(target_id: str, offer: Action) -> Permission:
    return Permission(target=target_id, verbs=(offer.verb,), resources=(offer.resource,))
