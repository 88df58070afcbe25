"""Reports of accepted commands."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ringfence.cli.shared.output import note, print_json, say
from ringfence.client.errors import InvalidCallError
from ringfence.messages.base import Permission

if TYPE_CHECKING:
    from ringfence.client.admin.administrator import Administrator
    from ringfence.client.admin.command_client import Accepted


async def refuse_unknown(
    administrator: Administrator,
    scope: Sequence[Permission],
    anyway: bool = False,
    granted: Sequence[Permission] = (),
) -> None:
    """Refuse a scope that names unknown targets or verbs; with `anyway` only warn.

    `granted`: what was allowed before, about which nothing is repeated. Raises InvalidCallError.
    """
    problems = await _unknown(administrator, scope, granted)
    if problems and not anyway:
        said = "; ".join(problems)
        raise InvalidCallError(
            f"{said}{'' if said.endswith('?') else '.'} Correct it, have an operator add it first "
            "(ringfence target add), or add --anyway"
        )
    _warn(problems)


async def warn_of_unknown(
    administrator: Administrator, scope: Sequence[Permission], granted: Sequence[Permission] = ()
) -> None:
    """Warn of unknown targets and verbs, where a scope may well be set before they exist.

    `granted`: see `refuse_unknown`.
    """
    _warn(await _unknown(administrator, scope, granted))


async def _unknown(
    administrator: Administrator, scope: Sequence[Permission], granted: Sequence[Permission]
) -> list[str]:
    known = {(one.target, verb) for one in granted for verb in one.verbs}
    new = [
        one.model_copy(update={"verbs": verbs})
        for one in scope
        if (verbs := tuple(verb for verb in one.verbs if (one.target, verb) not in known))
    ]
    return await administrator.unknown_names(new)


def _warn(found: Sequence[str]) -> None:
    for says in found:
        note(f"warning: {says}; that part allows nothing until an operator adds it", "warning")


def print_accepted(
    accepted: Accepted,
    sentence: str,
    as_json: bool,
    document: Mapping[str, Any] = MappingProxyType({}),
    /,
    **more: str,
) -> None:
    """Print that a command was accepted, and its result. `document`: further fields for `--json`."""
    if as_json:
        print_json(
            {
                "accepted": accepted.command,
                "command_id": accepted.command_id,
                "result": accepted.result,
                "at_ms": accepted.at_ms,
                **document,
                **more,
            }
        )
        return
    say(sentence)
    for name, value in more.items():
        say(f"{name.replace('_', ' ')}: {value}")
