"""`ringfence user`: people, their roles, keys and entitlements."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ringfence.cli.commands import user_keys
from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import check_name, parse_scope, show_scope
from ringfence.cli.shared.changes import (
    Replacement,
    ScopeOptions,
    check_unchanged,
    parse_scope_options,
)
from ringfence.cli.shared.command_results import print_accepted, refuse_unknown
from ringfence.cli.shared.options import (
    AddOption,
    AllowOption,
    AnywayOption,
    IdentityOption,
    JsonOption,
    KeyDaysOption,
    NewKeyOption,
    PublicKeyOption,
    ReasonOption,
    RemoveOption,
    WideOption,
    YesOption,
    identity,
    keep_key_if_accepted,
    key_records,
    run,
    settings,
    wants_json,
)
from ringfence.cli.shared.records import list_records, show_record
from ringfence.client.errors import InvalidCallError
from ringfence.messages.base import KeyRecord, Scope
from ringfence.messages.registry import Provisioning, Role, UserState
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.model.scope.scope import missing

if TYPE_CHECKING:
    from ringfence.client.admin.command_client import Accepted
    from ringfence.model.records.directory import Directory

app = typer.Typer(help="People: roles, keys, entitlements.", no_args_is_help=True)

_ROLES: tuple[Role, ...] = get_args(Role)

UserArgument = Annotated[str, typer.Argument(metavar="USER", callback=check_name, help="The user's id.")]
RoleOption = Annotated[
    list[str] | None, typer.Option("--role", metavar="ROLE", help="sponsor, operator or auditor. Repeatable.")
]
SourceOption = Annotated[str, typer.Option("--source", help="Where the entitlements are known from.")]


@app.command()
def add(
    user: UserArgument,
    name: Annotated[str, typer.Option("--name", help="The person's name.")],
    role: RoleOption = None,
    allow: AllowOption = None,
    source: SourceOption = "operator",
    public_key: PublicKeyOption = None,
    new_key: NewKeyOption = None,
    key_days: KeyDaysOption = 365,
    anyway: AnywayOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Add a person. `--allow` is what they are entitled to: no task on their behalf reaches further.

    As an operator.
    """
    roles, scope = _roles(role), parse_scope(allow, may_be_empty=True)
    keys = key_records(public_key, new_key, spiffe_id(settings().trust_domain, "user", user), key_days)

    async def work() -> Accepted:
        async with connect.administrator(identity(me)) as administrator:
            if (await administrator.directory()).user(user) is not None:
                raise InvalidCallError(f"user {user} exists; change them with: ringfence user set {user}")
            await refuse_unknown(administrator, scope, anyway)
            return await administrator.set_user(
                user, name=name, roles=roles, keys=keys, entitlements=scope, source=source, revision=0
            )

    with keep_key_if_accepted(new_key):
        accepted = run(work())
    print_accepted(accepted, f"user {user} added", wants_json(as_json), **_key_file_field(new_key))


@app.command(name="set")
def change(
    user: UserArgument,
    name: Annotated[str | None, typer.Option("--name", help="Another name.")] = None,
    role: RoleOption = None,
    no_roles: Annotated[bool, typer.Option("--no-roles", help="Take all roles away.")] = False,
    allow: AllowOption = None,
    allow_nothing: Annotated[
        bool, typer.Option("--allow-nothing", help="Take all entitlements away.")
    ] = False,
    add: AddOption = None,
    remove: RemoveOption = None,
    anyway: AnywayOption = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Confirm the entitlements as they are, as of now.")
    ] = False,
    source: Annotated[
        str | None, typer.Option("--source", help="Where the entitlements are known from.")
    ] = None,
    public_key: PublicKeyOption = None,
    new_key: NewKeyOption = None,
    key_days: KeyDaysOption = 365,
    take_over: Annotated[
        bool,
        typer.Option("--take-over", help="Of a user from a directory: it does not change them any more."),
    ] = False,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Change what you name and keep the rest. A new key ends the old ones. A disabled user becomes active again.

    --allow and --role replace the previous values completely. --allow and --add confirm all entitlements as of now, as
    --refresh does; --remove does not. First shows what is removed and which leases end, and asks. The directory of a
    provisioned user overwrites such changes, except keys. As an operator; nobody widens their own roles or
    entitlements.
    """
    options = parse_scope_options(allow, allow_nothing, add, remove)
    if role and no_roles:
        raise typer.BadParameter("an option and its opposite were given")
    keys = key_records(public_key, new_key, spiffe_id(settings().trust_domain, "user", user), key_days)
    roles = _roles(role) if role else () if no_roles else None
    touched = bool(name or source or keys or refresh or take_over or options) or roles is not None

    async def work() -> tuple[Accepted, dict[str, Any]]:
        from ringfence.client.admin.unknown_subjects import unknown_subject

        async with connect.administrator(identity(me)) as administrator:
            directory = await administrator.directory()
            entry = directory.user(user)
            if entry is None:
                remedy = f"add them with: ringfence user add {user}"
                raise unknown_subject(directory, "user", user, remedy)
            state = entry.state
            if state.status == "active" and not touched:
                raise InvalidCallError(f"nothing of {user} would change: name what, or --refresh")
            former = state.entitlements.scope
            await refuse_unknown(administrator, options.permissions, anyway, former)
            scope = options.applied(former) if options else None
            details: dict[str, Any] = {}
            replacement, question = _replacement(state, options, scope, roles, keys)
            if question is not None:
                details = await replacement.ask(question, identity(me), yes=yes, quiet=wants_json(as_json))
                await check_unchanged(administrator, "user", user, entry)
            accepted = await administrator.set_user(
                user,
                **_changed_fields(state, name, roles, scope, source, confirmed=refresh or options.gives),
                keys=keys or _current_keys(state),
                provisioned=None if take_over else _provisioning(state),
                revision=entry.named_revision,
            )
            return accepted, details

    with keep_key_if_accepted(new_key):
        accepted, details = run(work())
    print_accepted(accepted, f"user {user} set", wants_json(as_json), details, **_key_file_field(new_key))


@app.command()
def disable(
    user: UserArgument,
    reason: ReasonOption,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Let a person act no more: what runs on their behalf ends, and their agents become orphans. As an operator.

    First shows which agents and leases that is, and asks.
    """
    from ringfence.client.admin.preview import Loss

    async def work() -> tuple[Accepted, dict[str, Any]]:
        from ringfence.client.admin.unknown_subjects import unknown_subject

        async with connect.administrator(identity(me)) as administrator:
            directory = await administrator.directory()
            if directory.user(user) is None:
                raise unknown_subject(directory, "user", user)
            replacement = Replacement(f"user {user}", losses=[Loss(user=user), Loss(sponsor=user)])
            orphans = _agents_of(directory, user)
            replacement.lines["agents that become orphans"] = ", ".join(orphans) or "none"
            replacement.document["orphans"] = orphans
            question = f"Disable {user}?"
            if user == administrator.id:
                question = f"You are {user}, and could not take it back yourself. {question}"
            details = await replacement.ask(question, identity(me), yes=yes, quiet=wants_json(as_json))
            return await administrator.disable_user(user, reason=reason), details

    accepted, details = run(work())
    print_accepted(accepted, f"user {user} disabled", wants_json(as_json), details)


@app.command()
def sync(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML: all users of this provisioner.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would change.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Disable however many are not in the file.")] = False,
    max_leaving: Annotated[
        int,
        typer.Option(
            "--max-leaving", min=0, max=100, metavar="PERCENT", help="How many may leave without --force."
        ),
    ] = 10,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make the users of a provisioner what a file says: who is new, who changed; who is not in it is disabled.

    As the provisioner (`ringfence provisioner set`).
    """
    from ringfence.cli.commands import user_sync  # it needs YAML, and nothing else here does

    run(
        user_sync.sync(
            file,
            identity(me),
            dry_run=dry_run,
            force=force,
            max_leaving=max_leaving,
            as_json=wants_json(as_json),
        )
    )


@app.command(name="list")
def list_users(wide: WideOption = False, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """List people."""
    list_records("user", identity(me), wants_json(as_json), wide)


@app.command()
def show(user: UserArgument, me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """Show one person."""
    show_record("user", user, identity(me), wants_json(as_json))


user_keys.add_to(app)


def _roles(texts: list[str] | None) -> tuple[Role, ...]:
    parsed: list[Role] = []
    for text in texts or ():
        role = next((name_of_role for name_of_role in _ROLES if name_of_role == text), None)
        if role is None:
            raise typer.BadParameter(
                f"{text!r} is no role; write one of {', '.join(_ROLES)}", param_hint="--role"
            )
        parsed.append(role)
    return tuple(dict.fromkeys(parsed))


def _replacement(
    state: UserState,
    options: ScopeOptions,
    scope: Scope | None,
    roles: tuple[Role, ...] | None,
    keys: Sequence[KeyRecord],
) -> tuple[Replacement, str | None]:
    """Return what changes, and the question to ask first; None where nothing is removed or replaced."""
    from ringfence.client.admin.preview import Loss

    user, former = state.user_id, state.entitlements.scope
    replacement = Replacement(f"user {user}")
    asks = False
    if scope is not None and scope != former:
        replacement.scope("entitled to", former, scope)
        if missing(former, scope):
            replacement.losses.append(Loss(user=user, fits=scope))
        asks = options.whole is not None or bool(options.remove)
    if roles is not None and set(roles) != set(state.roles):
        replacement.values("roles", state.roles, roles)
        asks = asks or bool(set(state.roles) - set(roles))
        if "sponsor" in state.roles and "sponsor" not in roles:
            replacement.losses.append(Loss(sponsor=user))
            replacement.warnings.append(
                f"without the role sponsor {user} answers for no agent: theirs become orphans"
            )
    new = {key.kid for key in keys}
    if keys and (ended := [key.kid for key in _current_keys(state) if key.kid not in new]):
        replacement.values("keys", ended, sorted(new))
        replacement.warnings.append("the keys before end now")
        asks = True
    if state.status == "disabled":
        replacement.warnings.append(
            f"{user} is disabled: this makes them active again, with these roles and entitlements"
        )
        roles_after = state.roles if roles is None else roles
        replacement.lines.setdefault("roles", ", ".join(roles_after) or "none")
        replacement.lines.setdefault("entitled to", show_scope(former if scope is None else scope))
        return replacement, f"Set user {user}, and make them active again?"
    return replacement, f"Change user {user} so?" if asks else None


def _agents_of(directory: Directory, user: str) -> list[str]:
    return [
        entry.state.agent_id for entry in directory.agents_of(user) if entry.state.status != "decommissioned"
    ]


def _changed_fields(
    state: UserState,
    name: str | None,
    roles: tuple[Role, ...] | None,
    scope: Scope | None,
    source: str | None,
    *,
    confirmed: bool,
) -> dict[str, Any]:
    # Unchanged entitlements keep their date: a new date would say that somebody has reviewed them again. The rest after
    # a removal keeps it too: otherwise a removal would renew entitlements that had become too old.
    return {
        "name": name or state.name,
        "roles": state.roles if roles is None else roles,
        "entitlements": state.entitlements.scope if scope is None else scope,
        "source": source or state.entitlements.source,
        "as_of": None if confirmed else state.entitlements.as_of,
    }


def _provisioning(state: UserState) -> Provisioning | None:
    """Return the user's provisioning data, with the statement that they may act."""
    if state.provisioned is None:
        return None
    fields = {name: getattr(state.provisioned, name) for name in Provisioning.model_fields}
    return Provisioning(**{**fields, "active": True})


def _current_keys(state: UserState) -> tuple[KeyRecord, ...]:
    now_s = time.time()
    return tuple(key for key in state.keys if key.not_after > now_s)


def _key_file_field(new_key: Path | None) -> dict[str, str]:
    return {"key_file": str(new_key)} if new_key else {}
