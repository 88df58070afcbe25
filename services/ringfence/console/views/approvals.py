"""Approvals: what waits, in groups of equivalent requests, and one request by itself."""

from __future__ import annotations

from typing import Any

from ringfence.client.approvals.pending_approval import PendingApproval
from ringfence.client.approvals.request_groups import RequestGroup, group_equivalent
from ringfence.client.approvers import describe_approvers
from ringfence.console.commands import shown_digest
from ringfence.console.views.history import Unusual, comparisons
from ringfence.console.views.page import Page, View
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.credential import CredentialRequest, Reason, Revisions

_NO_RECORDS = {
    "agent_description": "",
    "sponsor": "",
    "purpose": "",
    "on_behalf_of": "",
    "target_description": "",
    "delegators": [],
}
PAGE_GROUPS = 50
"""Groups on one page."""


async def approvals(view: View) -> Page:
    """All that waits and that the person may see; what they can answer comes first."""
    listed = await view.reads.approvals()
    pending = [as_pending(one) for one in listed]
    digests = {one["request_id"]: shown_digest(one) for one in listed}
    groups = group_equivalent(pending)
    actions = await view.reads.action_approvals()
    mine = [group for group in groups if group.first.mine]
    others = [group for group in groups if not group.first.mine]
    shown = view.query.get("show") or "mine"
    chosen = {"mine": mine, "others": others}.get(shown, groups)
    first = _start(view, len(chosen))
    page = chosen[first : first + PAGE_GROUPS]
    unusual = await comparisons(view, page)
    return Page(
        "approvals.html",
        "Approvals",
        {
            "cards": [_card(*one, digests) for one in zip(page, unusual, strict=True)],
            "shown": shown,
            "actions": [one for one in actions if shown == "all" or one["mine"] == (shown == "mine")],
            "counts": {
                "mine": len(mine) + sum(one["mine"] for one in actions),
                "others": len(others) + sum(not one["mine"] for one in actions),
            },
            "waiting": len(pending),
            "first": first,
            "more": first + PAGE_GROUPS if len(chosen) > first + PAGE_GROUPS else None,
        },
        "approvals",
    )


async def approval(view: View) -> Page:
    """One request. Raises ApiError (404) where it does not wait, or not for this person to see."""
    one = await view.reads.approval(view.id)
    group = RequestGroup((as_pending(one),))
    (unusual,) = await comparisons(view, [group])
    return Page(
        "approval.html",
        f"Request {one['request_id'][:8]}",
        {"card_view": _card(group, unusual, {one["request_id"]: shown_digest(one)})},
        "approvals",
    )


def as_pending(view: dict[str, Any]) -> PendingApproval:
    """A pending request of policy's API, as the SDK has it. Its signature was verified by policy."""
    request = parse(view["request"]).unverified_claims(CredentialRequest)
    about = _NO_RECORDS | view.get("about", {})
    return PendingApproval(
        request_id=view["request_id"],
        digest=digest(view["request"]),
        agent=view["agent_id"],
        agent_description=about["agent_description"],
        sponsor=about["sponsor"],
        task_id=request.task_id,
        purpose=about["purpose"],
        on_behalf_of=about["on_behalf_of"],
        target=request.scope[0].target,
        target_description=about["target_description"],
        scope=request.scope,
        reason=request.reason,
        requested_ttl_s=request.ttl_s,
        requested_at=request.iat,
        ttl_s=view["ttl_s"],
        delivery=view["delivery"],
        required=tuple(view["required"]),
        mine=tuple(view["you_can_give"]),
        expires_at=view["expires_at"],
        revisions=Revisions.model_validate(view["revisions"]),
        why_asked=tuple(Reason.model_validate(one) for one in view.get("reasons", ())),
        request=view["request"],
        break_glass=request.break_glass or False,
        delegators=tuple(about["delegators"]),
    )


def _card(group: RequestGroup, unusual: Unusual | None, digests: dict[str, str]) -> dict[str, Any]:
    return {
        "unusual": unusual,
        "one": group.first,
        "group": group,
        "digests": digests,
        "needs": describe_approvers(group.first.required),
    }


def _start(view: View, most: int) -> int:
    text = view.query.get("from", "0")
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 7 else 0
    return number if number < most else 0
