"""Approvals given ahead, and taken back, as Authorize Session events (3003)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ringfence.audit.events.ocsf import (
    ALLOWED,
    AUTHORIZE_SESSION,
    DENIED,
    LOW,
    UNKNOWN_USER,
    Event,
    event,
    in_words,
    moment,
    permission,
    privileges,
    scrubbed,
    step,
    user_of,
)
from ringfence.messages.approval import Grant, GrantWithdraw
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.requests.grants import id_of

if TYPE_CHECKING:
    from ringfence.kernel.kafka.record import Received

GIVEN = step("grant.given", AUTHORIZE_SESSION, "Approve Ahead", severity=LOW, action=ALLOWED)
WITHDRAWN = step("grant.withdrawn", AUTHORIZE_SESSION, "Withdraw Approval", severity=LOW, action=DENIED)


def given(record: Received, claims: Grant, words: dict[str, Any], verified: dict[str, Any]) -> Event:
    """A person approved ahead. `words`: sponsor and user of the task, from the records."""
    who = user_of(claims.iss)
    comment = scrubbed(claims.comment) if claims.comment else None
    message = (
        f"{who['name']} approved ahead {claims.count} credentials for {in_words(claims.scope)} of agent "
        f"{claims.agent_id} in task {claims.task_id}, each for {claims.ttl_s} s at most, until "
        f"{moment(claims.exp * 1000)}"
    )
    if comment:
        message += f": {comment}"
    own: dict[str, Any] = {
        "user": user_of(spiffe_id(claims.aud, "agent", claims.agent_id)),
        "actor": {"user": who, "session": {"uid": claims.task_id}},
        "privileges": privileges(claims.scope),
    }
    said = {
        **words,
        "agent": claims.agent_id,
        "task": claims.task_id,
        "grant": id_of(claims),
        "target": claims.scope[0].target,
        "permissions": [permission(one) for one in claims.scope],
        "count": claims.count,
        "ttl_s": claims.ttl_s,
        "delivery": claims.delivery,
        "deadline": claims.exp,
        "approvers": [who["name"]],
        "policy_revision": claims.revisions.policy,
        "comment": comment,
        "verified": verified,
    }
    return event(record, GIVEN, message, own, said, key=claims.agent_id, correlation=claims.task_id)


def withdrawn(
    record: Received, claims: GrantWithdraw, words: dict[str, Any], verified: dict[str, Any]
) -> Event:
    """A person took a grant back. `words`: what is known of the grant; empty where it was not seen."""
    who, comment = user_of(claims.iss), scrubbed(claims.reason)
    agent = words.get("agent")
    of_whom = f" of agent {agent}" if agent else ""
    own: dict[str, Any] = {
        "user": user_of(spiffe_id(claims.aud, "agent", agent)) if agent else UNKNOWN_USER,
        "actor": {"user": who},
        "privileges": [],
    }
    return event(
        record,
        WITHDRAWN,
        f"{who['name']} took back grant {claims.grant_id}{of_whom}: {comment}",
        own,
        {**words, "grant": claims.grant_id, "comment": comment, "verified": verified},
        key=agent or str(who["name"]),
        correlation=words.get("task"),
    )
