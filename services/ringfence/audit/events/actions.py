"""API Activity events (OCSF class 6003) of actions through gateways: one for each request that a gateway decided.

The messages are unsigned, so anybody who can write to the topic can forge them. No decision depends on them, and the
events say so: `verified.by` is None.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ringfence.audit.events.ocsf import (
    ALLOWED,
    API_ACTIVITY,
    DENIED,
    FAILURE,
    HIGH,
    LOW,
    OBSERVED,
    UNKNOWN_USER,
    EventKind,
    OcsfEvent,
    event,
    event_kind,
    scrubbed,
    user_of,
)
from ringfence.audit.memory import LeaseFacts
from ringfence.kernel.base.text import with_article
from ringfence.messages.operations import ActionAnswered, ActionDecided, Destination, RelayEnded

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received

_STOLEN: Final = frozenset({
    "handle_other_agent", "proof_by_stranger", "mcp_session_other_agent", "mcp_task_other_agent",
    "mcp_state_other_agent",
})  # fmt: skip
"""Reason codes of a stolen handle or session: another agent than its owner presented it. They raise an alert."""
_CREATE, _READ, _UPDATE, _DELETE = 1, 2, 3, 4
_ACTIVITIES: Final[Mapping[str, int]] = {
    "GET": _READ, "HEAD": _READ, "OPTIONS": _READ, "TRACE": _READ,
    "POST": _CREATE, "PUT": _UPDATE, "PATCH": _UPDATE, "DELETE": _DELETE,
}  # fmt: skip
_OTHER: Final = "Call"
_HTTP_METHODS: Final = frozenset({"GET", "HEAD", "OPTIONS", "TRACE", "POST", "PUT", "DELETE", "CONNECT"})
"""The methods that OCSF knows. PATCH is not among them."""
_HOSTNAME: Final = re.compile(r"(?=.{1,253}$)[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
"""OCSF type `hostname_t`."""


def _kinds_by_activity(code: str, **how: Any) -> dict[int | str, EventKind]:
    return {
        one: event_kind(code, API_ACTIVITY, one, **how) for one in (_CREATE, _READ, _UPDATE, _DELETE, _OTHER)
    }


_ALLOWED = _kinds_by_activity("action.allowed", action=ALLOWED)
_DENIED = _kinds_by_activity("action.denied", severity=LOW, status=FAILURE, action=DENIED)
_OBSERVED = _kinds_by_activity("action.observed", severity=LOW, status=FAILURE, action=OBSERVED)
_BY_ANOTHER = _kinds_by_activity(
    "action.by_another", severity=HIGH, status=FAILURE, action=DENIED, alert=True
)


_ANSWERED = event_kind("action.answered", API_ACTIVITY, _OTHER)
_RELAY_ENDED = event_kind("relay.ended", API_ACTIVITY, _OTHER)
_FAILED = event_kind("action.failed", API_ACTIVITY, _OTHER, severity=LOW, status=FAILURE)
_ANSWER_TEXTS: Final[Mapping[str, str]] = {
    "result": "got a result", "accepted": "was heard", "tool_error": "got an error of the tool",
    "rpc_error": "got a JSON-RPC error", "transport_error": "was refused by the target", "none": "got no whole answer",
}  # fmt: skip


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
    agent = claims.agent_id
    own_lease = lease is not None and lease.agent == agent
    fields: dict[str, Any] = {
        **_action_fields(claims, subject_fields),
        "lease_agent": lease.agent if lease is not None and not own_lease else None,
        "access": _access(claims),
        "method": claims.method,
        "destination": _destination(claims.destination),
        "request_digest": claims.request_digest,
        "latency_us": claims.latency_us,
        "label": claims.label,
        **_approval_fields(claims),
        "outcome": _outcome(claims),
        "verified": {"by": None},
    }
    user = user_of(f"spiffe://{trust_domain}/agent/{agent}") if agent is not None else UNKNOWN_USER
    attributes: dict[str, Any] = {
        "actor": {"user": user},
        "api": {"operation": claims.verb or claims.method or "unknown", "request": {"uid": claims.action_id}},
        "src_endpoint": {"name": agent or "unknown"},
    }
    if claims.target_id is not None:
        attributes["api"]["service"] = {"name": claims.target_id}
    if claims.resource is not None:
        attributes["resources"] = [{"name": claims.resource}]
    attributes |= _network_attributes(claims)
    if claims.count is not None:
        attributes["count"] = claims.count
    return event(
        record,
        _kind(claims),
        _message(claims),
        attributes,
        fields,
        key=agent or record.topic.what,
        correlation=fields.get("request") or claims.task_id,
        reasons=claims.reasons,
        traceparent=claims.traceparent or (lease.traceparent if lease is not None and own_lease else None),
    )


def answered(
    record: Received,
    claims: ActionAnswered,
    lease: LeaseFacts | None,
    subject_fields: Mapping[str, Any],
    trust_domain: str,
) -> OcsfEvent:
    """The event of the answer to an allowed request at an MCP endpoint. Arguments as for `acted`."""
    agent = claims.agent_id
    own_lease = lease if lease is not None and lease.agent == agent else None
    fields: dict[str, Any] = {
        **_action_fields(claims, subject_fields),
        "answer": claims.answer,
        "http_status": claims.http_status,
        "rpc_code": claims.rpc_code,
        "verified": {"by": None},
    }
    user = user_of(f"spiffe://{trust_domain}/agent/{agent}") if agent is not None else UNKNOWN_USER
    attributes: dict[str, Any] = {
        "actor": {"user": user},
        "api": {"operation": claims.verb or "unknown", "request": {"uid": claims.action_id}},
        "src_endpoint": {"name": agent or "unknown"},
    }
    if claims.target_id is not None:
        attributes["api"]["service"] = {"name": claims.target_id}
    if claims.resource is not None:
        attributes["resources"] = [{"name": claims.resource}]
    request = f"{claims.verb} on {claims.resource} at {claims.target_id}"
    return event(
        record,
        _ANSWERED if claims.answer in ("result", "accepted") else _FAILED,
        f"{agent or 'somebody'} {_ANSWER_TEXTS[claims.answer]} for {request}",
        attributes,
        fields,
        key=agent or record.topic.what,
        correlation=fields.get("request") or claims.task_id,
        traceparent=claims.traceparent or (own_lease.traceparent if own_lease is not None else None),
    )


def relay_ended(
    record: Received,
    claims: RelayEnded,
    lease: LeaseFacts | None,
    subject_fields: Mapping[str, Any],
    trust_domain: str,
) -> OcsfEvent:
    """The event of the end of a run's byte relay. Arguments as for `acted`."""
    own_lease = lease if lease is not None and lease.agent == claims.agent_id else None
    fields: dict[str, Any] = {
        **_shared_fields(claims, subject_fields),
        "destination": _destination(claims.destination),
        "sent_bytes": claims.sent_bytes,
        "received_bytes": claims.received_bytes,
        "duration_ms": claims.duration_ms,
        "verified": {"by": None},
    }
    attributes: dict[str, Any] = {
        "actor": {"user": user_of(f"spiffe://{trust_domain}/agent/{claims.agent_id}")},
        "api": {
            "operation": "CONNECT",
            "request": {"uid": claims.action_id},
            "service": {"name": claims.target_id},
        },
        "src_endpoint": {"name": claims.agent_id},
    }
    attributes |= _endpoint(claims.destination)
    why = f", ended by the gateway: {scrubbed(claims.reason.message)}" if claims.reason is not None else ""
    return event(
        record,
        _RELAY_ENDED,
        f"a relay of {claims.agent_id} to {claims.target_id} passed {claims.sent_bytes} bytes there and "
        f"{claims.received_bytes} back{why}",
        attributes,
        fields,
        key=claims.agent_id,
        correlation=fields.get("request") or claims.task_id,
        reasons=(claims.reason,) if claims.reason is not None else (),
        traceparent=claims.traceparent or (own_lease.traceparent if own_lease is not None else None),
    )


def _action_fields(
    claims: ActionDecided | ActionAnswered, subject_fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields of an action that was decided or answered, over the subject fields."""
    act = list(claims.act) if claims.act else [claims.agent_id] if claims.agent_id else None
    return {
        **_shared_fields(claims, subject_fields),
        "act": act,
        "verb": claims.verb,
        "resource": claims.resource,
    }


def _shared_fields(
    claims: ActionDecided | ActionAnswered | RelayEnded, subject_fields: Mapping[str, Any]
) -> dict[str, Any]:
    """Fields that all kinds share, over the subject fields.

    The digest of the credential's request is left out: here `request_digest` is the digest of the agent's request.
    """
    return {
        **{name: value for name, value in subject_fields.items() if name != "request_digest"},
        "agent": claims.agent_id,
        "task": claims.task_id,
        "run": claims.run_id,
        "lease": claims.lease_id,
        "target": claims.target_id,
        "action": claims.action_id,
        "decided_by": claims.gateway,
    }


def _access(claims: ActionDecided) -> str | None:
    """`read` or `write`; None for CONNECT, which older gateways reported as a write."""
    return claims.access if claims.method != "CONNECT" else None


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


def _outcome(claims: ActionDecided) -> str:
    if claims.allowed:
        return "allowed"
    return "observed" if claims.observed else "denied"


def _kind(claims: ActionDecided) -> EventKind:
    # Without `access` the gateway could not tell what the request does, whatever its method.
    activity = _ACTIVITIES.get(claims.method or "", _OTHER) if claims.access is not None else _OTHER
    if claims.allowed:
        return _ALLOWED[activity]
    if claims.observed:
        return _OBSERVED[activity]
    by_another = any(reason.code in _STOLEN for reason in claims.reasons)
    return (_BY_ANOTHER if by_another else _DENIED)[activity]


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
