"""`ringfence audit who`: who could reach a target, and who acted there.

`ringfence audit coverage`: how much of what agents received and did can be traced to a human.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringfence.cli.shared.arguments import check_target_id
from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    SinceOption,
    WideOption,
    duration_s,
    identity,
    run,
    span_ms,
    wants_json,
)
from ringfence.cli.shared.output import moment, note, print_json, print_table, say
from ringfence.cli.shared.progress import counting
from ringfence.cli.shared.tables import Column, ids, prose
from ringfence.client.errors import ApiError, InvalidCallError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.text import Lines, did_you_mean, span

if TYPE_CHECKING:
    from ringfence.client.reports.access_report import AccessReport, Coverage, Ratio

_SHARES = {
    "agents_sponsored": "agents with a live sponsor, now",
    "agents_known": "agents seen that the inventory knows",
    "leases_traced": "leases that lead back to a human",
    "actions_traced": "actions that lead back to a human",
    "leases_short_lived": "leases that were short-lived",
    "leases_task_bound": "leases that were bound to a task",
    "leases_short_lived_and_task_bound": "leases that were both",
}
_SURVEY = (
    "for comparison, in a survey of 2026 (Cloud Security Alliance): 18 % are highly confident that their IAM can "
    "manage agents, 21 % keep an inventory in real time, 28 % can trace an agent's actions to a human everywhere"
)


def coverage(
    since: SinceOption = "30d",
    until: Annotated[
        str | None, typer.Option("--until", metavar="WHEN", help="Until when, in the same way; until now.")
    ] = None,
    short_lived: Annotated[
        str, typer.Option("--short-lived", metavar="DURATION", help="The longest life that is short.")
    ] = "1h",
    show: Annotated[
        int,
        typer.Option(
            "--show", metavar="NUMBER", min=0, max=1000, help="How many to list of those that count against."
        ),
    ] = 20,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say which share of agents, leases and actions somebody answers for, over a period; nothing of nothing is "none".

    Agents with a live sponsor: of those that are not decommissioned, those whose sponsor is active and has the role; as
    of now, whatever the period. Agents seen: those that got a lease or acted, and those of them with a verified record.

    Leases: those issued in the period. A lease leads back to a human if audit verified the issuer's record, the
    decision that it names with the agent's request inside, the task's record and the user's record, and they agree. It
    is short-lived if it lives no longer than --short-lived. It is bound to a task if it ends with its task or before.

    Actions: those that gateways forwarded in the period, also in observe mode. An action leads back to a human if it
    used a lease of its agent that does, before the lease's deadline.

    Standing privileges: leases that are not both, or whose end is not known 5 minutes after their deadline. The aim is
    0. Operators and auditors see all, sponsors what concerns their agents.
    """
    from ringfence.client.reports.access_report import coverage_report

    now_ms = int(time.time() * 1000)
    since_ms, until_ms = span_ms(since, until, now_ms)

    async def work() -> Coverage:
        async with ReadApi(identity(me)) as api:
            with counting("counting leases and actions", as_json=as_json) as progress:
                return await coverage_report(
                    api, since_ms, until_ms, progress, short_s=duration_s(short_lived), show=show
                )

    report = run(work())
    if wants_json(as_json):
        print_json(report.as_json())
    else:
        _print_coverage(report)
    for gap in report.gaps:
        note(f"incomplete: {gap}", "warning")


def _print_coverage(report: Coverage) -> None:
    say(f"from {moment(report.since_ms / 1000)} until {moment(report.until_ms / 1000)}:")
    rows = [(_SHARES[name], *_ratio_cells(share)) for name, share in report.shares.items()]
    standing = report.sums.get("standing", 0)
    rows.append(
        ("standing privileges (the aim is 0)", str(standing), f"short-lived is {span(report.short_s)}")
    )
    print_table(["what", "share", "of"], rows, empty="")
    unknown = sorted(name or "(not named)" for name, known in report.agents_seen.items() if not known)
    if unknown:
        say(f"agents that the inventory does not know: {', '.join(unknown[:20])}", "warning")
    sums = report.sums
    missing = sum(sums.get(what, 0) - sums.get(f"{what}_traced", 0) for what in ("leases", "actions"))
    _print_listed("does not lead back to a human:", report.not_traced, missing)
    _print_listed("standing privileges:", report.standing, standing)
    say(_SURVEY, "aside")


def _ratio_cells(share: Ratio | None) -> tuple[str, str]:
    if share is None:
        return "?", ""
    percent = share.percent()
    return ("none" if percent is None else f"{percent:.1f} %"), f"{share.part} of {share.whole}"


def _print_listed(title: str, found: Sequence[Mapping[str, Any]], total: int) -> None:
    if not total:
        return
    say(title, "heading")
    print_table(
        [ids("lease or action"), "when", "agent", "target", prose("why")],
        map(_item_row, found),
        empty="(--show lists some)",
    )
    if 0 < len(found) < total:
        say(f"and {total - len(found)} more: --show lists more of them")


def _item_row(one: Mapping[str, Any]) -> tuple[str, ...]:
    item_id = one["action"] or one["lease"] or ""
    return item_id, moment(one["at_ms"] / 1000), one["agent"] or "unknown", one["target"] or "", one["why"]


_COULD: Sequence[str | Column] = (
    "agent", "on behalf of", "sponsor", "until", ids("task"), "ceiling by", prose("may"), prose("assigned"),
)  # fmt: skip
_DID: Sequence[str | Column] = (
    ids("trace"), "agent", "on behalf of", "sponsor", "allowed", "denied", "observed", "credentials", "first", "last",
)  # fmt: skip


def who(
    target: Annotated[
        str,
        typer.Option(
            "--target", metavar="TARGET", callback=check_target_id, help="The target that it is about."
        ),
    ],
    verb: Annotated[str | None, typer.Option("--verb", metavar="VERB", help="Only this verb.")] = None,
    resource: Annotated[
        str | None,
        typer.Option("--resource", metavar="RESOURCE", help="Only this resource, or what these globs share."),
    ] = None,
    since: SinceOption = "30d",
    until: Annotated[
        str | None, typer.Option("--until", metavar="WHEN", help="Until when, in the same way; until now.")
    ] = None,
    wide: WideOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Say who could reach a target now, by whose leave, and who did something there in a period, for whom.

    Could: agents whose ceiling allows it; each with the running tasks in which task, ceilings and the entitlements of
    the user it is for all allow it. Policy may still deny it, or ask for approval.

    Did: agents that held a credential for it in the period, or asked a gateway for something there. Operators and
    auditors see all, sponsors what concerns their agents, others what was on their behalf.
    """
    from ringfence.client.reports.access_report import access_report

    since_ms, until_ms = span_ms(since, until, int(time.time() * 1000))

    async def work() -> AccessReport:
        async with ReadApi(identity(me)) as api:
            with counting("reading who did something", as_json=as_json) as progress:
                return await access_report(
                    api, target, since_ms, until_ms, progress, verb=verb, resource=resource
                )

    report = run(work())
    if report.exists is False and not report.could and not report.did:
        # It never existed, as far as the caller may see. A target that was removed still has what was done there.
        near = run(_nearest_target(identity(me), target))
        raise InvalidCallError(f"there is no target {target}{near}; see: ringfence target list")
    if wants_json(as_json):
        print_json(report.as_json())
    else:
        _print_access_report(report, wide=wide)
    for gap in report.gaps:
        note(f"not known: {gap}", "warning")


async def _nearest_target(me: Path | None, target: str) -> str:
    """Return `; did you mean NAME?` for the closest target, or an empty string."""
    async with ReadApi(me) as api:
        try:
            return did_you_mean(target, [one["id"] for one in await api.records("target")])
        except ApiError:
            return ""


def _print_access_report(report: AccessReport, *, wide: bool) -> None:
    if report.could is not None:
        say(f"could, now: {sum(agent['now'] for agent in report.could)} of these agents", "heading")
        print_table(
            _COULD,
            (row for agent in report.could for row in _could_rows(agent)),
            empty=f"no agent that you may see may ever reach it at {report.target}",
            wide=wide,
        )
    say(f"did, from {moment(report.since_ms / 1000)} until {moment(report.until_ms / 1000)}:", "heading")
    print_table(
        _DID,
        (_did_row(line) for line in report.rows()),
        empty="nobody, as far as you may see",
        wide=wide,
    )


def _could_rows(agent: Mapping[str, Any]) -> Iterator[tuple[str, ...]]:
    sponsor = agent["sponsor"] + ("" if agent["sponsor_is"] == "live" else f" ({agent['sponsor_is']})")
    name = agent["id"] + ("" if agent["status"] == "active" else f" ({agent['status']})")
    by = agent["ceiling_by"]
    leave = f"{by['by'].rpartition('/')[2]}, {moment(by['at_ms'] / 1000)[:10]}" if by else ""
    if not agent["tasks"]:
        yield (
            name,
            "nobody now",
            sponsor,
            "",
            "",
            leave,
            f"with a task: {'; '.join(_scope_lines(agent['ceiling']))}",
            "",
        )
    for task in agent["tasks"]:
        behalf = f"{task['on_behalf_of']} (entitled by {task['entitlements_by']})"
        may = [*_scope_lines(task["scope"])]
        if task["approvals"]:
            may.append(f"once approved: {', '.join(task['approvals'])}")
        if task["against"]:
            may.append(f"not now: {'; '.join(task['against'])}")
        by_whom = f"by {task['assigned_by']}"
        if task["handed_on_by"]:
            by_whom += f", handed on by {', '.join(task['handed_on_by'])}"
        by_whom += f": {task['purpose']}"
        yield name, behalf, sponsor, moment(task["not_after"]), task["id"], leave, Lines(may), by_whom


def _did_row(line: Mapping[str, Any]) -> tuple[str, ...]:
    principals = (line[name] or "unknown" for name in ("agent", "on_behalf_of", "sponsor"))
    counts = (str(line[name]) if line[name] else "" for name in ("allowed", "denied", "observed", "leases"))
    times = (moment(line[name] / 1000) for name in ("first_ms", "last_ms"))
    return (line["lease"] or "", *principals, *counts, *times)


def _scope_lines(scope: list[dict[str, Any]]) -> list[str]:
    return [f"{', '.join(one['verbs'])} on {', '.join(one['resources'])}" for one in scope]
