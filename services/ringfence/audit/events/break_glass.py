"""Detection Findings (OCSF class 2004) of break glass.

A finding is created when a credential is allowed against policy's denial. The review of somebody who had no part in it
closes the finding. The class has neither `user` nor `actor`: `evidences` names the person.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
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
from ringfence.audit.memory import RequestFacts
from ringfence.messages.approval import BreakGlassReview
from ringfence.messages.codes import Code
from ringfence.messages.credential import DecidedTerms, Reason
from ringfence.model.verdict import ALLOWED, Verdict, refused

NO_DENIALS = frozenset({Code.BREAK_GLASS, Code.TTL_SHORTENED})
"""Reason codes of such a decision that are not overridden denials."""
_TITLE = "Break glass: a credential that policy denied"
_OF_USE = ("agent", "act", "task", "on_behalf_of", "sponsor", "target", "permissions")
_REVIEW = Copied(BreakGlassReview, "agent request decision_digest")
_OF_REQUEST = ("request_digest", "policy_revision", "instance")


def used(signed: VerifiedMessage[DecidedTerms], facts: RequestFacts, fields: Mapping[str, Any]) -> OcsfEvent:
    """Two operators allowed what policy denies. `fields`: those of the decision's event."""
    claims = signed.claims
    approvers = " and ".join(facts.approvers) or "nobody whose signature holds"
    message = (
        f"break glass: {approvers} allowed agent {facts.agent} {facts.scope_text}, for {claims.ttl_s} s, on behalf of "
        f"{facts.on_behalf_of or 'nobody known'}, against policy ({_codes(claims.reasons)}): {facts.reason}"
    )
    attributes = {
        "finding_info": _finding(claims.request_id, signed.record.appended_at_ms),
        "evidences": [{"actor": {"user": user_of(facts.signer), "session": {"uid": facts.task}}}],
        "resources": [{"uid": facts.target, "type": "Target"}],
    }
    keys = [{"user": user, "kid": kid} for user, kid in facts.approver_keys]
    fields = {**fields, "verified": signed.verified(), "approver_keys": keys, "comment": facts.reason}
    return event(
        signed, kinds.BREAK_GLASS_USED, message, attributes, fields,
        EventContext(facts.agent, claims.request_id, traceparent=facts.traceparent), reasons=claims.reasons,
    )  # fmt: skip


def reviewed(
    signed: VerifiedMessage[BreakGlassReview], use: Mapping[str, Any] | None, rejection: Reason | None
) -> OcsfEvent:
    """A person reviewed a use of break glass.

    `use`: the `unmapped` fields of its event, if it was audited. `rejection`: why the review is invalid, if it is.
    """
    claims = signed.claims
    reviewer, note = user_of(claims.iss), scrubbed(claims.note)
    subject = f"break glass of request {claims.request_id} for agent {claims.agent_id}"
    if rejection is None:
        message = f"{reviewer['name']} reviewed the {subject}: {note}"
    else:
        message = f"{reviewer['name']} cannot review the {subject}: {rejection.message}"
    attributes = {
        "finding_info": _finding(claims.request_id, None),
        "evidences": [{"actor": {"user": reviewer}}],
        "comment": note,
    }
    fields = {
        **{name: (use or {}).get(name) for name in (*_OF_USE, *_OF_REQUEST)},
        **_REVIEW(claims),
        "reviewer": reviewer["name"],
        "review": claims.jti,
        "comment": note,
        "outcome": "reviewed" if rejection is None else "refused",
    }
    return event(
        signed, kinds.REVIEWED if rejection is None else kinds.REVIEW_REFUSED, message, attributes, fields,
        EventContext(claims.agent_id, claims.request_id), reasons=() if rejection is None else (rejection,),
    )  # fmt: skip


def check_review(
    claims: BreakGlassReview, reviewer: str, roles: Iterable[str], use: Mapping[str, Any] | None
) -> Verdict:
    """Check that a review is valid.

    1. The reviewer is an operator or an auditor.
    2. The use that the review names was audited.
    3. The reviewer did not approve it.
    4. The reviewer neither sponsors the agent, nor is whom it acted on behalf of.

    Args:
        claims: the verified review.
        reviewer: the user who signed it.
        roles: their present roles; empty if they are disabled.
        use: the `unmapped` fields of the use's event, or None if no such use was audited.
    """
    if {"operator", "auditor"}.isdisjoint(roles):
        return refused(Code.NOT_REVIEWER, "operators and auditors review break glass")
    if use is None or use.get("decision_digest") != claims.decision_digest:
        return refused(Code.BREAK_GLASS_UNKNOWN, "no such use of break glass was audited")
    if reviewer in (use.get("approvers") or ()):
        return refused(Code.REVIEWER_APPROVED, f"{reviewer} approved it; somebody else reviews it")
    if reviewer in (use.get("sponsor"), use.get("on_behalf_of")):
        message = f"{reviewer} answers for the agent, or had the task done; somebody else reviews it"
        return refused(Code.REVIEWER_INVOLVED, message)
    return ALLOWED


def collect_uses(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Collect all uses of break glass with their reviews, from Detection Findings in their order.

    `review` is the first valid review, or None. Events of another shape, which audit did not write, are skipped.
    """
    uses: dict[str, dict[str, Any]] = {}
    add_uses(uses, events)
    return list(uses.values())


def add_uses(uses: dict[str, dict[str, Any]], events: Iterable[Mapping[str, Any]]) -> None:
    """Add further events to the result of `collect_uses`, keyed by the id of the request."""
    for finding in events:
        with contextlib.suppress(TypeError, KeyError, AttributeError):
            _add_event(uses, finding)


def _add_event(uses: dict[str, dict[str, Any]], finding: Mapping[str, Any]) -> None:
    fields, code = finding["unmapped"], finding["metadata"].get("event_code")
    request = fields["request"]
    if code == kinds.BREAK_GLASS_USED.code:
        uses.setdefault(request, {
            **{name: fields.get(name) for name in (*_OF_USE, "ttl_s", "decision", "decision_digest")},
            "request_id": request, "approvers": list(fields.get("approvers") or ()), "at_ms": finding["time"],
            "reason": fields.get("comment"), "review": None, "refused_reviews": [],
            "denials": [r for r in fields.get("reasons") or () if r["code"] not in NO_DENIALS],
        })  # fmt: skip
        return
    use = uses[request]
    review = {"id": fields.get("review"), "by": fields.get("reviewer"), "at_ms": finding["time"]}
    if code == kinds.REVIEW_REFUSED.code:
        use["refused_reviews"].append({**review, "why": finding.get("status_detail")})
    elif use["review"] is None and fields.get("decision_digest") == use["decision_digest"]:
        use["review"] = {**review, "note": fields.get("comment")}


def _finding(request_id: str, at_ms: int | None) -> dict[str, Any]:
    info: dict[str, Any] = {"uid": request_id, "title": _TITLE, "types": ["Break Glass"]}
    return info if at_ms is None else {**info, "created_time": at_ms}


def _codes(reasons: Sequence[Reason]) -> str:
    codes = (reason.code for reason in reasons if reason.code not in NO_DENIALS)
    return ", ".join(codes) or "no denial is told"
