"""Events of runs: orders are Authorize Session events (OCSF class 3003), and runs Authentication events (3002).

The instance of a run logs on when the run starts, and off when it ends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ringfence.audit.events import kinds
from ringfence.audit.events.ocsf import (
    Copied,
    EventContext,
    OcsfEvent,
    VerifiedMessage,
    event,
    scrubbed,
    user_of,
)
from ringfence.audit.events.services import PROTOCOL
from ringfence.kernel.base.ids import message_id
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.run import Mount, Run, RunOrder, RunStop
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.records.runs import run_id_of

_PLACE = Copied(RunOrder, "pool labels")
_RUN = Copied(Run, "agent run order")
_RUN_TERMS = Copied(Run, "status key_thumbprint backend")


def ordered(signed: VerifiedMessage[RunOrder], subject_fields: Mapping[str, Any]) -> OcsfEvent:
    """A person ordered a run. `subject_fields`: those of its agent and task."""
    claims, agent, signer = signed.claims, signed.claims.agent_id, user_of(signed.claims.iss)
    order_id, command = message_id(claims.iss, claims.jti), scrubbed(" ".join(claims.command))
    fields = {
        **subject_fields,
        "agent": agent,
        "run": run_id_of("", order_id=order_id),
        "order": order_id,
        **_PLACE(claims),
        "argv": command,
        "image": claims.image,
        "mounts": _mounts(claims.mounts),
        "limits": claims.limits.model_dump(),
        "ttl_s": claims.ttl_s,
        "outcome": "requested",
    }
    message = f"{signer['name']} ordered a run of agent {agent} in pool {claims.pool}: {command}"
    user = user_of(spiffe_id(claims.aud, "agent", agent))
    attributes = {"user": user, "actor": {"user": signer}, "privileges": []}
    return event(signed, kinds.RUN_ORDERED, message, attributes, fields, EventContext(agent, claims.task_id))


def stop_ordered(signed: VerifiedMessage[RunStop], subject_fields: Mapping[str, Any]) -> OcsfEvent:
    """A person ordered the end of a run. `subject_fields`: those of its agent and task, as far as they are known."""
    claims, agent = signed.claims, subject_fields.get("agent")
    signer, reason = user_of(claims.iss), scrubbed(claims.reason)
    fields = {**subject_fields, "run": claims.run_id, "comment": reason, "outcome": "requested"}
    user = user_of(spiffe_id(claims.aud, "agent", agent)) if agent else signer
    attributes = {"user": user, "actor": {"user": signer}, "privileges": []}
    message = f"{signer['name']} ordered the end of run {claims.run_id}: {reason}"
    return event(
        signed, kinds.RUN_STOP_ORDERED, message, attributes, fields,
        EventContext(agent or claims.run_id, subject_fields.get("task")),
    )  # fmt: skip


def told(signed: VerifiedMessage[Run], subject_fields: Mapping[str, Any], *, counts: bool) -> OcsfEvent:
    """A runner reported a new state of a run. `counts`: whether the state follows the one before."""
    claims, agent, runner = signed.claims, signed.claims.agent_id, user_of(signed.claims.iss)
    kind, run = kinds.RUNS[claims.status], f"run {claims.run_id}"
    reasons: tuple[Reason, ...] = ()
    message = f"{run} of agent {agent} is {claims.status}, says runner {runner['name']}"
    if not counts:
        kind = kinds.RUN_REFUSED
        why = "it takes the run back, or is about a run of another runner, agent, task or key"
        reasons = (Reason(code=Code.RUN_REFUSED, message=why),)
        message = f"what runner {runner['name']} said of {run} changes nothing: {why}"
    elif claims.refused is not None:
        kind, why = kinds.RUN_NOT_STARTED, scrubbed(claims.refused.message)
        reasons = (Reason(code=claims.refused.code, message=why),)
        message = f"runner {runner['name']} refused to start {run} of agent {agent}: {why}"
    elif claims.remained:
        kind = kinds.RUN_REMAINED
        message = f"{message}, and something of it remained: {scrubbed('; '.join(claims.remained))}"
    exit = claims.exit.model_dump(exclude_none=True) if claims.exit is not None else None
    if exit is not None and "reason" in exit:
        exit["reason"] = scrubbed(exit["reason"])
    fields = {
        **subject_fields,
        **_RUN(claims),
        "given_by": claims.ordered_by,
        "runner": runner["name"],
        **_RUN_TERMS(claims),
        "limits": claims.limits.model_dump(),
        "policy_digest": claims.policy_digest,
        "image": claims.image_digest,
        "mounts": _mounts(claims.mounts),
        "exit": exit,
        "remained": [scrubbed(one) for one in claims.remained] or None,
        "outcome": claims.status if counts and claims.refused is None else "refused",
    }
    attributes = {
        "user": user_of(spiffe_id(claims.aud, "agent", agent)),
        "actor": {"user": runner},
        "service": {"name": "Ringfence run", "uid": signed.record.topic_name},
        **PROTOCOL,
    }
    return event(
        signed, kind, message, attributes, fields, EventContext(agent, claims.task_id), reasons=reasons
    )


def _mounts(mounts: tuple[Mount, ...]) -> list[dict[str, Any]] | None:
    return [mount.model_dump() for mount in mounts] or None
