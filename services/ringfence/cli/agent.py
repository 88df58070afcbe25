"""`ringfence agent`: agents from registration to their end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ringfence.cli.attestation import SelectorOption, parse_selectors, set_attestation
from ringfence.cli.ids import a_name
from ringfence.cli.options import (
    AllowOption,
    IdentityOption,
    JsonOption,
    KeyDaysOption,
    NewKeyOption,
    PublicKeyOption,
    ReasonOption,
    YesOption,
    confirm,
    duration_s,
    identity,
    kept_if_accepted,
    key_records,
    run,
    settings,
    wants_json,
)
from ringfence.cli.outcome import print_accepted, warn_of_unknown
from ringfence.cli.output import note, print_json
from ringfence.cli.records import list_records, print_record
from ringfence.cli.scopes import parse_scope
from ringfence.cli.usage import print_usage, set_ceiling_command
from ringfence.client.administrator import Administrator
from ringfence.client.api import ReadApi
from ringfence.client.errors import ApiError
from ringfence.client.outcomes import Accepted
from ringfence.messages.keys import KeyRecord
from ringfence.model.identity import spiffe_id

app = typer.Typer(
    help="Agents: register, ceiling, sponsor, keys, suspend, decommission.", no_args_is_help=True
)

AgentArgument = Annotated[str, typer.Argument(metavar="AGENT", callback=a_name, help="The agent's id.")]
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--key-file", metavar="FILE", help="The agent's key file; its public half is read."),
]
SponsorOption = Annotated[
    str | None, typer.Option("--sponsor", metavar="USER", callback=a_name, help="Who is accountable.")
]


@app.command()
def register(
    agent: AgentArgument,
    description: Annotated[str, typer.Option("--description", help="What it is for.")],
    allow: AllowOption = None,
    allow_nothing: Annotated[
        bool, typer.Option("--allow-nothing", help="An empty ceiling, to be raised later.")
    ] = False,
    sponsor: SponsorOption = None,
    key_file: KeyFileOption = None,
    public_key: PublicKeyOption = None,
    new_key: NewKeyOption = None,
    key_days: KeyDaysOption = 365,
    selector: SelectorOption = None,
    me: IdentityOption = None,
    inactive: Annotated[
        bool, typer.Option("--inactive", help="Issue nothing before its sponsor has activated it.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Register an agent. `--allow` is its ceiling, the most it may ever hold.

    As its sponsor; or as an operator, who names the sponsor.
    """
    if not allow and not allow_nothing:
        raise typer.BadParameter("say the ceiling with --allow, or --allow-nothing", param_hint="--allow")
    ceiling = parse_scope(allow, may_be_empty=True)
    attestation = parse_selectors(selector)
    named = key_file or public_key or new_key
    if not (named or attestation):
        raise typer.BadParameter(
            "name the agent's key: --key-file, --public-key or --new-key; or say with --selector which running "
            "instances enrol one"
        )
    keys = [_one_key(agent, key_file, public_key, new_key, key_days)] if named else []

    async def work() -> Accepted:
        async with Administrator.connect(identity(me)) as administrator:
            await warn_of_unknown(administrator, ceiling)
            return await administrator.register_agent(
                agent,
                description=description,
                keys=keys,
                ceiling=ceiling,
                sponsor=sponsor,
                attestation=attestation,
                inactive=inactive,
            )

    with kept_if_accepted(new_key):
        accepted = run(work())
    made = {"key_file": str(new_key)} if new_key else {}
    print_accepted(accepted, f"agent {agent} registered", wants_json(as_json), **made)


app.command(name="set-attestation")(set_attestation)


@app.command()
def activate(agent: AgentArgument, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """Take on an agent that was registered with --inactive. As its sponsor."""

    async def work() -> Accepted:
        async with Administrator.connect(identity(me)) as administrator:
            return await administrator.activate_agent(agent)

    print_accepted(run(work()), f"agent {agent} is active", wants_json(as_json))


@app.command(name="set-ceiling")
def set_ceiling(
    agent: AgentArgument,
    allow: AllowOption = None,
    allow_nothing: Annotated[bool, typer.Option("--allow-nothing", help="An empty ceiling.")] = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Replace the most the agent may ever hold; leases that no longer fit end. As its sponsor or an operator."""
    if bool(allow) == allow_nothing:
        raise typer.BadParameter(
            "say the whole new ceiling with --allow, or --allow-nothing", param_hint="--allow"
        )
    ceiling = parse_scope(allow, may_be_empty=True)

    async def work() -> Accepted:
        async with Administrator.connect(identity(me)) as administrator:
            await warn_of_unknown(administrator, ceiling)
            return await administrator.set_ceiling(agent, ceiling)

    print_accepted(run(work()), f"ceiling of {agent} set", wants_json(as_json))


@app.command()
def transfer(
    agent: AgentArgument,
    to: Annotated[str, typer.Option("--to", metavar="USER", callback=a_name, help="The new sponsor.")],
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make another sponsor accountable. As the present sponsor or an operator."""

    async def work() -> Accepted:
        async with Administrator.connect(identity(me)) as administrator:
            return await administrator.transfer_agent(agent, sponsor=to)

    print_accepted(run(work()), f"{to} is accountable for {agent}", wants_json(as_json))


@app.command(name="rotate-key")
def rotate_key(
    agent: AgentArgument,
    key_file: KeyFileOption = None,
    public_key: PublicKeyOption = None,
    new_key: NewKeyOption = None,
    key_days: KeyDaysOption = 365,
    overlap: Annotated[
        str | None,
        typer.Option(
            "--overlap", metavar="DURATION", help="How long the old keys count on: 0 to 7d. Default: 1h."
        ),
    ] = None,
    replaces: Annotated[
        list[str] | None,
        typer.Option(
            "--replaces",
            metavar="THUMBPRINT",
            help="Only this old key. Repeatable; all of them if not given.",
        ),
    ] = None,
    compromised: Annotated[
        bool,
        typer.Option(
            "--compromised", help="The old keys may be in other hands: they end now, and their leases too."
        ),
    ] = False,
    reason: Annotated[str | None, typer.Option("--reason", help="Why; it stands in the trail.")] = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Give the agent another key in the place of its old ones. As its sponsor or an operator.

    Leases go on, each with the key that it was asked for with. A running agent takes up the new key when the file that
    it was started with is replaced (mv NEW OLD): do that within the overlap.
    """
    if compromised and overlap:
        raise typer.BadParameter("a compromised key ends at once", param_hint="--overlap")
    overlap_s = 0 if overlap == "0" else duration_s(overlap or "1h")
    key = _one_key(agent, key_file, public_key, new_key, key_days)

    async def work() -> Accepted:
        async with Administrator.connect(identity(me)) as administrator:
            return await administrator.rotate_key(
                agent, key, overlap_s=overlap_s, replaces=replaces, compromised=compromised, reason=reason
            )

    with kept_if_accepted(new_key):
        accepted = run(work())
    made = {"key_file": str(new_key)} if new_key else {}
    ends = "end now, and their leases too" if compromised else f"count for {overlap or '1h'} yet"
    sentence = f"agent {agent} has key {key.kid}; the keys that it replaces {ends}"
    print_accepted(accepted, sentence, wants_json(as_json), kid=key.kid, **made)


@app.command()
def suspend(
    agent: AgentArgument, reason: ReasonOption, me: IdentityOption = None, as_json: JsonOption = False
) -> None:
    """Stop the agent for now: nothing is issued, its leases end. As its sponsor or an operator."""

    async def work() -> Accepted:
        async with Administrator.connect(identity(me)) as administrator:
            return await administrator.suspend_agent(agent, reason=reason)

    print_accepted(run(work()), f"agent {agent} suspended; its leases end", wants_json(as_json))


@app.command()
def resume(
    agent: AgentArgument, reason: ReasonOption, me: IdentityOption = None, as_json: JsonOption = False
) -> None:
    """Let a suspended agent go on. What an operator suspended only an operator resumes."""

    async def work() -> Accepted:
        async with Administrator.connect(identity(me)) as administrator:
            return await administrator.resume_agent(agent, reason=reason)

    print_accepted(run(work()), f"agent {agent} is active again", wants_json(as_json))


@app.command()
def decommission(
    agent: AgentArgument,
    reason: ReasonOption,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """End the agent for good: its leases end, and its name is never given again. As its sponsor or an operator."""
    confirm(f"End agent {agent} for good?", yes)

    async def work() -> Accepted:
        async with Administrator.connect(identity(me)) as administrator:
            return await administrator.decommission_agent(agent, reason=reason)

    print_accepted(run(work()), f"agent {agent} decommissioned", wants_json(as_json))


@app.command(name="list")
def list_agents(me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """List agents: a sponsor's own; all for operators and auditors."""
    list_records("agent", identity(me), wants_json(as_json))


@app.command()
def show(agent: AgentArgument, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """Show one agent: what it may hold, what it used of that in 30 days, and a narrower ceiling that would do.

    A verb is used on a day on which a credential for it was issued. The command that is proposed keeps what was used or
    is held now, and can be pasted as it is.
    """

    async def work() -> tuple[Any, Any, str | None]:
        async with ReadApi(identity(me)) as api:
            record = await api.record("agent", agent)
            try:
                return record, await api.usage(agent), None
            except ApiError as error:
                return record, None, str(error)

    record, usage, gap = run(work())
    command = set_ceiling_command(agent, usage["narrower"], identity(me)) if usage else None
    if wants_json(as_json):
        print_json({**record, "usage": usage, "set_ceiling": command})
    else:
        print_record("agent", record)
        if usage:
            print_usage(usage, command)
    if gap:
        note(f"incomplete: what it used is not known: {gap}", "yellow")


def _one_key(
    agent: str, key_file: Path | None, public_key: Path | None, new_key: Path | None, days: int
) -> KeyRecord:
    """The one key that is named, or made. Raises KeyFileError; typer.BadParameter where none or several are named."""
    if key_file and (public_key or new_key):
        raise typer.BadParameter("name one key: --key-file, --public-key or --new-key")
    id = spiffe_id(settings().trust_domain, "agent", agent)
    keys = key_records(key_file or public_key, new_key, id, days)
    if not keys:
        raise typer.BadParameter("name the agent's key: --key-file, --public-key or --new-key")
    return keys[0]
