"""Events of runs: orders are Authorize Session events (OCSF class 3003), and runs Authentication events (3002).

The instance of a run logs on when the run starts, and off when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from ringfence.audit.events.ocsf import (
    AUTHENTICATION,
    AUTHORIZE_SESSION,
    DENIED,
    FAILURE,
    HIGH,
    LOW,
    MEDIUM,
    EventKind,
    OcsfEvent,
    event,
    event_kind,
    scrubbed,
    user_of,
)
from ringfence.kernel.base.ids import message_id
from ringfence.messages.credential import Reason
from ringfence.messages.run import Mount, Run, RunOrder, RunStop
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.records.runs import run_id_of

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received

ORDERED: Final = event_kind("run.ordered", AUTHORIZE_SESSION, "Order Run", status="Requested", severity=LOW)
STOP_ORDERED: Final = event_kind(
    "run.stop_ordered", AUTHORIZE_SESSION, "Stop Run", status="Requested", severity=LOW
)
STATUSES: Final[Mapping[str, EventKind]] = {
    "claimed": event_kind("run.claimed", AUTHENTICATION, "Claim Run"),
    "started": event_kind("run.started", AUTHENTICATION, 1),
    "ended": event_kind("run.ended", AUTHENTICATION, 2),
    "lost": event_kind("run.lost", AUTHENTICATION, 2, severity=HIGH, status=FAILURE, alert=True),
}
REMAINED: Final = event_kind("run.remained", AUTHENTICATION, 2, severity=MEDIUM, status=FAILURE, alert=True)
"""A run that ended, and of which something is left."""
NOT_STARTED: Final = event_kind(
    "run.not_started", AUTHENTICATION, "Start Run", severity=LOW, status=FAILURE, action=DENIED
)
"""A runner refused an order, and says why."""
REFUSED: Final = event_kind(
    "run.refused", AUTHENTICATION, "Refuse Run", severity=HIGH, status=FAILURE, action=DENIED, alert=True
)
"""A runner's record that takes no run forward: another runner's run, one that is over, or one that it changes."""
_PROTOCOL = {"auth_protocol_id": 99, "auth_protocol": "JWS"}


def ordered(
    record: Received, claims: RunOrder, subject_fields: Mapping[str, Any], verified: dict[str, Any]
) -> OcsfEvent:
    """A person ordered a run. `subject_fields`: those of its agent and task."""
    order_id = message_id(claims.iss, claims.jti)
    command = scrubbed(" ".join(claims.command))
    fields = {
        **subject_fields,
        "agent": claims.agent_id,
        "run": run_id_of("", order_id=order_id),
        "order": order_id,
        "pool": claims.pool,
        "labels": claims.labels,
        "argv": command,
        "image": claims.image,
        "mounts": _mounts(claims.mounts),
        "limits": claims.limits.model_dump(),
        "ttl_s": claims.ttl_s,
        "outcome": "requested",
        "verified": verified,
    }
    signer = user_of(claims.iss)
    message = f"{signer['name']} ordered a run of agent {claims.agent_id} in pool {claims.pool}: {command}"
    attributes = {
        "user": user_of(spiffe_id(claims.aud, "agent", claims.agent_id)),
        "actor": {"user": signer},
        "privileges": [],
    }
    return event(
        record, ORDERED, message, attributes, fields, key=claims.agent_id, correlation=claims.task_id
    )


def stop_ordered(
    record: Received, claims: RunStop, subject_fields: Mapping[str, Any], verified: dict[str, Any]
) -> OcsfEvent:
    """A person ordered the end of a run. `subject_fields`: those of its agent and task, as far as they are known."""
    signer = user_of(claims.iss)
    reason = scrubbed(claims.reason)
    fields = {
        **subject_fields,
        "run": claims.run_id,
        "comment": reason,
        "outcome": "requested",
        "verified": verified,
    }
    agent = subject_fields.get("agent")
    attributes = {
        "user": user_of(spiffe_id(claims.aud, "agent", agent)) if agent else signer,
        "actor": {"user": signer},
        "privileges": [],
    }
    return event(
        record,
        STOP_ORDERED,
        f"{signer['name']} ordered the end of run {claims.run_id}: {reason}",
        attributes,
        fields,
        key=agent or claims.run_id,
        correlation=subject_fields.get("task"),
    )


def told(
    record: Received,
    claims: Run,
    subject_fields: Mapping[str, Any],
    verified: dict[str, Any],
    *,
    counts: bool,
) -> OcsfEvent:
    """A runner reported a new state of a run. `counts`: whether the state follows the one before."""
    runner = user_of(claims.iss)
    kind = STATUSES[claims.status]
    reasons: tuple[Reason, ...] = ()
    message = (
        f"run {claims.run_id} of agent {claims.agent_id} is {claims.status}, says runner {runner['name']}"
    )
    if not counts:
        kind = REFUSED
        why = "it takes the run back, or is about a run of another runner, agent, task or key"
        reasons = (Reason(code="run_refused", message=why),)
        message = f"what runner {runner['name']} said of run {claims.run_id} changes nothing: {why}"
    elif claims.refused is not None:
        kind = NOT_STARTED
        reasons = (Reason(code=claims.refused.code, message=scrubbed(claims.refused.message)),)
        message = (
            f"runner {runner['name']} refused to start run {claims.run_id} of agent {claims.agent_id}: "
            f"{reasons[0].message}"
        )
    elif claims.remained:
        kind = REMAINED
        message = f"{message}, and something of it remained: {scrubbed('; '.join(claims.remained))}"
    exit = claims.exit.model_dump(exclude_none=True) if claims.exit is not None else None
    if exit is not None and "reason" in exit:
        exit["reason"] = scrubbed(exit["reason"])
    fields = {
        **subject_fields,
        "agent": claims.agent_id,
        "run": claims.run_id,
        "order": claims.order_id,
        "given_by": claims.ordered_by,
        "runner": runner["name"],
        "status": claims.status,
        "key_thumbprint": claims.key_thumbprint,
        "backend": claims.backend,
        "limits": claims.limits.model_dump(),
        "policy_digest": claims.policy_digest,
        "image": claims.image_digest,
        "mounts": _mounts(claims.mounts),
        "exit": exit,
        "remained": [scrubbed(one) for one in claims.remained] or None,
        "outcome": claims.status if counts and claims.refused is None else "refused",
        "verified": verified,
    }
    attributes = {
        "user": user_of(spiffe_id(claims.aud, "agent", claims.agent_id)),
        "actor": {"user": runner},
        "service": {"name": "Ringfence run", "uid": record.topic_name},
        **_PROTOCOL,
    }
    return event(
        record,
        kind,
        message,
        attributes,
        fields,
        key=claims.agent_id,
        correlation=claims.task_id,
        reasons=reasons,
    )


def _mounts(mounts: tuple[Mount, ...]) -> list[dict[str, Any]] | None:
    return [mount.model_dump() for mount in mounts] or None
