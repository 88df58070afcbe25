"""`ringfence agent`: commands for agents, from registration to decommissioning."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import (
    check_name,
    parse_limits,
    parse_scope,
    show_permission,
    show_scope,
    write_permission,
)
from ringfence.cli.shared.attestation import SelectorOption, parse_selectors, set_attestation
from ringfence.cli.shared.changes import (
    Replacement,
    ceiling_findings,
    ceiling_lines,
    check_unchanged,
    combinations_of,
    note_field,
    parse_scope_options,
    usage_of,
)
from ringfence.cli.shared.command_results import print_accepted, refuse_unknown
from ringfence.cli.shared.options import (
    AddOption,
    AgentKeyDaysOption,
    AllowOption,
    AnywayOption,
    AsOption,
    ConsentValidOption,
    IdentityOption,
    JsonOption,
    LimitOption,
    NewKeyOption,
    PasskeyOption,
    PublicKeyOption,
    ReasonOption,
    RemoveOption,
    WideOption,
    YesOption,
    confirm,
    consent_life_s,
    duration_s,
    identity,
    keep_key_if_accepted,
    key_records,
    run,
    settings,
    signer,
    signs_on_page,
    wants_json,
)
from ringfence.cli.shared.output import note, print_json, print_table, say, until, visible_name
from ringfence.cli.shared.records import list_records, print_record, read_record
from ringfence.client.errors import ApiError, InvalidCallError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.text import span
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.base import KeyRecord, Permission
from ringfence.messages.registry import AgentState, AgentTransferConsent
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.scope.scope import missing

if TYPE_CHECKING:
    from ringfence.client.admin.administrator import Administrator
    from ringfence.client.admin.command_client import Accepted

app = typer.Typer(
    help="Agents: register, ceiling, sponsor, keys, suspend, decommission.", no_args_is_help=True
)

AgentArgument = Annotated[str, typer.Argument(metavar="AGENT", callback=check_name, help="The agent's id.")]
KeyFileOption = Annotated[
    Path | None,
    typer.Option("--key-file", metavar="FILE", help="The agent's key file; its public half is read."),
]
SponsorOption = Annotated[
    str | None, typer.Option("--sponsor", metavar="USER", callback=check_name, help="Who is accountable.")
]


@app.command()
def register(
    agent: AgentArgument,
    description: Annotated[str, typer.Option("--description", help="What it is for.")],
    allow: AllowOption = None,
    allow_nothing: Annotated[
        bool, typer.Option("--allow-nothing", help="An empty ceiling, to be raised later.")
    ] = False,
    limit: LimitOption = None,
    sponsor: SponsorOption = None,
    key_file: KeyFileOption = None,
    public_key: PublicKeyOption = None,
    new_key: NewKeyOption = None,
    key_days: AgentKeyDaysOption = 30,
    selector: SelectorOption = None,
    me: IdentityOption = None,
    inactive: Annotated[
        bool, typer.Option("--inactive", help="Issue nothing before its sponsor has activated it.")
    ] = False,
    anyway: AnywayOption = False,
    as_json: JsonOption = False,
) -> None:
    """Register an agent. `--allow` is its ceiling, the most it may ever hold.

    As its sponsor; or as an operator, who names the sponsor.
    """
    if not allow and not allow_nothing:
        raise typer.BadParameter("say the ceiling with --allow, or --allow-nothing", param_hint="--allow")
    ceiling, limits = parse_scope(allow, may_be_empty=True), parse_limits(limit)
    attestation = parse_selectors(selector, agent)
    key_source = key_file or public_key or new_key
    if not (key_source or attestation):
        raise typer.BadParameter(
            "name the agent's key: --key-file, --public-key or --new-key; or say with --selector which running "
            "instances enrol one"
        )
    keys = [_one_key(agent, key_file, public_key, new_key, key_days)] if key_source else []

    async def work() -> Accepted:
        async with connect.administrator(identity(me)) as administrator:
            await refuse_unknown(administrator, ceiling, anyway)
            return await administrator.register_agent(
                agent,
                description=description,
                keys=keys,
                ceiling=ceiling,
                limits=limits,
                sponsor=sponsor,
                attestation=attestation,
                inactive=inactive,
            )

    with keep_key_if_accepted(new_key):
        accepted = run(work())
    key_file_field = {"key_file": str(new_key)} if new_key else {}
    print_accepted(accepted, f"agent {agent} registered", wants_json(as_json), **key_file_field)


app.command(name="set-attestation")(set_attestation)


@app.command()
def activate(agent: AgentArgument, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """Take on an agent that was registered with --inactive. As its sponsor."""

    accepted = connect.administer(identity(me), lambda person: person.activate_agent(agent))
    print_accepted(accepted, f"agent {agent} is active", wants_json(as_json))


@app.command(name="set-ceiling")
def set_ceiling(
    agent: AgentArgument,
    allow: AllowOption = None,
    allow_nothing: Annotated[bool, typer.Option("--allow-nothing", help="An empty ceiling.")] = False,
    add: AddOption = None,
    remove: RemoveOption = None,
    limit: LimitOption = None,
    anyway: AnywayOption = False,
    yes: YesOption = False,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Set the most the agent may ever hold; leases that no longer fit end. As its sponsor or an operator.

    --allow says the whole ceiling and replaces what was; --add and --remove change parts of it. --limit changes one
    limit of it, and tokens=none removes that. First shows what is taken away and which leases end, and asks.
    """
    from ringfence.client.admin.preview import Loss

    options = parse_scope_options(allow, allow_nothing, add, remove)
    parse_limits(limit)
    if not options and not limit:
        raise typer.BadParameter(
            "say the whole new ceiling with --allow, or --allow-nothing; or what changes of it with --add and --remove",
            param_hint="--allow",
        )

    who = signer(me, passkey, as_user)

    async def work() -> tuple[Accepted, dict[str, Any]]:
        from ringfence.client.admin.unknown_subjects import unknown_subject

        async with connect.administrator(who) as administrator:
            directory = await administrator.directory()
            entry = directory.agent(agent)
            if entry is None:
                raise unknown_subject(directory, "agent", agent)
            former = entry.state.ceiling
            await refuse_unknown(administrator, options.permissions, anyway, former)
            ceiling = options.applied(former)
            limits = parse_limits(limit, entry.state.limits)
            details: dict[str, Any] = {}
            if ceiling != former and not signs_on_page(who) and (options.whole is not None or options.remove):
                replacement = Replacement(f"ceiling of {agent}")
                replacement.scope("allowed", former, ceiling)
                if missing(former, ceiling):
                    replacement.losses.append(Loss(agent=agent, fits=ceiling))
                question = f"Set the ceiling of {agent} so?"
                details = await replacement.ask(question, identity(me), yes=yes, quiet=wants_json(as_json))
                await check_unchanged(administrator, "agent", agent, entry)
            if missing(ceiling, former) and not signs_on_page(who) and not wants_json(as_json):
                async with ReadApi(identity(me)) as api:
                    usage = await usage_of(api, agent)
                    combinations = await combinations_of(api, ceiling)
                note_field("whole ceiling then", ceiling_lines(ceiling, former, usage))
                people = (administrator.id, entry.state.sponsor)
                now_ms = administrator.connection.clock.now_ms()
                for name, text in ceiling_findings(combinations, directory, people, now_ms).items():
                    note_field(name, text)
            accepted = await administrator.set_ceiling(
                agent, ceiling, limits=limits, revision=entry.named_revision
            )
            return accepted, details

    accepted, details = run(work())
    print_accepted(accepted, f"ceiling of {agent} set", wants_json(as_json), details)


@app.command()
def transfer(
    agent: AgentArgument,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="USER",
            callback=check_name,
            help="The new sponsor. With --consent, who signed it.",
        ),
    ] = None,
    consent: Annotated[
        Path | None,
        typer.Option(
            "--consent",
            metavar="FILE",
            help="The new sponsor's consent (ringfence agent consent-transfer); - reads it from stdin.",
        ),
    ] = None,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make another sponsor accountable. As the present sponsor, with the new one's consent; or as an operator.

    An operator can do without the consent: then the agent's record and the trail say so.
    """
    if not (to or consent):
        raise typer.BadParameter(
            "name the new sponsor, or give their consent with --consent", param_hint="--to"
        )
    signed, by = _read_transfer_consent(consent, agent) if consent else (None, None)
    if signed and to and by != to:
        raise InvalidCallError(f"the consent is {by}'s, not {to}'s")
    sponsor = by or to or ""

    async def work() -> tuple[Accepted, bool]:
        async with connect.administrator(signer(me, passkey, as_user)) as administrator:
            unasked = signed is None and sponsor != administrator.id and await _is_operator(administrator)
            accepted = await administrator.transfer_agent(
                agent, sponsor=sponsor, consent=signed, without_consent=unasked
            )
            return accepted, unasked

    accepted, unasked = run(work())
    details = {"sponsor": sponsor, "without_consent": unasked}
    print_accepted(accepted, f"{sponsor} is accountable for {agent}", wants_json(as_json), details)
    if unasked:
        note(
            f"{sponsor} did not consent; the record of {agent} and the trail say so. {sponsor} takes it on with: "
            f"ringfence agent transfer {agent} --to {sponsor}",
            "warning",
        )


@app.command(name="consent-transfer")
def consent_transfer(
    agent: AgentArgument,
    valid: ConsentValidOption = "1h",
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Consent to become the sponsor of an agent as it is now; prints the consent for its present sponsor.

    As the new sponsor. It counts once. Any change of the agent invalidates it, so the present sponsor cannot widen what
    you saw.
    """
    who = signer(me, passkey, as_user)
    life_s = consent_life_s(valid, who)

    async def work() -> tuple[str, AgentState]:
        async with connect.administrator(who) as administrator:
            signed = await administrator.consent_to_transfer(agent, life_s=life_s)
            entry = (await administrator.directory()).agent(agent)
            assert entry is not None
            return signed, entry.state

    signed, state = run(work())
    if wants_json(as_json):
        print_json({"consent": signed, "agent_id": agent, "from_sponsor": state.sponsor, "valid_s": life_s})
        return
    note(f"You agree to answer for agent {agent}, which is {state.sponsor}'s now:", "heading")
    note(f"for: {state.description}")
    note(f"status: {state.status}")
    note("ceiling:")
    note(show_scope(state.ceiling))
    command = f"ringfence agent transfer {agent} --consent -"
    note(f"It counts once, within {span(life_s)}. {state.sponsor} uses it with: {command}")
    typer.echo(signed)


@app.command(name="rotate-key")
def rotate_key(
    agent: AgentArgument,
    key_file: KeyFileOption = None,
    public_key: PublicKeyOption = None,
    new_key: NewKeyOption = None,
    key_days: AgentKeyDaysOption = 30,
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
    reason: Annotated[str | None, typer.Option("--reason", help="Why; it is kept in the trail.")] = None,
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

    with keep_key_if_accepted(new_key):
        accepted = connect.administer(
            identity(me),
            lambda person: person.rotate_key(
                agent, key, overlap_s=overlap_s, replaces=replaces, compromised=compromised, reason=reason
            ),
        )
    key_file_field = {"key_file": str(new_key)} if new_key else {}
    ends = "end now, and their leases too" if compromised else f"count for {overlap or '1h'} yet"
    sentence = f"agent {agent} has key {key.kid}; the keys that it replaces {ends}"
    print_accepted(accepted, sentence, wants_json(as_json), kid=key.kid, **key_file_field)


@app.command()
def suspend(
    agent: AgentArgument,
    reason: ReasonOption,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stop the agent for now: nothing is issued, its leases end. As its sponsor or an operator."""

    accepted = connect.administer(
        signer(me, passkey, as_user), lambda person: person.suspend_agent(agent, reason=reason)
    )
    print_accepted(accepted, f"agent {agent} suspended; its leases end", wants_json(as_json))


@app.command()
def resume(
    agent: AgentArgument,
    reason: ReasonOption,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a suspended agent go on. What an operator suspended only an operator resumes."""

    accepted = connect.administer(
        signer(me, passkey, as_user), lambda person: person.resume_agent(agent, reason=reason)
    )
    print_accepted(accepted, f"agent {agent} is active again", wants_json(as_json))


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

    accepted = connect.administer(
        identity(me), lambda person: person.decommission_agent(agent, reason=reason)
    )
    print_accepted(accepted, f"agent {agent} decommissioned", wants_json(as_json))


@app.command(name="list")
def list_agents(wide: WideOption = False, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """List agents: a sponsor's own; all for operators and auditors."""
    list_records("agent", identity(me), wants_json(as_json), wide)


@app.command()
def show(agent: AgentArgument, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """Show one agent: what it may hold, what it used of that in 30 days, and a narrower ceiling that would do.

    A verb is used on a day on which a credential for it was issued. The command that is proposed keeps what was used or
    is held now, and can be pasted as it is.
    """

    async def work() -> tuple[Any, Any, str | None]:
        async with ReadApi(identity(me)) as api:
            record = await read_record(api, "agent", agent)
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
        note(f"incomplete: what it used is not known: {gap}", "warning")


def _read_transfer_consent(file: Path, agent: str) -> tuple[str, str]:
    """Return the text of a consent, and its claimed author.

    It is unverified: the registry verifies it, nothing is decided here.
    """
    try:
        text = (sys.stdin.read() if str(file) == "-" else file.read_text()).strip()
        claims = parse(text).unverified_claims(AgentTransferConsent)
    except OSError as error:
        raise InvalidCallError(f"cannot read the consent {file}: {error.strerror}") from None
    except (UnicodeDecodeError, InvalidMessageError):
        raise InvalidCallError(
            f"{file} holds no consent to a transfer; the new sponsor makes one with: ringfence agent consent-transfer "
            f"{agent}"
        ) from None
    if claims.agent_id != agent:
        raise InvalidCallError(f"the consent is for agent {claims.agent_id}, not {agent}")
    return text, claims.iss.rpartition("/")[2]


async def _is_operator(administrator: Administrator) -> bool:
    if administrator.is_root:
        return True
    entry = (await administrator.directory()).user(administrator.id)
    return entry is not None and entry.state.status == "active" and "operator" in entry.state.roles


def _one_key(
    agent: str, key_file: Path | None, public_key: Path | None, new_key: Path | None, days: int
) -> KeyRecord:
    """Return the one key that is named, or made.

    Raises KeyFileError; typer.BadParameter where none or several are named.
    """
    if key_file and (public_key or new_key):
        raise typer.BadParameter("name one key: --key-file, --public-key or --new-key")
    id = spiffe_id(settings().trust_domain, "agent", agent)
    keys = key_records(key_file or public_key, new_key, id, days)
    if not keys:
        raise typer.BadParameter("name the agent's key: --key-file, --public-key or --new-key")
    return keys[0]


# Usage of an agent against its ceiling, for `ringfence agent show`, and a narrower ceiling.

_MONTH_S = 30 * 86_400


def set_ceiling_command(
    agent_id: str, narrower: Sequence[Mapping[str, Any]] | None, me: Path | None
) -> str | None:
    """Return the shell command that narrows the agent's ceiling to what it used; None if it used all of it.

    Args:
        narrower: the ceiling that policy proposes.
        me: the key file named on this command line, to be repeated in the returned one.
    """
    if narrower is None:
        return None
    arguments = ["ringfence", *(["--identity", str(me)] if me else []), "agent", "set-ceiling", agent_id]
    for permission in map(_permission, narrower):
        arguments += ["--allow", write_permission(permission)]
    return shlex.join(arguments if narrower else [*arguments, "--allow-nothing"])


def print_usage(usage: Mapping[str, Any], command: str | None) -> None:
    """Print what was used of what is granted, what is held now, and the narrower ceiling, for people."""
    now_s = time.time()
    print_table(
        ["target", "verb", "in its ceiling", "used on", "first", "last"],
        _rows(usage),
        empty="it may hold nothing, and used nothing",
    )
    for lease in usage["held"]:
        permissions = "; ".join(show_permission(_permission(permission)) for permission in lease["scope"])
        say(f"holds {permissions} by lease {lease['lease_id']}, until {until(lease['deadline'], now_s)}")
    if command is None:
        return
    count = len(usage["never_used"])
    say(
        f"{count} of these it did not use since {_day(usage['since'])}. To narrow its ceiling to what it used:"
    )
    say(command)
    if (age_s := now_s - usage["registered_at"]) < _MONTH_S:
        note(f"it was registered {span(age_s)} ago: what it needs may be still to come", "warning")


def _rows(usage: Mapping[str, Any]) -> list[Sequence[str]]:
    granted = {(p["target"], verb) for p in usage["ceiling"] for verb in p["verbs"]}
    used = {(one["target"], one["verb"]): one for one in usage["used"]}
    rows: list[Sequence[str]] = []
    for target, verb in sorted(granted | used.keys()):
        one = used.get((target, verb))
        days = f"{one['days']} day{'s' if one['days'] > 1 else ''}" if one else "no day"
        times = (_day(one["first_used"]), _day(one["last_used"])) if one else ("", "")
        inside = "yes" if (target, verb) in granted else "no more"
        rows.append((visible_name(target), visible_name(verb), inside, days, *times))
    return rows


def _permission(document: Mapping[str, Any]) -> Permission:
    # Not strict: JSON has no tuples.
    return Permission.model_validate(document, strict=False)


def _day(seconds: int) -> str:
    return utc_text(seconds, "%Y-%m-%d")
