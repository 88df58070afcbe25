"""How commands that were accepted are reported."""

from __future__ import annotations

from ringfence.cli.output import print_json, say
from ringfence.client.outcomes import Accepted


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
