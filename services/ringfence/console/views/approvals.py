"""Approval pages: show pending requests in groups of equivalent ones, and how each differs from earlier answers.

The comparison uses what people answered for the agent in the last 30 days, as audit knows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ringfence.client.approvals.history_comparison import (
    DAYS,
    PastAnswer,
    PendingApproval,
    RequestGroup,
    compare,
    group_equivalent,
)
from ringfence.client.arguments import describe_approvers
from ringfence.client.errors import ApiError
from ringfence.console.commands import shown_digest
from ringfence.console.views.page import Page, View
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.base import Permission
from ringfence.messages.credential import CredentialRequest, Reason, Revisions

_DAY_MS: Final = 86_400_000


@dataclass(frozen=True, slots=True)
class Unusual:
    """What a card says about it."""

    lines: tuple[str, ...]
    differs: bool


_UNKNOWN: Final = Unusual(("Not known: audit does not answer.",), differs=True)


async def comparisons(view: View, groups: Sequence[RequestGroup]) -> list[Unusual | None]:
    """For each group, how it differs. None: this person does not see the agent's history."""
    me = view.session.user_id
    try:
        sees_all = bool(
            {"operator", "auditor"} & set((await view.reads.record("user", me))["state"]["roles"])
        )
    except ApiError:
        sees_all = False
    agents = list(dict.fromkeys(one.first.agent for one in groups if sees_all or one.first.sponsor == me))
    if not agents:
        return [None] * len(groups)
    # A request that waits may have an approval already, where it needs several.
    waiting = [request.request_id for group in groups for request in group.requests]
    try:
        found = await view.reads.approval_history(
            agents, since_ms=view.now_ms - DAYS * _DAY_MS, without=waiting
        )
    except ApiError:
        return [_UNKNOWN if group.first.agent in agents else None for group in groups]
    return [
        _compared(group, found[group.first.agent]) if group.first.agent in agents else None
        for group in groups
    ]


def _compared(group: RequestGroup, answers: Iterable[Mapping[str, Any]]) -> Unusual:
    one = group.first
    past = [past for answer in answers for past in _past(answer, one)]
    found = compare(one.scope, one.ttl_s, one.delivery, past)
    if not found.differences:
        return Unusual((f"As usual: approved {found.approved} times in {DAYS} days.",), differs=False)
    return Unusual(tuple(_sentence(deviation.message) for deviation in found.differences), differs=True)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _past(answer: Mapping[str, Any], pending: PendingApproval) -> list[PastAnswer]:
    """Equal answers, as audit counts them."""
    scope = tuple(_permissions(answer["privileges"], pending))
    past = PastAnswer(answer["outcome"], None, scope, int(answer["ttl_s"]), answer["delivery"])
    return [past] * int(answer["count"])


def _permissions(privileges: Iterable[str], pending: PendingApproval) -> Iterable[Permission]:
    """`target:verb:resource`, as audit writes it. A verb may have colons, so those asked for are tried first."""
    asked = [verb for permission in pending.scope for verb in permission.verbs]
    for text in privileges:
        target, _, rest = text.partition(":")
        verb = next((one for one in asked if rest.startswith(f"{one}:")), rest.partition(":")[0])
        yield Permission(target=target, verbs=(verb,), resources=(rest[len(verb) + 1 :],))


_NO_RECORDS = {
    "agent_description": "",
    "sponsor": "",
    "purpose": "",
    "on_behalf_of": "",
    "target_description": "",
    "delegators": [],
}
ROWS: Final = 50
"""Requests of one page, before equivalent ones are grouped."""
GROUP_ROWS: Final = 20
"""Requests of a group that a page has forms for. The others come up once these are answered."""


async def approvals(view: View) -> Page:
    """What waits and what the person may see, page by page; what they can answer comes first."""
    shown = view.query.get("show") or "mine"
    shown = shown if shown in ("mine", "others", "all") else "mine"
    after = view.query.get("after") or None
    found, actions = await asyncio.gather(
        view.reads.approvals(show=shown, after=after, limit=ROWS), view.reads.action_approvals()
    )
    listed = found["approvals"]
    groups = group_equivalent([as_pending(one) for one in listed])
    digests = {one["request_id"]: shown_digest(one) for one in listed}
    unusual = await comparisons(view, groups)
    counts = found["counts"]
    return Page(
        "approvals.html",
        "Approvals",
        {
            "cards": [_card(*one, digests) for one in zip(groups, unusual, strict=True)],
            "shown": shown,
            "actions": [
                {**one, "needs": describe_approvers((one["required"],))}
                for one in actions
                if not after and (shown == "all" or one["mine"] == (shown == "mine"))
            ],
            "counts": {
                "mine": counts["mine"] + sum(one["mine"] for one in actions),
                "others": counts["others"] + sum(not one["mine"] for one in actions),
            },
            "first": not after,
            "after": found["after"],
        },
        "approvals",
    )


async def approval(view: View) -> Page:
    """One request. Raises ApiError (404) if it does not wait, or not for this person to see."""
    one = await view.reads.approval(view.id)
    group = RequestGroup((as_pending(one),))
    (unusual,) = await comparisons(view, [group])
    return Page(
        "approval.html",
        f"Request {one['request_id'][:8]}",
        {
            "superseded": bool(one.get("superseded")),
            "card_view": _card(group, unusual, {one["request_id"]: shown_digest(one)}),
        },
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
        "others": group.requests[1:GROUP_ROWS],
        "needs": describe_approvers(group.first.required),
    }
