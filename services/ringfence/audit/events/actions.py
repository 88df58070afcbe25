"""API Activity events (OCSF class 6003) of actions through gateways: one for each request that a gateway decided.

The messages are unsigned, so anybody who can write to the topic can forge them. No decision depends on them, and the
events say so: `verified.by` is None.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ringfence.audit.events import kinds
from ringfence.audit.events.ocsf import (
    UNKNOWN_USER,
    Copied,
    EventContext,
    EventKind,
    OcsfEvent,
    event,
    scrubbed,
    user_of,
)
from ringfence.audit.memory import LeaseFacts
from ringfence.kernel.base.text import with_article
from ringfence.messages.codes import Code
from ringfence.messages.operations import ActionAnswered, ActionDecided, Destination, RelayEnded

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received

_Action = ActionDecided | ActionAnswered | RelayEnded

_STOLEN: Final = frozenset({
    Code.HANDLE_OTHER_AGENT, Code.PROOF_BY_STRANGER, Code.MCP_SESSION_OTHER_AGENT, Code.MCP_TASK_OTHER_AGENT,
    Code.MCP_STATE_OTHER_AGENT,
})  # fmt: skip
"""Reason codes of a stolen handle or session: another agent than its owner presented it. They raise an alert."""
_ACTIVITIES: Final[Mapping[str, str]] = {
    "GET": "Read", "HEAD": "Read", "OPTIONS": "Read", "TRACE": "Read",
    "POST": "Create", "PUT": "Update", "PATCH": "Update", "DELETE": "Delete",
}  # fmt: skip
_HTTP_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "POST", "PUT", "DELETE", "CONNECT"})
"""The methods that OCSF knows. PATCH is not among them."""
_HOSTNAME: Final = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
"""OCSF type `hostname_t`."""


_ANSWER_TEXTS: Final[Mapping[str, str]] = {
    "result": "got a result", "accepted": "was heard", "tool_error": "got an error of the tool",
    "rpc_error": "got a JSON-RPC error", "transport_error": "was refused by the target", "none": "got no whole answer",
}  # fmt: skip


_SHARED = Copied(ActionDecided, "agent task run lease target action")
_DECISION = Copied(ActionDecided, "request_digest latency_us label")
_ANSWER = Copied(ActionAnswered, "answer http_status rpc_code")
_RELAY = Copied(RelayEnded, "sent_bytes received_bytes duration_ms")


def acted(
    record: Received,
    claims: ActionDecided,
    lease: LeaseFacts | None,
    subject_fields: Mapping[str, Any],
    trust_domain: str,
) -> OcsfEvent:
    """The event of a decided request of an agent: allowed, denied, or only observed.

    Args:
        record: the record on the topic `action`.
        claims: its unsigned contents.
        lease: the lease of the request, or of the handle that was shown, if audit has seen it.
        subject_fields: fields of that lease if it is the agent's own; otherwise of its task, or of the agent alone.
        trust_domain: the trust domain of the agents.
    """
    another = lease is not None and lease.agent != claims.agent_id
    fields: dict[str, Any] = {
        **_action_fields(claims, subject_fields),
        "lease_agent": lease.agent if lease is not None and another else None,
        "access": claims.access,
        "method": claims.method,
        "destination": _destination(claims.destination),
        **_DECISION(claims),
        **_approval_fields(claims),
        "outcome": "allowed" if claims.allowed else "observed" if claims.observed else "denied",
    }
    attributes = _attributes(claims, claims.verb or claims.method, trust_domain)
    attributes |= _network_attributes(claims)
    if claims.count is not None:
        attributes["count"] = claims.count
    context = _context(record, claims, lease, fields)
    return event(record, _kind(claims), _message(claims), attributes, fields, context, reasons=claims.reasons)


def answered(
    record: Received,
    claims: ActionAnswered,
    lease: LeaseFacts | None,
    subject_fields: Mapping[str, Any],
    trust_domain: str,
) -> OcsfEvent:
    """The event of the answer to an allowed request to an MCP endpoint or a model. Arguments as for `acted`."""
    usage = claims.usage
    fields = {
        **_action_fields(claims, subject_fields),
        **_ANSWER(claims),
        "usage": usage.model_dump(exclude_none=True) if usage is not None else None,
    }
    request = f"{claims.verb} on {claims.resource} at {claims.target_id}"
    message = f"{claims.agent_id or 'somebody'} {_ANSWER_TEXTS[claims.answer]} for {request}"
    kind = kinds.ACTION_ANSWERED if claims.answer in ("result", "accepted") else kinds.ACTION_FAILED
    if usage is not None:
        message += f", {usage.tokens} tokens are counted"
        if usage.counted == "estimate" and usage.input_tokens is not None:
            kind = kinds.USAGE_UNDERSTATED
            message += f", though it says {usage.input_tokens + (usage.output_tokens or 0)}"
    attributes = _attributes(claims, claims.verb, trust_domain)
    return event(record, kind, message, attributes, fields, _context(record, claims, lease, fields))


def relay_ended(
    record: Received,
    claims: RelayEnded,
    lease: LeaseFacts | None,
    subject_fields: Mapping[str, Any],
    trust_domain: str,
) -> OcsfEvent:
    """The event of the end of a run's byte relay. Arguments as for `acted`."""
    fields: dict[str, Any] = {
        **_shared_fields(claims, subject_fields),
        "destination": _destination(claims.destination),
        **_RELAY(claims),
    }
    attributes = _attributes(claims, "CONNECT", trust_domain) | _endpoint(claims.destination)
    why = f", ended by the gateway: {scrubbed(claims.reason.message)}" if claims.reason is not None else ""
    message = (
        f"a relay of {claims.agent_id} to {claims.target_id} passed {claims.sent_bytes} bytes there and "
        f"{claims.received_bytes} back{why}"
    )
    reasons = (claims.reason,) if claims.reason is not None else ()
    context = _context(record, claims, lease, fields)
    return event(record, kinds.RELAY_ENDED, message, attributes, fields, context, reasons=reasons)


def _context(
    record: Received, claims: _Action, lease: LeaseFacts | None, fields: Mapping[str, Any]
) -> EventContext:
    own = lease if lease is not None and lease.agent == claims.agent_id else None
    return EventContext(
        claims.agent_id or record.topic.what,
        fields.get("request") or claims.task_id,
        claims.traceparent or (own.traceparent if own is not None else None),
    )


def _attributes(claims: _Action, operation: str | None, trust_domain: str) -> dict[str, Any]:
    """OCSF `actor`, `api`, `src_endpoint` and `resources`."""
    agent, resource = claims.agent_id, getattr(claims, "resource", None)
    service = {"service": {"name": claims.target_id}} if claims.target_id is not None else {}
    return {
        "actor": {"user": user_of(f"spiffe://{trust_domain}/agent/{agent}") if agent is not None else UNKNOWN_USER},
        "api": {"operation": operation or "unknown", "request": {"uid": claims.action_id}, **service},
        "src_endpoint": {"name": agent or "unknown"},
        **({"resources": [{"name": resource}]} if resource is not None else {}),
    }  # fmt: skip


def _action_fields(
    claims: ActionDecided | ActionAnswered, subject_fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of an action that was decided or answered, over the subject fields."""
    act = list(claims.act) if claims.act else [claims.agent_id] if claims.agent_id else None
    shared = _shared_fields(claims, subject_fields)
    return {**shared, "act": act, "verb": claims.verb, "resource": claims.resource}


def _shared_fields(claims: _Action, subject_fields: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that all kinds share, over the subject fields.

    The digest of the credential's request is left out: here `request_digest` is the digest of the agent's request.
    """
    subject_fields = {name: value for name, value in subject_fields.items() if name != "request_digest"}
    return {**subject_fields, **_SHARED(claims), "decided_by": claims.gateway}


def _network_attributes(claims: ActionDecided) -> dict[str, Any]:
    """OCSF `http_request` and `dst_endpoint`, with only the values that their types allow."""
    destination = claims.destination
    request: dict[str, Any] = {}
    attributes: dict[str, Any] = {}
    if claims.method in _HTTP_METHODS:
        request["http_method"] = claims.method
    if destination is not None:
        host, ip = _host_and_ip(destination)
        path = scrubbed(destination.path) if destination.path else None
        url = {"scheme": destination.scheme, "hostname": host or ip, "port": destination.port, "path": path}
        if path is not None:  # OCSF has no URL without one
            request["url"] = {name: value for name, value in url.items() if value is not None}
        attributes = _endpoint(destination)
    return {**attributes, **({"http_request": request} if request else {})}


def _endpoint(destination: Destination) -> dict[str, Any]:
    """OCSF `dst_endpoint`, where the destination is a host or an address."""
    host, ip = _host_and_ip(destination)
    if host is None and ip is None:
        return {}
    end = {"hostname": host if ip is None else None, "ip": ip, "port": destination.port}
    return {"dst_endpoint": {name: value for name, value in end.items() if value is not None}}


def _host_and_ip(destination: Destination) -> tuple[str | None, str | None]:
    named = destination.host is not None and _HOSTNAME.fullmatch(destination.host)
    return destination.host if named else None, _ip_address(destination.host)


def _destination(destination: Destination | None) -> dict[str, Any] | None:
    if destination is None:
        return None
    origin = {"scheme": destination.scheme, "host": destination.host, "port": destination.port}
    path = scrubbed(destination.path) if destination.path is not None else None
    return {name: value for name, value in {**origin, "path": path}.items() if value is not None}


def _ip_address(host: str | None) -> str | None:
    try:
        return str(ipaddress.ip_address(host or ""))
    except ValueError:
        return None


def _approval_fields(claims: ActionDecided) -> dict[str, Any]:
    answered_request = claims.asked
    if answered_request is None:
        return {}
    return {
        "question": answered_request.request_id,
        "approvers": [answered_request.by] if answered_request.by is not None and claims.allowed else None,
        "answered_by": answered_request.by,
        "waited_ms": answered_request.waited_ms,
    }


def _kind(claims: ActionDecided) -> EventKind:
    # Without `access` the gateway could not tell what the request does, whatever its method.
    activity = _ACTIVITIES.get(claims.method or "", "Call") if claims.access is not None else "Call"
    if claims.allowed:
        return kinds.ACTIONS_ALLOWED[activity]
    if claims.observed:
        return kinds.ACTIONS_OBSERVED[activity]
    by_another = any(reason.code in _STOLEN for reason in claims.reasons)
    return (kinds.ACTIONS_BY_ANOTHER if by_another else kinds.ACTIONS_DENIED)[activity]


def _at_host(destination: Destination | None) -> str:
    """The destination for people, if no target is registered there."""
    if destination is None or destination.host is None:
        return ""
    return f" at {destination.host}" + (f":{destination.port}" if destination.port is not None else "")


def _message(claims: ActionDecided) -> str:
    agent = claims.agent_id or "somebody"
    request = (
        f"{claims.verb} on {claims.resource}" if claims.verb else with_article(claims.method or "request")
    )
    place = f" at {claims.target_id}" if claims.target_id else _at_host(claims.destination)
    if claims.allowed:
        return f"{agent} did {request}{place}"
    reason_text = scrubbed("; ".join(reason.message for reason in claims.reasons)) or "it was not allowed"
    if claims.count is not None and claims.count > 1:
        request = f"{claims.count} requests"
    if claims.observed:
        return f"{agent} did {request}{place}, which would have been blocked: {reason_text}"
    return f"{agent} was kept from {request}{place}: {reason_text}"
