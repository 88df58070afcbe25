"""Parses requests to MCP endpoints: one message each, of a known revision, bound to the lease of its own sender.

Sessions (up to 2025-11-25), tasks of a server, and states of retried requests (2026-07-28) belong to the lease that
opened them (`BindingTable`). Requests with one use that lease and no other, and they end with it. So all carry the
same credential, and no other sender gets in.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Literal

from ringfence.gateway.contract import Attempt, McpExchange, McpHeaders, McpOutcome, RpcErrorReply
from ringfence.gateway.decision.targets import CompiledTarget
from ringfence.gateway.domain import (
    BAD_REQUEST,
    Refusal,
    Sender,
    check_run_of_lease,
    refuse,
)
from ringfence.gateway.state.leases import LeaseTable
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.messages.codes import Code, status_of
from ringfence.messages.lease import Lease
from ringfence.model.http_targets import MAX_BODY_BYTES, Action
from ringfence.model.mcp import canonical
from ringfence.model.mcp.headers import (
    INPUT_REQUIRED,
    STATELESS,
    Declared,
    check_headers,
    is_stateless,
    revision_of,
)
from ringfence.model.mcp.messages import (
    TASK_METHODS,
    McpMessage,
    McpMessageError,
    read_message,
)
from ringfence.model.mcp.request_state import RequestState, RequestStateError, RequestStates, Round
from ringfence.model.mcp.results import Grants
from ringfence.model.scope.scope import intersect
from ringfence.model.verdict import Allowed, Refused

_ID: Final = re.compile(r"[!-~]{1,256}")
_MAX_BOUND: Final = 256
"""Per lease. A new id evicts the oldest."""


class BindingTable:
    """Maps ids that servers give out, at each target, to the leases that they belong to."""

    def __init__(self) -> None:
        self._lease: dict[tuple[str, str], str] = {}
        self._of: dict[str, dict[tuple[str, str], None]] = {}

    def open(self, target_id: str, id: str, lease_id: str) -> bool:
        """Bind an id to a lease. False if it is bound to another one, or if it is no valid id."""
        if _ID.fullmatch(id) is None:
            return False
        key = (target_id, id)
        if self._lease.setdefault(key, lease_id) != lease_id:
            return False
        bound = self._of.setdefault(lease_id, {})
        bound[key] = None
        if len(bound) > _MAX_BOUND:
            oldest = next(iter(bound))
            del bound[oldest], self._lease[oldest]
        return True

    def lease_of(self, target_id: str, id: str) -> str | None:
        return self._lease.get((target_id, id))

    def end(self, lease_id: str) -> None:
        for key in self._of.pop(lease_id, {}):
            del self._lease[key]


_JSON: Final = re.compile(r'application/json(?:[ \t]*;[ \t]*charset="?utf-8"?)?', re.IGNORECASE)
_INITIALIZE: Final = "initialize"
_MAX_DECLARED: Final = 10_000
"""The most tools whose header declarations are kept, of all agents and targets."""


_Bound = Literal["session", "task", "state"]
"""What belongs to the lease that opened it."""
_ANEW: Final[Mapping[_Bound, str]] = {
    "session": "initialize a new one", "task": "make the call again", "state": "send the request without it",
}  # fmt: skip


_UNKNOWN: Final[Mapping[_Bound, Code]] = {
    "session": Code.MCP_SESSION_UNKNOWN, "task": Code.MCP_TASK_UNKNOWN, "state": Code.MCP_STATE_UNKNOWN,
}  # fmt: skip
_OTHER_AGENT: Final[Mapping[_Bound, Code]] = {
    "session": Code.MCP_SESSION_OTHER_AGENT, "task": Code.MCP_TASK_OTHER_AGENT, "state": Code.MCP_STATE_OTHER_AGENT,
}  # fmt: skip
_OTHER_TASK: Final[Mapping[_Bound, Code]] = {
    "session": Code.MCP_SESSION_OTHER_TASK, "task": Code.MCP_TASK_OTHER_TASK, "state": Code.MCP_STATE_OTHER_TASK,
}  # fmt: skip
_OTHER_LEASE: Final[Mapping[_Bound, Code]] = {
    "session": Code.MCP_SESSION_OTHER_LEASE, "task": Code.MCP_TASK_OTHER_LEASE, "state": Code.MCP_STATE_OTHER_LEASE,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class McpRequest:
    """A parsed request to an MCP endpoint, with the lease that it is bound to."""

    sender: Sender
    message: McpMessage | None
    """None if nothing is posted: the request opens a stream, or ends a session."""
    revision: str | None = None
    """As the message states it; None if it states none."""
    state: RequestState | None = None
    """The opened state of a retry."""

    def actions(self, target: CompiledTarget, attempt: Attempt) -> tuple[Action, ...] | None:
        """The actions of the request at the target, which all have to be allowed; None if no rule covers one."""
        if self.message is None:
            action = target.map.action(attempt.method, attempt.target, attempt.body)
            return (action,) if action is not None else None
        return target.map.mcp_actions(attempt.target, self.message)

    @property
    def learns_of_approval(self) -> bool:
        """Whether the client is told that a person is asked, and retries; others wait with their request open."""
        message = self.message
        return message is not None and self.revision == STATELESS and message.method in INPUT_REQUIRED

    @property
    def waits_for_approval(self) -> bool:
        """Whether it is a retry after the client was told that a person is asked."""
        return self.state is not None and self.state.round == "approval"

    def canonical(self) -> bytes | None:
        """The canonical form of the message, which a person approves. None if it is ambiguous."""
        try:
            return canonical.canonical_form(self.message) if self.message is not None else None
        except McpMessageError:
            return None

    def forwarded_body(self, *, approved: bool) -> bytes | None:
        """The body to forward, if that is not the one that was sent. `approved`: whether a person approved it."""
        if self.message is None or (self.state is None and not approved):
            return None
        own = self.state.state if self.state is not None else None
        return canonical.rebuilt(self.message, own) if approved else canonical.with_state(self.message, own)


class McpRequests:
    """Parses requests to MCP endpoints, and binds sessions, tasks and states to leases."""

    def __init__(self, table: LeaseTable, clock: Clock, key: Callable[[], SigningKey]) -> None:
        """`key`: the current key of this gateway, from which the one that seals states is derived."""
        self._table = table
        self._clock = clock
        self._states = RequestStates(key)
        self._sessions = BindingTable()
        self._tasks = BindingTable()
        self._declared: BoundedDict[tuple[str, str, str, str], Declared] = BoundedDict(_MAX_DECLARED)
        table.on_lease_end(self._sessions.end)
        table.on_lease_end(self._tasks.end)

    # --- requests ---

    def read(self, attempt: Attempt, target: CompiledTarget, sender: Sender) -> McpRequest | Refusal:
        """Parse a request. Refuses it if it is ambiguous, or if its session, task or state is another sender's.

        1. The data plane can filter the answers (`mcp_needs_plane`).
        2. A posted message can be read (`_message`).
        3. The headers state at most one revision, which is that of the message.
        4. The headers of the message agree with it; without a message there are none.
        5. A revision without sessions names no session, and resumes no stream.
        6. A stream is resumed in a session (`mcp_resume_unbound`).
        7. Session and tasks belong to a lease of the sender (`_bind`).
        8. In a revision with request states: the state is of this call, and of a lease of the sender (`_with_state`).
        """
        carried, id = attempt.mcp_headers, target.state.target_id
        if carried is None:
            message = (
                f"{id} speaks MCP there: go through the gateway's own data plane, which sees the answers too"
            )
            return refuse(Code.MCP_NEEDS_PLANE, message)
        try:
            posted = _message(attempt, carried) if attempt.method == "POST" else None
            stated = _stated_revision(carried, posted)
            revision = revision_of(posted, stated) if posted is not None else stated
            if posted is not None:
                check_headers(
                    posted, revision, carried.mcp_fields,
                    lambda tool: self._declared.get((sender.agent_id, id, _path(attempt), tool)),
                )  # fmt: skip
            elif carried.mcp_fields:
                raise McpMessageError(
                    Code.MCP_HEADER, "headers of messages come with a message that is posted"
                )
            if revision == STATELESS and (carried.session_id is not None or carried.resumes_stream):
                raise McpMessageError(
                    Code.MCP_HEADER, f"revision {STATELESS} has no sessions, and resumes no streams"
                )
        except McpMessageError as error:
            return refuse(error.code, error.message, status=status_of(error.code, BAD_REQUEST))
        if carried.session_id is None and carried.resumes_stream:
            return refuse(
                Code.MCP_RESUME_UNBOUND, "a stream is resumed in a session: name it in Mcp-Session-Id"
            )
        bound = self._bind(sender, id, carried.session_id, posted)
        if isinstance(bound, Refusal) or posted is None or revision != STATELESS:
            return bound if isinstance(bound, Refusal) else McpRequest(bound, posted, revision)
        return self._with_state(McpRequest(bound, posted, revision), posted, id)

    def _bind(
        self, sender: Sender, target_id: str, session: str | None, posted: McpMessage | None
    ) -> Sender | Refusal:
        """The sender, restricted to the lease of its session, and of the tasks that the message names."""
        if session is not None:
            bound = self._restricted(sender, self._sessions.lease_of(target_id, session), "session")
            if isinstance(bound, Refusal):
                return bound
            sender = bound
        for part in posted.parts() if posted is not None else ():
            if part.method in TASK_METHODS:
                bound = self._restricted(sender, self._tasks.lease_of(target_id, part.name or ""), "task")
                if isinstance(bound, Refusal):
                    return bound
                sender = bound
        return sender

    def _restricted(self, sender: Sender, lease_id: str | None, what: _Bound) -> Sender | Refusal:
        """The sender, restricted to the lease that a session, a task of the server or a state belongs to.

        1. There is such a lease, and it is live.
        2. It is of the sender's agent.
        3. It is of the sender's task, if that is known.
        4. It is the lease that the sender showed, if it showed one.
        """
        lease = self._table.get(lease_id) if lease_id is not None else None
        if lease is None or isinstance(self._table.check_live(lease), Refused):
            message = f"there is no such {what} here, or its lease has ended: {_ANEW[what]}"
            return refuse(_UNKNOWN[what], message)
        if lease.agent_id != sender.agent_id:
            return refuse(_OTHER_AGENT[what], f"the {what} is one of agent {lease.agent_id}")
        if sender.task_id not in (None, lease.task_id):
            return refuse(_OTHER_TASK[what], f"the {what} is one of another task")
        if sender.lease_id not in (None, lease.lease_id):
            message = f"the {what} was opened by another lease: show that one's handle, or {_ANEW[what]}"
            return refuse(_OTHER_LEASE[what], message, side="lease")
        return dataclasses.replace(sender, lease_id=lease.lease_id, task_id=lease.task_id)

    # --- states of retried requests ---

    def _with_state(self, request: McpRequest, message: McpMessage, target_id: str) -> McpRequest | Refusal:
        """The request with its opened state, restricted to the lease that the state was sealed to.

        1. Responses to the server's questions come with a state (`mcp_state_missing`).
        2. The state was sealed by this gateway, and the call can be digested.
        3. The state has not expired, and its lease may be used by the sender (`_restricted`).
        4. The state is of this target and call (`mcp_state_other_call`).
        """
        if message.request_state is None:
            if message.input_responses and message.method in INPUT_REQUIRED:
                text = "inputResponses come with the requestState of the answer that asked for them"
                return refuse(Code.MCP_STATE_MISSING, text)
            return request
        try:
            state = self._states.open(message.request_state)
            call = canonical.digest(message) if state.round == "approval" else canonical.call_digest(message)
        except (RequestStateError, McpMessageError) as error:
            return refuse(error.code, error.message, status=BAD_REQUEST)
        ended = state.expires_at_ms <= self._clock.now_ms()
        bound = self._restricted(request.sender, None if ended else state.lease_id, "state")
        if isinstance(bound, Refusal):
            return bound
        if (state.target_id, state.call) != (target_id, call):
            text = "this requestState is of another call: retry with the same method, name and arguments"
            return refuse(Code.MCP_STATE_OTHER_CALL, text)
        return dataclasses.replace(request, sender=bound, state=state)

    def approval_state(self, request: McpRequest, lease: Lease) -> str:
        """The sealed state by which a client retries a request that a person is asked about. Raises McpMessageError."""
        assert request.message is not None, "only messages are retried"
        own = request.state.state if request.state is not None else None
        return self._sealed("approval", lease, canonical.digest(request.message), own)

    def _sealed(self, round: Round, lease: Lease, call: str, own: str | None) -> str:
        state = RequestState(
            round=round,
            agent_id=lease.agent_id, task_id=lease.task_id, lease_id=lease.lease_id, target_id=lease.target_id,
            call=call, expires_at_ms=lease.deadline * 1000, state=own,
        )  # fmt: skip
        return self._states.seal(state)

    # --- answers ---

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

        def opened(session: str) -> bool:
            alive = isinstance(self._table.check_live(lease), Allowed)
            return alive and self._sessions.open(target_id, session, lease.lease_id)

        return McpExchange(
            method=message.method if message is not None else None,
            id=message.id if message is not None and message.kind == "request" else None,
            opens_session=message is not None and message.method == _INITIALIZE,
            grants=self._grants(mcp_request, attempt, target, lease),
            bind_session=opened,
            record_outcome=record_outcome,
            revision=mcp_request.revision,
        )

    def _grants(
        self, mcp_request: McpRequest, attempt: Attempt, target: CompiledTarget, lease: Lease
    ) -> Grants:
        target_id, message = target.state.target_id, mcp_request.message

        def leases() -> list[Lease]:
            if mcp_request.sender.lease_id is not None:
                return [lease]
            usable = self._table.usable(lease.agent_id, lease.task_id, target_id)
            return [one for one in usable if isinstance(check_run_of_lease(mcp_request.sender, one), Allowed)]

        def allowed(offers: tuple[Action, ...]) -> bool:
            return any(
                intersect((_permission(target_id, offer),), usable.scope)
                for offer in offers
                for usable in leases()
            )

        def fresh_ms() -> int:
            ends_ms = min((one.deadline * 1000 for one in leases()), default=0)
            return max(0, min(ends_ms, lease.deadline * 1000) - self._clock.now_ms())

        def learn(tool: str, declared: Declared) -> None:
            self._declared[lease.agent_id, target_id, _path(attempt), tool] = declared

        def seal(own: str | None) -> str:
            assert message is not None, "only messages are retried"
            return self._sealed("server", lease, canonical.call_digest(message), own)

        return Grants(
            is_visible=lambda method, name: allowed(target.map.mcp_offers(attempt.target, method, name)),
            is_offered=lambda method: allowed(target.map.mcp_offers_of(attempt.target, method)),
            fresh_ms=fresh_ms,
            seal_state=seal,
            bind_task=lambda task: (
                isinstance(self._table.check_live(lease), Allowed)
                and self._tasks.open(target_id, task, lease.lease_id)
            ),
            owns_task=lambda task: self._tasks.lease_of(target_id, task) == lease.lease_id,
            learn_headers=learn,
        )


def rpc_error_reply(attempt: Attempt) -> RpcErrorReply:
    """The JSON-RPC error reply to a refused message: it names the id of the request, if that can be read."""
    try:
        message = read_message(attempt.body) if attempt.body is not None else None
    except McpMessageError as error:
        return RpcErrorReply(error.id, stateless=_states_revision(attempt.mcp_headers))
    id = message.id if message is not None and message.kind == "request" else None
    stateless = _states_revision(attempt.mcp_headers) or (message is not None and is_stateless(message))
    requested = message.meta.get("io.modelcontextprotocol/protocolVersion") if message is not None else None
    return RpcErrorReply(id, stateless=stateless, requested=requested if isinstance(requested, str) else None)


def _states_revision(carried: McpHeaders | None) -> bool:
    """Whether the headers state a revision without sessions."""
    return carried is not None and STATELESS in carried.versions


def _stated_revision(carried: McpHeaders, message: McpMessage | None) -> str | None:
    """Raises McpMessageError."""
    if len(carried.versions) > 1:
        id = message.id if message is not None else None
        raise McpMessageError(Code.MCP_HEADER, "the header MCP-Protocol-Version comes twice", id=id)
    return carried.versions[0] if carried.versions else None


def _message(attempt: Attempt, mcp_headers: McpHeaders) -> McpMessage:
    """The posted message. Raises McpMessageError.

    1. It is not compressed (`mcp_compressed`).
    2. It is JSON in UTF-8 (`mcp_media_type`).
    3. It was seen whole (`body_unseen`).
    4. It is one message of JSON-RPC (`read_message`).
    """
    if mcp_headers.content_encoding not in (None, "", "identity"):
        raise McpMessageError(Code.MCP_COMPRESSED, "a message is sent as it is: leave out Content-Encoding")
    if mcp_headers.content_type is None or _JSON.fullmatch(mcp_headers.content_type) is None:
        raise McpMessageError(Code.MCP_MEDIA_TYPE, "a message is application/json, in UTF-8")
    if attempt.body is None or len(attempt.body) > MAX_BODY_BYTES:
        raise McpMessageError(
            Code.BODY_UNSEEN, "what this request does stands in its body, which was not seen whole"
        )
    return read_message(attempt.body)


def _path(attempt: Attempt) -> str:
    return attempt.target.partition("?")[0]


def _permission(target_id: str, offer: Action) -> Permission:
    return Permission(target=target_id, verbs=(offer.verb,), resources=(offer.resource,))
