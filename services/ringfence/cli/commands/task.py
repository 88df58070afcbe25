"""`ringfence task`: assign a task after a preview of its effective scope, delegate part of it, end it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import (
    check_id_prefix,
    check_name,
    parse_limits,
    parse_scope,
    show_permission,
    show_scope,
)
from ringfence.cli.shared.command_results import print_accepted
from ringfence.cli.shared.id_lookup import check_whole_id, require_whole_id, whole_id
from ringfence.cli.shared.options import (
    AllowOption,
    AsOption,
    ConsentValidOption,
    IdentityOption,
    JsonOption,
    LimitOption,
    PasskeyOption,
    ReasonOption,
    WideOption,
    consent_life_s,
    duration_s,
    identity,
    moment_s,
    run,
    signer,
    wants_json,
)
from ringfence.cli.shared.output import moment, note, print_json, say
from ringfence.cli.shared.records import list_records, print_record
from ringfence.client.errors import InvalidCallError, checked
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.text import Lines, span
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.registry import TaskConsent, TaskTerms
from ringfence.model.records.consent import canonical_terms, nonce_of

if TYPE_CHECKING:
    from ringfence.client.admin.command_client import Accepted
    from ringfence.client.admin.preview import Preview

app = typer.Typer(help="Tasks: assign, with what all sides allow; hand on; end.", no_args_is_help=True)

AgentArgument = Annotated[str, typer.Argument(metavar="AGENT", callback=check_name, help="The agent's id.")]
TaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", callback=check_id_prefix, help="The task's id, or how it begins.")
]
WholeTaskArgument = Annotated[
    str, typer.Argument(metavar="TASK", callback=check_whole_id, help="The task's whole id.")
]
PurposeOption = Annotated[str | None, typer.Option("--purpose", help="What it is for.")]
ForOption = Annotated[
    str | None, typer.Option("--for", metavar="DURATION", help="How long: 90s, 15m, 1h30m, 2d.")
]
UntilOption = Annotated[
    str | None, typer.Option("--until", metavar="MOMENT", help="Or until when: 2030-01-31T18:00:00Z.")
]


@app.command()
def assign(
    agent: AgentArgument,
    purpose: PurposeOption = None,
    allow: AllowOption = None,
    lasts: ForOption = None,
    until: UntilOption = None,
    limit: LimitOption = None,
    consent: Annotated[
        Path | None,
        typer.Option(
            "--consent",
            metavar="FILE",
            help="On behalf of another user: their consent (ringfence task consent), which holds all the terms.",
        ),
    ] = None,
    on_behalf_of: Annotated[
        str | None,
        typer.Option(
            "--on-behalf-of", metavar="USER", callback=check_name, help="With --id-token: whose it is."
        ),
    ] = None,
    id_token: Annotated[
        Path | None,
        typer.Option(
            "--id-token",
            metavar="FILE",
            help="On behalf of another user: their OIDC ID token with the nonce of these terms (ringfence task nonce).",
        ),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what it would allow.")] = False,
    anyway: Annotated[
        bool,
        typer.Option("--anyway", help="Assign it even where it allows nothing now."),
    ] = False,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Assign a task to an agent, on your behalf. First shows what task, ceiling and entitlements allow together."""
    consented = None if consent is None else _read_consent(consent)
    if consented is not None and (purpose or allow or lasts or until or limit):
        raise typer.BadParameter("the terms are in the consent; give none beside it", param_hint="--consent")
    token = _read_id_token(id_token, on_behalf_of, consent, until)
    fields = _task_terms(purpose, allow, lasts, until, limit) if consented is None else {}

    async def work() -> tuple[TaskTerms, str, Preview, str | None]:
        async with connect.administrator(signer(me, passkey, as_user)) as administrator:
            if consented is None:
                terms, whose, signed = administrator.terms(agent, **fields), on_behalf_of, None
            else:
                terms, whose, signed = consented
                if terms.agent_id != agent:
                    raise InvalidCallError(f"the consent is for agent {terms.agent_id}, not {agent}")
            task_preview = await administrator.preview(terms, on_behalf_of=whose)
            if not wants_json(as_json):
                _show_preview(task_preview)
            if dry_run:
                return terms, whose or administrator.id, task_preview, None
            if not task_preview.effective and not anyway:
                if wants_json(as_json):
                    _show_preview(task_preview)
                raise RingfenceError(
                    "the task was not assigned: it would allow nothing. Change task, ceiling or entitlements, or add "
                    "--anyway"
                )
            task_id = await administrator.assign_terms(
                terms, on_behalf_of=whose, consent=signed, id_token=token
            )
            return terms, whose or administrator.id, task_preview, task_id

    terms, whose, task_preview, task_id = run(work())
    if wants_json(as_json):
        print_json(_as_json(terms, whose, task_preview, task_id))
    elif task_id:
        say(f"task {task_id} assigned to {agent} on behalf of {whose}, until {moment(terms.not_after)}")


@app.command()
def consent(
    agent: AgentArgument,
    purpose: PurposeOption = None,
    allow: AllowOption = None,
    lasts: ForOption = None,
    until: UntilOption = None,
    limit: LimitOption = None,
    valid: ConsentValidOption = "1h",
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Sign the terms of a task that somebody else will assign on your behalf; prints the consent."""
    who = signer(me, passkey, as_user)
    fields, life_s = _task_terms(purpose, allow, lasts, until, limit), consent_life_s(valid, who)

    async def work() -> tuple[TaskTerms, str]:
        async with connect.administrator(who) as administrator:
            terms = administrator.terms(agent, **fields)
            _show_preview(await administrator.preview(terms))
            return terms, await administrator.consent_to_task(terms, life_s=life_s)

    terms, signed = run(work())
    if wants_json(as_json):
        print_json({"consent": signed, "agent_id": agent, "not_after": terms.not_after, "valid_s": life_s})
    else:
        note(f"It counts once, within {span(life_s)}: ringfence task assign {agent} --consent FILE")
        typer.echo(signed)


@app.command()
def nonce(
    agent: AgentArgument,
    purpose: PurposeOption = None,
    allow: AllowOption = None,
    until: UntilOption = None,
    limit: LimitOption = None,
    as_json: JsonOption = False,
) -> None:
    """Print the nonce with which an OIDC ID token consents to these terms; nothing is sent.

    With it the user signs in at their issuer, for the trust domain as the audience. Then the task is assigned, of the
    very same terms: ringfence task assign ... --on-behalf-of USER --id-token FILE.
    """
    if until is None:
        raise typer.BadParameter("say until when; a token cannot consent to a duration", param_hint="--until")
    fields = _task_terms(purpose, allow, None, until, limit)
    with checked("the task"):
        terms = TaskTerms(
            agent_id=agent,
            purpose=fields["purpose"],
            scope=fields["scope"],
            not_after=fields["not_after"],
            limits=fields["limits"],
        )
    if wants_json(as_json):
        print_json({"nonce": nonce_of(terms), "terms": canonical_terms(terms).decode()})
    else:
        typer.echo(nonce_of(terms))


@app.command()
def delegate(
    task: WholeTaskArgument,
    agent: AgentArgument,
    purpose: PurposeOption = None,
    allow: AllowOption = None,
    lasts: ForOption = None,
    until: UntilOption = None,
    limit: LimitOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Hand part of a task to another agent: no wider, and no longer. As the agent of the task."""
    fields = _task_terms(purpose, allow, lasts, until, limit)
    scope, ends_in_s, not_after = fields["scope"], fields["ends_in_s"], fields["not_after"]

    async def work() -> str:
        async with connect.agent(identity(me)) as delegator:
            return await delegator.delegate(
                task=task,
                to=agent,
                purpose=fields["purpose"],
                scope=scope,
                ends_in_s=ends_in_s,
                until=not_after,
                limits=fields["limits"],
            )

    part = run(work())
    if wants_json(as_json):
        print_json({"task_id": part, "parent": task, "agent_id": agent})
    else:
        say(f"task {part} handed on to {agent}, as a part of {task}; it ends with that")


@app.command()
def end(
    task: TaskArgument,
    reason: ReasonOption,
    passkey: PasskeyOption = False,
    as_user: AsOption = None,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """End a task, what was handed on of it, and their leases.

    As who assigned it, who it is on behalf of, the agent's sponsor, an operator, or an agent that handed it on.
    """
    from ringfence.client.admin.administrator import Administrator
    from ringfence.client.agent.agent import Agent
    from ringfence.client.connection import Connection

    who = signer(me, passkey, as_user)

    async def work() -> tuple[str, Accepted]:
        connection = Connection(who)
        if "/agent/" in connection.key.id:
            require_whole_id(task, of="TASK")
            async with Agent(connection) as delegator:
                return task, await delegator.end_delegated(task, reason=reason)
        whole = await whole_id("task", task, who)
        async with Administrator(connection) as administrator:
            return whole, await administrator.end_task(whole, reason=reason)

    whole, accepted = run(work())
    print_accepted(accepted, f"task {whole} ended; its leases end", wants_json(as_json))


@app.command(name="list")
def list_tasks(wide: WideOption = False, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """List tasks."""
    list_records("task", identity(me), wants_json(as_json), wide)


@app.command()
def show(task: TaskArgument, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """Show one task, and the parts of it that were handed on."""

    async def work() -> tuple[Any, Any]:
        whole = await whole_id("task", task, identity(me))
        async with ReadApi(identity(me)) as api:
            return await api.record("task", whole), await api.records("task", parent=whole)

    record, parts = run(work())
    if wants_json(as_json):
        print_json({**record, "parts": [part["id"] for part in parts]})
        return
    delegated = [f"{part['id']} to {part['state']['agent_id']} ({part['state']['status']})" for part in parts]
    print_record("task", record, {"parts": Lines(delegated)})


def _task_terms(
    purpose: str | None,
    allow: list[str] | None,
    lasts: str | None,
    until: str | None,
    limit: list[str] | None,
) -> dict[str, Any]:
    """Return the terms from the options, validated. Raises typer.BadParameter."""
    if not purpose:
        raise typer.BadParameter("say what the task is for", param_hint="--purpose")
    if not allow:
        raise typer.BadParameter("say what the task may do", param_hint="--allow")
    if lasts is not None and until is not None:
        raise typer.BadParameter(
            "say when the task ends once: --for or --until, and not both", param_hint="--for"
        )
    if lasts is None and until is None:
        raise typer.BadParameter("say when the task ends: --for or --until", param_hint="--for")
    return {
        "purpose": purpose,
        "scope": parse_scope(allow),
        "ends_in_s": None if lasts is None else duration_s(lasts),
        "not_after": None if until is None else moment_s(until),
        "limits": parse_limits(limit),
    }


def _read_consent(file: Path) -> tuple[TaskTerms, str, str]:
    """Return terms, user and text of a consent.

    It is unverified: the registry verifies it, and nothing is decided here.
    """
    try:
        text = file.read_text().strip()
        claims = parse(text).unverified_claims(TaskConsent)
    except OSError as error:
        raise InvalidCallError(f"cannot read the consent {file}: {error.strerror}") from None
    except (UnicodeDecodeError, InvalidMessageError):
        raise InvalidCallError(f"{file} holds no consent; one is made by: ringfence task consent") from None
    return claims.terms, claims.iss.rpartition("/")[2], text


def _read_id_token(
    file: Path | None, user: str | None, consent: Path | None, until: str | None
) -> str | None:
    """Return the text of an ID token, which the registry verifies. Raises typer.BadParameter, InvalidCallError."""
    if (file is None) != (user is None):
        raise typer.BadParameter("give both: --on-behalf-of USER --id-token FILE", param_hint="--id-token")
    if file is None:
        return None
    if consent is not None:
        raise typer.BadParameter("give a consent or an ID token, and not both", param_hint="--id-token")
    if until is None:
        raise typer.BadParameter(
            "the end is part of what the token consents to: give the same --until as for its nonce",
            param_hint="--until",
        )
    try:
        return file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCallError(f"cannot read the ID token {file}: {type(error).__name__}") from None


def _show_preview(task_preview: Preview) -> None:
    note("What all sides allow together:", "heading")
    note(show_scope(task_preview.effective))
    for cut in task_preview.cuts:
        note(f"cut: {show_permission(cut.permission)} ({cut.limit} does not allow it)", "warning")
    for warning in task_preview.warnings:
        note(f"warning: {warning}", "warning")


def _as_json(terms: TaskTerms, whose: str, task_preview: Preview, task_id: str | None) -> dict[str, Any]:
    return {
        "task_id": task_id,
        "agent_id": terms.agent_id,
        "on_behalf_of": whose,
        "not_after": terms.not_after,
        "effective": list(task_preview.effective),
        "cuts": [{"permission": cut.permission, "side": cut.limit} for cut in task_preview.cuts],
        "warnings": list(task_preview.warnings),
    }
