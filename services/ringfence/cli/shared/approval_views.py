"""Prints pending requests and actions for approvers, with equivalent requests shown once.

Everything comes from what the agent signed and from verified records. Untrusted text is escaped, and stays on its line.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ringfence.cli.shared.arguments import show_scope
from ringfence.cli.shared.output import print_fields, until, visible, visible_name, visible_resource
from ringfence.kernel.base.text import Lines, span
from ringfence.messages.codes import Code

if TYPE_CHECKING:
    from ringfence.client.approvals.action_approvals import PendingAction
    from ringfence.client.approvals.history_comparison import Comparison, Deviation, RequestGroup


def print_question(group: RequestGroup, comparison: Comparison) -> None:
    """Print a group of equivalent requests, and how they differ from what the agent usually gets."""
    from ringfence.client.arguments import describe_approvers

    one, count = group.first, len(group.requests)
    print_fields(
        {
            "agent": f"{one.agent} ({visible(one.agent_description)})",
            **({"handed on by": ", then ".join(reversed(one.delegators))} if one.delegators else {}),
            "task": visible(one.purpose),
            "on behalf of": one.on_behalf_of,
            "target": f"{one.target} ({visible(one.target_description)})",
            "wants": show_scope(one.scope),
            "for": span(one.ttl_s) + (f", {count} credentials" if count > 1 else ""),
            "its reason": Lines(group.reasons),
            "compared": Lines(_compared(comparison)),
            **(
                {"BREAK GLASS": "policy denies it; two operators may allow it once"}
                if one.break_glass
                else {}
            ),
            "needs": describe_approvers(one.required) + ("" if one.mine else "  (not yours to give)"),
            "asked because": "; ".join(visible(reason.message) for reason in one.why_asked),
            "answer until": until(group.expires_at, time.time()),
            "digest": Lines(request.digest for request in group.requests),
        },
        title=f"request {one.request_id}" + (f", and {count - 1} alike" if count > 1 else ""),
    )


def as_json(group: RequestGroup, comparison: Comparison | None = None) -> dict[str, Any]:
    """A group of equivalent requests as JSON: its first request, and in `alike` the ids and digests of all."""
    document = asdict(group.first)
    document["alike"] = [
        {
            "request_id": one.request_id,
            "digest": one.digest,
            "reason": one.reason,
            "expires_at": one.expires_at,
        }
        for one in group.requests
    ]
    if comparison is not None:
        document["compared"] = asdict(comparison)
    return document


def print_action(one: PendingAction) -> None:
    """Print one pending action, from what the gateway signed and from verified records."""
    from ringfence.client.arguments import describe_approvers

    print_fields(
        {
            "agent": f"{one.agent} ({visible(one.agent_description)})",
            "task": visible(one.purpose),
            "on behalf of": one.on_behalf_of,
            "target": f"{one.target} ({visible(one.target_description)})",
            "does": f"{visible_name(one.verb)} on {visible_resource(one.resource)}",
            "sends": f"{visible_name(one.method)} {visible_name(one.url)}",
            "with a body of": f"{one.body_bytes} bytes, SHA-256 {one.body_digest}"
            if one.body_bytes
            else "nothing",
            "with headers": Lines(_headers(one)),
            "waits at": one.gateway,
            "needs": describe_approvers((one.required,)) + ("" if one.mine else "  (not yours to give)"),
            "answer until": until(one.expires_at, time.time()),
            "digest": one.digest,
        },
        title=f"action {one.request_id}: this one alone, once",
    )


def shown_headers(one: PendingAction) -> list[str]:
    """The headers whose values the gateway shows, one a line."""
    return [f"{visible(each.name)}: {visible(each.value)}" for each in one.headers if each.value is not None]


def _headers(one: PendingAction) -> list[str]:
    names = ", ".join(visible(each.name) for each in one.headers if each.value is None)
    unseen = [f"values not shown: {names}"] if names else []
    return [*shown_headers(one), *unseen, f"SHA-256 {one.headers_digest}"]


def action_as_json(one: PendingAction) -> dict[str, Any]:
    """A pending action as JSON; `kind` distinguishes it from a credential request."""
    return {"kind": "action", **asdict(one)}


def _compared(comparison: Comparison) -> list[str]:
    from ringfence.client.approvals.history_comparison import DAYS, times

    if not comparison.differences:
        return [f"as usual: {times(comparison.approved)} approved for it in {DAYS} days"]
    return [_difference(one) for one in comparison.differences]


def _difference(one: Deviation) -> str:
    what = (
        f": {show_scope(one.scope).replace(chr(10), ', ')}" if one.scope and one.code != Code.TARGET else ""
    )
    return f"UNUSUAL  {one.message}{what}"
