"""`ringfence proposal`: widening commands that wait for a second person."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringfence.cli.shared import connect
from ringfence.cli.shared.changes import (
    ceiling_findings,
    ceiling_lines,
    combinations_of,
    note_field,
    usage_of,
)
from ringfence.cli.shared.command_results import print_accepted
from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    WideOption,
    YesOption,
    call,
    confirm,
    identity,
    run,
    wants_json,
)
from ringfence.cli.shared.output import print_fields, print_json, print_table, until
from ringfence.cli.shared.tables import ids, state
from ringfence.client.errors import InvalidCallError
from ringfence.client.reports.read_api import ReadApi
from ringfence.messages.registry import MAX_SECONDED, AgentRegister, AgentSetCeiling, AgentState

if TYPE_CHECKING:
    from pathlib import Path

    from ringfence.client.admin.proposals import ProposedCommand
    from ringfence.model.records.directory import Directory

app = typer.Typer(
    help="Changes that give somebody more, and wait for a second person: list, show, second, withdraw.",
    no_args_is_help=True,
)
_SHOWN = 12
_MIN_PREFIX = 6
ProposalArgument = Annotated[
    str, typer.Argument(metavar="PROPOSAL", help="The proposal's id, or how it begins.")
]


@app.command("list")
def list_proposals(
    all_of_them: Annotated[
        bool, typer.Option("--all", help="Also those of the last day that no longer wait.")
    ] = False,
    wide: WideOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """List changes that wait for a second person, and who may second each."""

    listed = call(ReadApi(identity(me)), lambda api: api.proposals(all=all_of_them))
    if wants_json(as_json):
        print_json(listed)
        return
    rows = (
        (
            one["id"] if wide else one["id"][:_SHOWN],
            one["status"],
            one["typ"],
            one["subject"],
            one["author"],
            _ends_in(one) if one["status"] == "open" else "",
            ", ".join(one["may_second"]) or ("nobody" if one["status"] == "open" else ""),
        )
        for one in listed
    )
    columns = (
        ids("proposal"),
        state("status"),
        "command",
        "subject",
        "author",
        "until",
        "who may second it",
    )
    print_table(columns, rows, empty="no change waits for a second person", wide=wide)


@app.command()
def show(proposal: ProposalArgument, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """Show one change that waits: what it gives, beside what there is now."""
    from ringfence.client.admin.proposals import state_as_json

    ((listed, found),) = run(_found([proposal], identity(me)))
    if wants_json(as_json):
        wanted = found.command.model_dump(mode="json", exclude_none=True)
        states = {"now": state_as_json(found.now), "then": state_as_json(found.then)}
        print_json({**listed, **states, "wanted": wanted})
    else:
        _print(listed, found)


@app.command()
def second(
    proposals: Annotated[
        list[str],
        typer.Argument(
            metavar="PROPOSAL...",
            help=f"The proposals' ids, or how each begins. Of users and keys up to {MAX_SECONDED} at once: all take "
            "effect, or none.",
        ),
    ],
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Second other people's changes, which take effect then. As somebody whom `proposal list` names."""
    who = identity(me)
    seconded = run(_found(proposals, who))
    for listed, found in seconded:
        if not (yes and wants_json(as_json)):
            _print(listed, found, to_people=True)
    if stale := [
        listed["id"] for listed, found in seconded if listed["status"] == "open" and found.then is None
    ]:
        raise InvalidCallError(
            f"the subject of {', '.join(one[:_SHOWN] for one in stale)} has changed, and the command no longer "
            "fits it: propose it anew"
        )
    what = ", ".join(dict.fromkeys(f"{found.command.typ} by {found.author}" for _, found in seconded))
    confirm(f"second {f'these {len(seconded)} changes' if seconded[1:] else 'this'} ({what})?", yes)

    accepted = connect.administer(who, lambda person: person.second(*(found for _, found in seconded)))
    changed = ", ".join(f"{found.kind} {found.id}" for _, found in seconded)
    authors = ", ".join(dict.fromkeys(found.author for _, found in seconded))
    sentence = f"{changed} {'are' if seconded[1:] else 'is'} changed, by {authors} and you"
    print_accepted(accepted, sentence, wants_json(as_json))


@app.command()
def withdraw(proposal: ProposalArgument, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """Withdraw an own change that waits."""
    who = identity(me)
    ((listed, found),) = run(_found([proposal], who))

    accepted = connect.administer(who, lambda person: person.withdraw(found.digest))
    print_accepted(accepted, f"{listed['typ']} of {found.kind} {found.id} is withdrawn", wants_json(as_json))


async def _found(texts: Sequence[str], who: Path | None) -> list[tuple[dict[str, Any], ProposedCommand]]:
    """Return the proposals whose ids begin so: each as listed, and verified."""
    from ringfence.client.admin.proposals import read_proposal

    if len(texts) > MAX_SECONDED:
        raise InvalidCallError(
            f"{len(texts)} proposals; one signature seconds at most {MAX_SECONDED}: take several"
        )
    async with ReadApi(who) as api:
        every = await api.proposals(all=True)
        listed = [_one_of(every, text) for text in texts]
        for one in listed:
            kind, _, id = one["subject"].partition(" ")
            one["usage"] = await usage_of(api, id) if kind == "agent" else None
    async with connect.administrator(who) as administrator:
        directory = await administrator.connection.current_directory()
        found = [read_proposal(directory, one) for one in listed]
        async with ReadApi(who) as api:
            for one, proposed in zip(listed, found, strict=True):
                one["findings"] = await _findings(api, directory, proposed)
    if [one.digest for one in found] != [one["id"] for one in listed]:
        raise InvalidCallError("the registry lists another command under this id; ask its operator")
    if len({one.digest for one in found}) < len(found):
        raise InvalidCallError("a proposal is given twice")
    return list(zip(listed, found, strict=True))


async def _findings(api: ReadApi, directory: Directory, found: ProposedCommand) -> dict[str, str]:
    """Return what speaks against the ceiling that a proposal sets; nothing of another proposal."""
    if not isinstance(found.command, AgentRegister | AgentSetCeiling):
        return {}
    people = {found.author, *(one.sponsor for one in (found.then, found.now) if isinstance(one, AgentState))}
    combinations = await combinations_of(api, found.command.ceiling)
    return dict(ceiling_findings(combinations, directory, people, int(time.time() * 1000)))


def _one_of(every: Sequence[dict[str, Any]], text: str) -> dict[str, Any]:
    if len(text) < _MIN_PREFIX:
        raise InvalidCallError(
            f"give at least {_MIN_PREFIX} characters of the id; see: ringfence proposal list"
        )
    fitting = [one for one in every if one["id"].startswith(text)]
    if len(fitting) != 1:
        how_many = "no proposal" if not fitting else f"{len(fitting)} proposals"
        raise InvalidCallError(
            f"{how_many} that you may see begins with {text}; see: ringfence proposal list"
        )
    return fitting[0]


def _ends_in(listed: dict[str, Any]) -> str:
    return until(listed["ends_at_ms"] / 1000, time.time())


def _print(listed: dict[str, Any], found: ProposedCommand, *, to_people: bool = False) -> None:
    fields = {
        "command": found.command.typ,
        "of": f"{found.kind} {found.id}",
        "author": found.author,
        "status": listed["status"],
        "until": _ends_in(listed),
        "who may second it": ", ".join(listed["may_second"]) or "nobody",
    }
    if reason := getattr(found.command, "reason", None):
        fields["reason"] = reason
    for name, (before, after) in (found.changes() if found.then is not None else {}).items():
        fields[f"{name} now"] = json.dumps(before, ensure_ascii=False)
        fields[f"{name} then"] = json.dumps(after, ensure_ascii=False)
    if isinstance(found.command, AgentRegister | AgentSetCeiling):
        former = found.now.ceiling if isinstance(found.now, AgentState) else ()
        fields["whole ceiling then"] = ceiling_lines(found.command.ceiling, former, listed["usage"])
    fields |= listed["findings"]
    if to_people:
        for name, value in fields.items():
            note_field(name, value)
    else:
        print_fields(fields, title=f"proposal {found.digest[:_SHOWN]}")
