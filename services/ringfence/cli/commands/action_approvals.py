"""`ringfence approvals` for single actions that wait at a gateway: show each, and answer it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ringfence.cli.shared import approval_views, connect
from ringfence.cli.shared.arguments import show_act
from ringfence.cli.shared.options import confirm, run
from ringfence.cli.shared.output import print_json, print_json_line, say, span, visible_name
from ringfence.kernel.base.text import Lines

if TYPE_CHECKING:
    from ringfence.client.approvals.action_approvals import PendingAction
    from ringfence.client.approvals.sponsor import Sponsor
    from ringfence.client.passkeys.questions import PasskeyUser


def row(one: PendingAction, now_s: float) -> tuple[str, ...]:
    return (
        one.request_id,
        "in " + span(one.expires_at - now_s),
        one.agent,
        one.on_behalf_of,
        "1",
        show_act(one.target, one.verb, one.resource),
        Lines(
            (
                f"ONE ACTION: {visible_name(one.method)} {visible_name(one.url)}",
                *approval_views.shown_headers(one),
            )
        ),
    )


def show(pending: PendingAction, as_json: bool) -> None:
    if as_json:
        print_json(approval_views.action_as_json(pending))
    else:
        approval_views.print_action(pending)


def answer(
    pending: PendingAction,
    verb: Literal["approve", "deny"],
    comment: str | None,
    yes: bool,
    who: Path | PasskeyUser | None,
    as_json: bool,
) -> None:
    """Sign an approval or a denial of exactly the action that is shown."""

    async def work() -> str:
        async with connect.sponsor(who) as sponsor:
            return await (sponsor.approve_action if verb == "approve" else sponsor.deny_action)(
                pending, comment
            )

    if not as_json:
        show(pending, as_json)
    confirm(f"{verb.title()} this action?", yes)
    approval_id, verdict = run(work()), "approved" if verb == "approve" else "denied"
    if as_json:
        result = {"approval_id": approval_id, "request_id": pending.request_id, "digest": pending.digest}
        print_json({"kind": "action", "verdict": verdict, **result})
    else:
        say(f"{verdict}: action {pending.request_id}", verdict)


async def watch(sponsor: Sponsor, *, everyone: bool, as_json: bool) -> None:
    """Show each pending action as it arrives, for ever."""
    async for pending in sponsor.watch_actions(everyone=everyone):
        if as_json:
            print_json_line(approval_views.action_as_json(pending))
        else:
            approval_views.print_action(pending)
            say(f"ringfence approvals approve {pending.request_id}")
