"""`ringfence approvals grant|grants|withdraw`: approve in advance, list grants, withdraw one."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import check_id_prefix, parse_scope, show_scope
from ringfence.cli.shared.command_results import print_accepted
from ringfence.cli.shared.id_lookup import is_whole, only_one, require_whole_id, whole_id
from ringfence.cli.shared.options import (
    AllowOption,
    AsOption,
    IdentityOption,
    JsonOption,
    PasskeyOption,
    ReasonOption,
    WideOption,
    YesOption,
    call,
    confirm,
    credential_life_s,
    duration_s,
    identity,
    run,
    signer,
    signs_on_page,
    wants_json,
)
from ringfence.cli.shared.output import note, print_fields, print_json, print_table, until, visible
from ringfence.cli.shared.tables import ids, state
from ringfence.client.errors import InvalidCallError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.text import span
from ringfence.messages.base import Permission

if TYPE_CHECKING:
    from ringfence.client.admin.command_client import Accepted
    from ringfence.client.approvals.grants import Proposal
    from ringfence.client.approvals.history_comparison import PendingApproval

GrantArgument = Annotated[
    str, typer.Argument(metavar="GRANT", callback=check_id_prefix, help="The grant's id, or how it begins.")
]


def grant(
    task: Annotated[
        str | None,
        typer.Argument(metavar="[TASK]", callback=check_id_prefix, help="The task's id, or how it begins."),
    ] = None,
    allow: AllowOption = None,
    like: Annotated[
        str | None,
        typer.Option(
            "--like",
            metavar="REQUEST",
            callback=check_id_prefix,
            help="What this request that waits is for, instead of TASK.",
        ),
    ] = None,
    count: Annotated[
        int, typer.Option("--count", metavar="NUMBER", min=1, max=1000, help="For how many credentials.")
    ] = 1,
    lasts: Annotated[
        str,
        typer.Option("--for", metavar="DURATION", help="How long it is valid: 90s, 15m, 1h30m; at most 12h."),
    ] = "1h",
    ttl: Annotated[
        str | None,
        typer.Option("--ttl", metavar="DURATION", help="How long each credential may live at most."),
    ] = None,
    delivery: Annotated[
        Literal["agent", "gateway"] | None,
        typer.Option("--delivery", help="To whom credentials go; as the target says, if not given."),
    ] = None,
    comment: Annotated[str | None, typer.Option("--comment", help="Stands in the trail.")] = None,
    yes: YesOption = False,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Approve ahead: so many credentials within a task, until then, without being asked for each.

    It counts for nothing once agent, user, task, target or policy change, or when it is taken back.
    """
    if (task is None) == (like is None):
        raise typer.BadParameter("name a task, or a request that waits with --like", param_hint="TASK")
    if like and (allow or ttl or delivery):
        raise typer.BadParameter(
            "the request says it; give neither --allow, --ttl nor --delivery", param_hint="--like"
        )
    if like and yes:
        require_whole_id(
            like, "with --yes nobody looks at what it finds, so name the request by its whole id", of="--like"
        )
    who = signer(me, passkey, as_user)
    scope, lasts_s = parse_scope(allow, may_be_empty=like is not None), duration_s(lasts)
    ttl_s = credential_life_s(ttl) if ttl else None

    async def asked(request: str) -> PendingApproval:
        async with connect.sponsor(who) as sponsor:
            waiting = {one.request_id: one for one in sponsor.pending(everyone=True)}
            known = {id: f"{one.agent}, on behalf of {one.on_behalf_of}" for id, one in waiting.items()}
            return waiting[only_one("open request", request, known)]

    async def look() -> Proposal:
        terms: dict[str, Any] = {
            "task_id": await whole_id("task", task, who) if task else "",
            "scope": scope,
            "ttl_s": ttl_s,
            "delivery": delivery,
        }
        if like is not None:
            one = await asked(like)
            terms = {"task_id": one.task_id, "scope": one.scope, "ttl_s": one.ttl_s, "delivery": one.delivery}
        async with connect.grantor(who) as grantor:
            proposal = await grantor.propose(**terms, count=count, lasts_s=lasts_s, comment=comment)
            if not proposal.mine:
                raise InvalidCallError(
                    f"{grantor.id} can approve nothing of agent {proposal.grant.agent_id} in this task: the grant "
                    "would count for nothing"
                )
            return proposal

    async def give(proposal: Proposal) -> Accepted:
        async with connect.grantor(who) as grantor:
            return await grantor.give(proposal)

    proposal = run(look())
    if not wants_json(as_json):
        _print_proposal(proposal)
    confirm("Approve this ahead?", yes or signs_on_page(who))
    accepted = run(give(proposal))
    sentence = f"{count} credential{'s are' if count > 1 else ' is'} approved ahead"
    print_accepted(accepted, sentence, wants_json(as_json), grant_id=accepted.result or "")


def grants(wide: WideOption = False, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """List what was approved ahead, and how much of it was used."""

    found, now_s = call(ReadApi(identity(me)), lambda api: api.grants()), time.time()
    if wants_json(as_json):
        print_json(found)
        return
    print_table(
        [ids("grant"), state("status"), "used", "agent", "by", "ends", "scope"],
        (
            (
                one["grant_id"],
                one["status"],
                f"{one['used']} of {one['count']}",
                one["agent_id"],
                one["by"],
                until(one["ends_at"], now_s),
                show_scope(Permission.model_validate(item, strict=False) for item in one["scope"]),
            )
            for one in found
        ),
        empty="nothing was approved ahead",
        wide=wide,
    )


def withdraw(
    grant_id: GrantArgument,
    reason: ReasonOption,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Withdraw a grant: nothing more is issued on it. Leases that were issued on it live on to their end."""

    who = signer(me, passkey, as_user)

    async def work() -> tuple[str, Accepted]:
        async with connect.grantor(who) as grantor:
            whole = grant_id
            if not is_whole(grant_id) and not signs_on_page(who):
                known = {
                    str(one["grant_id"]): f"grant for {one['agent_id']}" for one in await grantor.grants()
                }
                whole = only_one("grant", grant_id, known)
            return whole, await grantor.withdraw(whole, reason=reason)

    whole, accepted = run(work())
    print_accepted(accepted, f"taken back: {whole}", wants_json(as_json))


def _print_proposal(proposal: Proposal) -> None:
    grant = proposal.grant
    print_fields(
        {
            "agent": f"{grant.agent_id} ({visible(proposal.agent_description)})",
            "task": visible(proposal.purpose),
            "on behalf of": proposal.on_behalf_of,
            "target": f"{grant.scope[0].target} ({visible(proposal.target_description)})",
            "may have": show_scope(grant.scope),
            "of which it may use": show_scope(proposal.effective),
            "credentials": f"{grant.count}, each for {span(grant.ttl_s)} at most",
            "until": until(grant.exp, time.time()),
            "approves as": ", ".join(proposal.mine),
        },
        title="an approval given ahead",
    )
    if not proposal.effective:
        note(
            "nothing of it is within task, ceiling and entitlements as they are: no credential would come of it"
        )


def add_to(app: typer.Typer) -> None:
    for command in (grant, grants, withdraw):
        app.command()(command)
