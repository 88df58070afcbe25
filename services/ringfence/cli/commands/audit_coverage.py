"""`ringfence audit coverage`: how much of what agents received and did can be traced to a human."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    duration_s,
    identity,
    run,
    span_ms,
    wants_json,
)
from ringfence.cli.shared.output import moment, note, print_json, print_table, say, span
from ringfence.cli.shared.progress import counting
from ringfence.cli.shared.tables import ids, prose
from ringfence.client.reports.read_api import ReadApi

if TYPE_CHECKING:
    from ringfence.client.reports.access_report import Coverage, Ratio

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
    since: Annotated[
        str,
        typer.Option(
            "--since", metavar="WHEN", help="From when: a duration ago, or a moment. Audit keeps 365 days."
        ),
    ] = "30d",
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
