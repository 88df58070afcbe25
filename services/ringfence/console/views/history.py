"""How a request differs from what people answered for its agent before, as audit knows it, in the last 30 days."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from ringfence.client.approvals.history_comparison import DAYS, PastAnswer, compare
from ringfence.client.approvals.pending_approval import PendingApproval
from ringfence.client.approvals.request_groups import RequestGroup
from ringfence.client.errors import ApiError
from ringfence.console.views.page import View
from ringfence.messages.permission import Permission

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
