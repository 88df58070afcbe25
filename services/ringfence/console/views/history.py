"""How a request differs from what people answered for its agent before, by audit's events of the last 30 days."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ringfence.client.approvals.history_comparison import DAYS, PastAnswer, compare
from ringfence.client.approvals.pending_approval import PendingApproval
from ringfence.client.approvals.request_groups import RequestGroup
from ringfence.client.errors import ApiError
from ringfence.console.views.page import View
from ringfence.messages.permission import Permission

_CODES: Final = "approval.given,approval.denied,grant.given"
_MOST: Final = 500
_MOST_OF_ALL: Final = 1000
_DAY_MS: Final = 86_400_000


@dataclass(frozen=True, slots=True)
class Unusual:
    """What a card says about it."""

    lines: tuple[str, ...]
    differs: bool


async def comparisons(view: View, groups: Sequence[RequestGroup]) -> list[Unusual | None]:
    """For each group, how it differs. None: this person does not see the agent's history."""
    me = view.session.user_id
    try:
        sees_all = bool(
            {"operator", "auditor"} & set((await view.reads.record("user", me))["state"]["roles"])
        )
    except ApiError:
        sees_all = False
    agents = dict.fromkeys(one.first.agent for one in groups if sees_all or one.first.sponsor == me)
    found = await _events_of(view, list(agents))
    return [
        _compared(group, found[group.first.agent]) if group.first.agent in found else None for group in groups
    ]


async def _events_of(view: View, agents: list[str]) -> dict[str, list[dict[str, Any]] | None]:
    """The answers to each of these agents: one question for all of them, unless its answer is too long."""
    if len(agents) > 1:
        everybody = await _events(view, None, _MOST_OF_ALL)
        if everybody is None or len(everybody) < _MOST_OF_ALL:
            by_agent: dict[str, list[dict[str, Any]]] = {agent: [] for agent in agents}
            for event in everybody or ():
                by_agent.get(event.get("unmapped", {}).get("agent"), []).append(event)
            return {agent: None if everybody is None else events for agent, events in by_agent.items()}
    each = await asyncio.gather(*(_events(view, agent, _MOST) for agent in agents))
    return dict(zip(agents, each, strict=True))


async def _events(view: View, agent: str | None, most: int) -> list[dict[str, Any]] | None:
    try:
        answer = await view.reads.events({"code": _CODES}, agent=agent, limit=most)
    except ApiError:
        return None
    since_ms = view.now_ms - DAYS * _DAY_MS
    return [one for one in answer["events"] if one["time"] >= since_ms]


def _compared(group: RequestGroup, events: list[dict[str, Any]] | None) -> Unusual:
    if events is None:
        return Unusual(("Not known: audit does not answer.",), differs=True)
    one = group.first
    left_out = {request.request_id for request in group.requests}
    past = [
        answer for event in events if (answer := _answer(event, one)) and answer.request_id not in left_out
    ]
    found = compare(one.scope, one.ttl_s, one.delivery, past)
    if not found.differences:
        return Unusual((f"As usual: approved {found.approved} times in {DAYS} days.",), differs=False)
    return Unusual(tuple(_sentence(deviation.message) for deviation in found.differences), differs=True)


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:] + "."


def _answer(event: dict[str, Any], pending: PendingApproval) -> PastAnswer | None:
    """An event as an answer; None where audit did not verify it."""
    fields = event.get("unmapped", {})
    if not (fields.get("verified") or {}).get("by"):
        return None
    denied = event["metadata"].get("event_code") == "approval.denied"
    return PastAnswer(
        "denied" if denied else "approved",
        fields.get("request"),
        tuple(_permissions(event.get("privileges", ()), pending)),
        int(fields.get("ttl_s") or 0),
        fields.get("delivery") or "agent",
    )


def _permissions(privileges: Iterable[str], pending: PendingApproval) -> Iterable[Permission]:
    """`target:verb:resource`, as audit writes it. A verb may have colons, so those asked for are tried first."""
    asked = [verb for permission in pending.scope for verb in permission.verbs]
    for text in privileges:
        target, _, rest = text.partition(":")
        verb = next((one for one in asked if rest.startswith(f"{one}:")), rest.partition(":")[0])
        yield Permission(target=target, verbs=(verb,), resources=(rest[len(verb) + 1 :],))
