"""`ringfence revoke`: end one lease, or all that a condition covers."""

from __future__ import annotations

from typing import Annotated

import typer

from ringfence.cli.ids import a_name, a_target, a_uuid
from ringfence.cli.options import (
    IdentityOption,
    JsonOption,
    ReasonOption,
    YesOption,
    confirm,
    identity,
    run,
    wants_json,
)
from ringfence.cli.outcome import print_accepted
from ringfence.client.administrator import Administrator
from ringfence.client.outcomes import Accepted
from ringfence.client.signatory import TIMEOUT_S

_ENDS_WITHIN_S = 60.0
"""The answer comes when all has ended; so long some ten thousand leases may take. They are refused long before."""


def revoke(
    reason: ReasonOption,
    lease: Annotated[
        str | None, typer.Option("--lease", metavar="LEASE", callback=a_uuid, help="This one lease.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", metavar="TASK", callback=a_uuid, help="All leases of a task.")
    ] = None,
    agent: Annotated[
        str | None, typer.Option("--agent", metavar="AGENT", callback=a_name, help="All of an agent.")
    ] = None,
    sponsor: Annotated[
        str | None, typer.Option("--sponsor", metavar="USER", callback=a_name, help="All of a sponsor.")
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", metavar="TARGET", callback=a_target, help="All for a target.")
    ] = None,
    user: Annotated[
        str | None, typer.Option("--user", metavar="USER", callback=a_name, help="All on behalf of a user.")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All leases that there are.")] = False,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke: name exactly one thing. Covers every lease whose request was made before.

    As the agent's sponsor, or an operator. Nothing more is issued behind it, and the credentials are cut first.
    """
    named = [
        value
        for value in (lease, task, agent, sponsor, target, user, everything or None)
        if value is not None
    ]
    if len(named) != 1:
        raise typer.BadParameter(
            "name exactly one of --lease, --task, --agent, --sponsor, --target, --user, --all"
        )
    if everything:
        confirm("Revoke every lease of every agent?", yes)

    async def work() -> Accepted:
        wait_s = TIMEOUT_S if lease else _ENDS_WITHIN_S
        async with Administrator.connect(identity(me), timeout_s=wait_s) as administrator:
            return await administrator.revoke(
                reason=reason,
                lease_id=lease,
                task_id=task,
                agent_id=agent,
                sponsor=sponsor,
                target_id=target,
                user_id=user,
                all=everything,
            )

    accepted = run(work())
    count = accepted.result or "?"
    print_accepted(
        accepted, f"revoked: {count} lease{'' if count == '1' else 's'} ended", wants_json(as_json)
    )
