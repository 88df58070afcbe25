"""How commands that were accepted are reported."""

from __future__ import annotations

from collections.abc import Sequence

from ringfence.cli.output import note, print_json, say
from ringfence.client.administrator import Administrator
from ringfence.client.outcomes import Accepted
from ringfence.messages.permission import Permission


async def warn_of_unknown(administrator: Administrator, scope: Sequence[Permission]) -> None:
    """Say what a ceiling or an entitlement names that is not there: perhaps it is still to come, perhaps misspelt."""
    for says in await administrator.unknown_names(scope):
        note(f"warning: {says}; that part allows nothing until an operator adds it", "yellow")


def print_accepted(accepted: Accepted, sentence: str, as_json: bool, **more: str) -> None:
    """Say that a command was accepted, and what came of it."""
    if as_json:
        print_json(
            {
                "accepted": accepted.command,
                "command_id": accepted.command_id,
                "result": accepted.result,
                "at_ms": accepted.at_ms,
                **more,
            }
        )
        return
    say(sentence)
    for name, value in more.items():
        say(f"{name.replace('_', ' ')}: {value}")
