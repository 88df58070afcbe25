"""`ringfence revoke`: end one lease, or all that one condition covers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import check_id_prefix, check_name, check_target_id
from ringfence.cli.shared.command_results import print_accepted
from ringfence.cli.shared.id_lookup import whole_id
from ringfence.cli.shared.options import (
    AsOption,
    IdentityOption,
    JsonOption,
    PasskeyOption,
    ReasonOption,
    YesOption,
    confirm,
    run,
    signer,
    signs_on_page,
    wants_json,
)

if TYPE_CHECKING:
    from ringfence.client.admin.command_client import Accepted

_ENDS_WITHIN_S = 60.0
"""The answer comes when all leases have ended, which takes so long for some ten thousand. They are refused long
before.
"""


def revoke(
    reason: ReasonOption,
    lease: Annotated[
        str | None, typer.Option("--lease", metavar="LEASE", callback=check_id_prefix, help="This one lease.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            metavar="TASK",
            callback=check_id_prefix,
            help="All leases of a task. More can be asked for until: ringfence task end TASK.",
        ),
    ] = None,
    agent: Annotated[
        str | None,
        typer.Option(
            "--agent",
            metavar="AGENT",
            callback=check_name,
            help="All of an agent. It may ask again until: ringfence agent suspend AGENT.",
        ),
    ] = None,
    sponsor: Annotated[
        str | None, typer.Option("--sponsor", metavar="USER", callback=check_name, help="All of a sponsor.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", metavar="TARGET", callback=check_target_id, help="All for a target."),
    ] = None,
    user: Annotated[
        str | None,
        typer.Option("--user", metavar="USER", callback=check_name, help="All on behalf of a user."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="All leases that there are.")] = False,
    yes: YesOption = False,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Revoke: name exactly one thing. Covers every lease whose request was made before.

    As the agent's sponsor, or an operator. Nothing more is issued on those requests, and the credentials are cut first.
    Agents may ask again at once, with new requests. What stops that is another command, which the answer names: agent
    suspend, task end, target remove, user disable.
    """
    from ringfence.client.admin.command_client import TIMEOUT_S

    named = [
        value
        for value in (lease, task, agent, sponsor, target, user, everything or None)
        if value is not None
    ]
    if len(named) != 1:
        raise typer.BadParameter(
            "name exactly one of --lease, --task, --agent, --sponsor, --target, --user, --all"
        )
    who = signer(me, passkey, as_user)
    if everything:
        confirm("Revoke every lease of every agent?", yes or signs_on_page(who))

    async def work() -> Accepted:
        nonlocal lease, task
        lease = await whole_id("lease", lease, who) if lease else None
        task = await whole_id("task", task, who) if task else None
        wait_s = TIMEOUT_S if lease else _ENDS_WITHIN_S
        async with connect.administrator(who, timeout_s=wait_s) as administrator:
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
    again, stop = _stop_command(lease, task, agent, sponsor, target, user)
    print_accepted(
        accepted,
        f"revoked: {count} lease{'' if count == '1' else 's'} ended; {again}. To stop that: {stop}",
        wants_json(as_json),
        {"may_ask_again": True, "stop_with": stop},
    )


def _stop_command(
    lease: str | None,
    task: str | None,
    agent: str | None,
    sponsor: str | None,
    target: str | None,
    user: str | None,
) -> tuple[str, str]:
    """Return who may request again after such a revocation, and the command that stops them."""
    if agent:
        return f"agent {agent} may ask again", f"ringfence agent suspend {agent} --reason REASON"
    if task:
        return (
            "the task goes on, and more may be asked for in it",
            f"ringfence task end {task} --reason REASON",
        )
    if target:
        return "agents may ask for it again", f"ringfence target remove {target} --reason REASON"
    if user:
        return f"more may be asked for on behalf of {user}", f"ringfence user disable {user} --reason REASON"
    each = "ringfence agent suspend AGENT --reason REASON"
    if sponsor:
        return (
            f"the agents of {sponsor} may ask again",
            f"{each}, for each that `ringfence inventory --sponsor {sponsor}` lists",
        )
    if lease:
        return (
            "its agent may ask for another",
            f"{each}, for the agent that `ringfence lease show {lease}` names",
        )
    return "every agent may ask again", f"{each}, for each that `ringfence inventory` lists"
