"""`ringfence break-glass`: uses of break glass, and their reviews."""

from __future__ import annotations

from typing import Annotated

import typer

from ringfence.cli.shared.arguments import check_id_prefix, show_scope
from ringfence.cli.shared.options import (
    AsOption,
    IdentityOption,
    JsonOption,
    PasskeyOption,
    WideOption,
    identity,
    run,
    signer,
    wants_json,
)
from ringfence.cli.shared.output import moment, print_json, print_table, say
from ringfence.cli.shared.tables import ids, prose
from ringfence.messages.base import Permission

app = typer.Typer(help="What two operators allowed against policy; review it.", no_args_is_help=True)


@app.command(name="list")
def list_uses(
    unreviewed: Annotated[bool, typer.Option("--unreviewed", help="Only uses without a review.")] = False,
    wide: WideOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """List the uses of break glass: who allowed what, for whom, against which denials; and who reviewed it."""
    from ringfence.client.approvals.grants import uses_of_break_glass

    uses = run(uses_of_break_glass(identity(me), unreviewed=unreviewed))
    if wants_json(as_json):
        print_json(uses)
        return
    print_table(
        [
            ids("request"),
            "at",
            "agent",
            "for",
            "allowed",
            "by",
            prose("against"),
            prose("its reason"),
            prose("review"),
        ],
        (
            (
                str(use["request_id"]),
                moment(use["at_ms"] / 1000),
                str(use["agent"]),
                str(use["on_behalf_of"]),
                show_scope(
                    tuple(Permission.model_validate(p, strict=False) for p in use["permissions"] or ())
                ),
                ", ".join(use["approvers"]),
                "; ".join(str(reason["message"]) for reason in use["denials"]),
                str(use["reason"] or ""),
                f"{use['review']['by']}: {use['review']['note']}" if use["review"] else "none yet",
            )
            for use in uses
        ),
        empty="every use of break glass has its review" if unreviewed else "break glass was never used",
        wide=wide,
    )


@app.command()
def review(
    request: Annotated[
        str,
        typer.Argument(
            metavar="REQUEST",
            callback=check_id_prefix,
            help="The request's id, or how it begins: four characters or more.",
        ),
    ],
    note: Annotated[str, typer.Option("--note", help="What you found; it is kept in the trail.")],
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign a review of one use, as an operator or auditor who had no part in it."""
    from ringfence.client.approvals.grants import review_break_glass

    use = run(review_break_glass(request, note, signer(me, passkey, as_user)))
    if wants_json(as_json):
        print_json(use)
    else:
        say(f"reviewed: request {use['request_id']} of agent {use['agent']}")
