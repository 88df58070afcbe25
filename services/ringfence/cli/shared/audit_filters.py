"""Filter options that `audit tail` and `audit export` share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ringfence.cli.shared.arguments import check_id_prefix, check_name, check_target_id

if TYPE_CHECKING:
    from ringfence.client.reports.read_api import Filters

AgentFilter = Annotated[
    str | None, typer.Option("--agent", metavar="AGENT", callback=check_name, help="Only this agent.")
]
TaskFilter = Annotated[
    str | None, typer.Option("--task", metavar="TASK", callback=check_id_prefix, help="Only this task.")
]
LeaseFilter = Annotated[
    str | None, typer.Option("--lease", metavar="LEASE", callback=check_id_prefix, help="Only this lease.")
]
TargetFilter = Annotated[
    str | None, typer.Option("--target", metavar="TARGET", callback=check_target_id, help="Only this target.")
]
UserFilter = Annotated[
    str | None,
    typer.Option(
        "--on-behalf-of",
        "--user",
        metavar="USER",
        callback=check_name,
        help="Only what was on behalf of this user.",
    ),
]
SponsorFilter = Annotated[
    str | None,
    typer.Option(
        "--sponsor", metavar="USER", callback=check_name, help="Only what this sponsor answers for."
    ),
]
CodeFilter = Annotated[
    list[str] | None,
    typer.Option(
        "--code", metavar="CODE", help="Filter by event_code; action.* selects all of a kind. Repeatable."
    ),
]
StatusFilter = Annotated[
    Literal["success", "failure", "other"] | None,
    typer.Option(
        "--status",
        metavar="STATUS",
        help="Only what came to this: success, failure, or other, which is what was only asked for.",
    ),
]
SeverityFilter = Annotated[
    Literal["informational", "low", "medium", "high", "critical"] | None,
    typer.Option(
        "--severity",
        metavar="SEVERITY",
        help="Only what is at least as severe: informational, low, medium, high or critical.",
    ),
]


def filters_of(
    *,
    target: str | None,
    user: str | None,
    sponsor: str | None,
    codes: list[str] | None,
    status: str | None,
    severity: str | None,
) -> Filters:
    """Return the query for audit. Raises typer.BadParameter."""
    for code in codes or ():
        if not code or "*" in code[:-1] or "," in code:
            raise typer.BadParameter(
                f"{code!r} is no event_code; write for example action.denied, or action.* for all that begin so"
            )
    return {
        "target": target,
        "on_behalf_of": user,
        "sponsor": sponsor,
        "code": ",".join(codes) if codes else None,
        "status": status,
        "severity": severity,
    }
