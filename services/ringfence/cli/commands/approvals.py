"""`ringfence approvals`: a sponsor lists pending requests, approves and denies.

What is shown comes from the request as the agent signed it and from verified records, never from the service that asks.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ringfence.cli.commands import grants
from ringfence.cli.shared import approval_views, connect, styles
from ringfence.cli.shared.arguments import check_id_prefix, show_act, show_scope
from ringfence.cli.shared.id_lookup import only_one, require_whole_id
from ringfence.cli.shared.options import (
    AsOption,
    IdentityOption,
    JsonOption,
    PasskeyOption,
    WideOption,
    YesOption,
    confirm,
    run,
    signer,
    signs_on_page,
    wants_json,
)
from ringfence.cli.shared.output import (
    note,
    print_json,
    print_json_line,
    print_table,
    say,
    visible,
    visible_name,
)
from ringfence.cli.shared.tables import Column, ending, ids
from ringfence.client.arguments import find_by_prefix
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.text import Lines, span

if TYPE_CHECKING:
    from ringfence.client.approvals.action_approvals import PendingAction
    from ringfence.client.approvals.history_comparison import (
        Comparison,
        GroupKey,
        PendingApproval,
        RequestGroup,
    )
    from ringfence.client.approvals.sponsor import Sponsor
    from ringfence.client.passkeys.questions import PasskeyUser

app = typer.Typer(help="As a sponsor: see what waits, approve, deny; approve ahead.", no_args_is_help=True)

RequestArgument = Annotated[
    str,
    typer.Argument(
        metavar="REQUEST",
        callback=check_id_prefix,
        help="The request's id, or how it begins: four characters or more.",
    ),
]
EveryoneOption = Annotated[bool, typer.Option("--everyone", help="Also what others have to decide.")]
CommentOption = Annotated[str | None, typer.Option("--comment", help="Stands in the trail.")]


OneOption = Annotated[bool, typer.Option("--one", help="Only this request, not those that are alike.")]


@app.command(name="list")
def list_approvals(
    everyone: EveryoneOption = False,
    wide: WideOption = False,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """List what waits for you: requests, those that would come to the same credential once, and single actions."""

    who = signer(me, passkey, as_user)

    async def work() -> tuple[list[RequestGroup], list[PendingAction]]:
        async with connect.sponsor(who) as sponsor:
            return sponsor.groups(everyone=everyone), sponsor.actions(everyone=everyone)

    groups, actions = run(work())
    if wants_json(as_json):
        print_json([*map(approval_views.as_json, groups), *map(approval_views.action_as_json, actions)])
        return
    now_s = time.time()
    print_table(
        [
            ids("request"),
            ending("ends"),
            "agent",
            "for",
            "alike",
            "wants",
            Column("reason", "prose", meaning=styles.break_glass),
        ],
        [
            *(
                (
                    group.first.request_id,
                    "in " + span(group.expires_at - now_s),
                    group.first.agent,
                    group.first.on_behalf_of,
                    str(len(group.requests)),
                    show_scope(group.first.scope),
                    Lines(
                        f"{'BREAK GLASS: ' if group.first.break_glass and not number else ''}{reason}"
                        for number, reason in enumerate(group.reasons)
                    ),
                )
                for group in groups
            ),
            *(action_row(one, now_s) for one in actions),
        ],
        empty="nothing waits for you",
        wide=wide,
    )


@app.command()
def show(
    request: RequestArgument,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show one request that waits, whole, those that are alike, and what differs from what the agent usually gets; or
    one action.
    """
    from ringfence.client.approvals.action_approvals import PendingAction

    question = _find_question(request, signer(me, passkey, as_user))
    if isinstance(question, PendingAction):
        show_action(question, wants_json(as_json))
    else:
        _show(*question, as_json)


@app.command()
def approve(
    request: RequestArgument,
    one: OneOption = False,
    comment: CommentOption = None,
    yes: YesOption = False,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Approve exactly this request as it is shown, and each request that is shown as alike; or approve one action.

    Approvals that you may not give are not signed.
    """
    _send_answers(request, "approve", one, comment, yes, signer(me, passkey, as_user), as_json)


@app.command()
def deny(
    request: RequestArgument,
    one: OneOption = False,
    comment: CommentOption = None,
    yes: YesOption = False,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a no to this request, and one to each that is shown as alike; or to one action."""
    _send_answers(request, "deny", one, comment, yes, signer(me, passkey, as_user), as_json)


@app.command()
def watch(
    everyone: EveryoneOption = False,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show each request that waits for you as it comes, until Ctrl-C: who asks, for what, why, for whom, and what
    differs from what the agent usually gets; and each action. With --json one object a line.
    """
    from ringfence.client.approvals.history_comparison import RequestGroup, group_key

    who = signer(me, passkey, as_user)

    async def work() -> None:
        async with connect.sponsor(who) as sponsor:
            history = await sponsor.usual()
            if not wants_json(as_json):
                note("waiting for requests; Ctrl-C ends", "aside")
            async with asyncio.TaskGroup() as both:
                both.create_task(_watch_actions(sponsor, everyone=everyone, as_json=wants_json(as_json)))
                printed: set[tuple[str, GroupKey]] = set()
                async for pending in sponsor.watch(everyone=everyone):
                    group, comparison = RequestGroup(sponsor.alike(pending)), history.compared(pending)
                    if wants_json(as_json):
                        print_json_line(approval_views.as_json(RequestGroup((pending,)), comparison))
                        continue
                    before = [one for one in group.requests if (one.request_id, group_key(one)) in printed]
                    if pending in before:
                        continue  # it was among the equivalent ones
                    printed |= {(one.request_id, group_key(one)) for one in group.requests}
                    if before:
                        reason = visible(pending.reason)
                        say(f"one more like {before[0].request_id}, {len(group.requests)} wait: {reason}")
                        say(f"ringfence approvals grant --like {before[0].request_id} --count 10")
                    else:
                        approval_views.print_question(group, comparison)
                        say(f"ringfence approvals approve {group.first.request_id}")

    run(work())


def _send_answers(
    request: str,
    verb: Literal["approve", "deny"],
    alone: bool,
    comment: str | None,
    yes: bool,
    who: Path | PasskeyUser | None,
    as_json: bool,
) -> None:
    from ringfence.client.approvals.action_approvals import PendingAction

    async def answer(group: RequestGroup) -> list[str]:
        async with connect.sponsor(who) as sponsor:
            return await (sponsor.approve_all if verb == "approve" else sponsor.deny_all)(group, comment)

    if yes:
        require_whole_id(
            request,
            "with --yes nobody looks at what it finds, so name the request by its whole id",
            of="REQUEST",
        )
    question = _find_question(request, who, alone=alone)
    # With a passkey the person sees it again on the sign page, and answers there.
    yes = yes or signs_on_page(who)
    if isinstance(question, PendingAction):
        _answer_action(question, verb, comment, yes, who, wants_json(as_json))
        return
    group, comparison = question
    if not wants_json(as_json):
        _show(group, comparison, as_json)
    # A person may take their time. The signature covers what they saw: after any change it is refused.
    which = "this" if len(group.requests) == 1 else f"all {len(group.requests)}"
    confirm(f"{verb.title()} {which}?", yes)
    approval_ids = run(answer(group))
    verdict = "approved" if verb == "approve" else "denied"
    answers = [
        {"approval_id": approval_id, "request_id": one.request_id, "digest": one.digest}
        for one, approval_id in zip(group.requests, approval_ids, strict=True)
    ]
    if wants_json(as_json):
        print_json({"verdict": verdict, **answers[0], "answers": answers})
        return
    for one in group.requests:
        say(f"{verdict}: request {one.request_id}", verdict)


def _find_question(
    request: str, who: Path | PasskeyUser | None, *, alone: bool = False
) -> tuple[RequestGroup, Comparison] | PendingAction:
    from ringfence.client.approvals.action_approvals import PendingAction
    from ringfence.client.approvals.history_comparison import RequestGroup

    async def work() -> tuple[RequestGroup, Comparison] | PendingAction:
        async with connect.sponsor(who) as sponsor:
            pending = _find(sponsor, request)
            if isinstance(pending, PendingAction):
                return pending
            equivalent = [] if alone else [one for one in sponsor.alike(pending) if one != pending]
            return RequestGroup((pending, *equivalent)), (await sponsor.usual(pending.agent)).compared(
                pending
            )

    return run(work())


def _find(sponsor: Sponsor, request: str) -> PendingApproval | PendingAction:
    """Return the only open request or action whose id begins so. Raises InvalidCallError."""
    questions: list[PendingApproval | PendingAction] = [
        *sponsor.pending(everyone=True),
        *sponsor.actions(everyone=True),
    ]
    waiting = {one.request_id: one for one in questions}
    unshowable = find_by_prefix(request, sponsor.unshowable.items(), lambda one: one[0])
    if unshowable and not any(id.startswith(request) for id in waiting):
        raise InvalidCallError(
            f"request {unshowable[0]} is open, and is not shown: {unshowable[1]}; see: ringfence approvals list"
        )
    known = {id: f"{one.agent}, on behalf of {one.on_behalf_of}" for id, one in waiting.items()}
    return waiting[only_one("open request", request, known)]


def _show(group: RequestGroup, comparison: Comparison, as_json: bool) -> None:
    if wants_json(as_json):
        print_json(approval_views.as_json(group, comparison))
    else:
        approval_views.print_question(group, comparison)


grants.add_to(app)


def action_row(one: PendingAction, now_s: float) -> tuple[str, ...]:
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


def show_action(pending: PendingAction, as_json: bool) -> None:
    if as_json:
        print_json(approval_views.action_as_json(pending))
    else:
        approval_views.print_action(pending)


def _answer_action(
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
        show_action(pending, as_json)
    confirm(f"{verb.title()} this action?", yes)
    approval_id, verdict = run(work()), "approved" if verb == "approve" else "denied"
    if as_json:
        result = {"approval_id": approval_id, "request_id": pending.request_id, "digest": pending.digest}
        print_json({"kind": "action", "verdict": verdict, **result})
    else:
        say(f"{verdict}: action {pending.request_id}", verdict)


async def _watch_actions(sponsor: Sponsor, *, everyone: bool, as_json: bool) -> None:
    """Show each pending action as it arrives, for ever."""
    async for pending in sponsor.watch_actions(everyone=everyone):
        if as_json:
            print_json_line(approval_views.action_as_json(pending))
        else:
            approval_views.print_action(pending)
            say(f"ringfence approvals approve {pending.request_id}")
