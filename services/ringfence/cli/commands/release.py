"""`ringfence release`: an agent releases a credential."""

from __future__ import annotations

from typing import Annotated

import typer

from ringfence.cli.shared import connect
from ringfence.cli.shared.id_lookup import check_whole_id
from ringfence.cli.shared.options import (
    AgentOption,
    AttestOption,
    IdentityOption,
    JsonOption,
    identity,
    run,
    wants_json,
)
from ringfence.cli.shared.output import print_json, say


def release(
    lease: Annotated[
        str, typer.Argument(metavar="LEASE", callback=check_whole_id, help="The lease's whole id.")
    ],
    reason: Annotated[
        str, typer.Option("--reason", help="Why; it is kept in the trail.")
    ] = "no longer needed",
    no_wait: Annotated[
        bool,
        typer.Option("--no-wait", help="Return once Kafka holds the release, before the revoker's answer."),
    ] = False,
    attest: AttestOption = None,
    agent_id: AgentOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give a credential back before its time. As the agent that holds it."""
    from ringfence.client.admin.command_client import TIMEOUT_S

    async def work() -> None:
        async with connect.agent(identity(me), attest=attest, agent_id=agent_id) as agent:
            await agent.release(lease, reason=reason, timeout_s=None if no_wait else TIMEOUT_S)

    run(work())
    if wants_json(as_json):
        print_json({"lease_id": lease, "released": not no_wait, "confirmed": not no_wait})
    elif no_wait:
        say(f"the release of lease {lease} is on Kafka; whether it ended: ringfence audit trace {lease}")
    else:
        say(f"lease {lease} released")
