"""`ringfence provisioner`: keys of directories, and the rights that an operator delegates to them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

from ringfence.cli.shared import connect
from ringfence.cli.shared.arguments import check_name, parse_permission, show_permission
from ringfence.cli.shared.changes import Replacement, check_unchanged
from ringfence.cli.shared.command_results import print_accepted, warn_of_unknown
from ringfence.cli.shared.options import (
    IdentityOption,
    JsonOption,
    KeyDaysOption,
    NewKeyOption,
    PublicKeyOption,
    ReasonOption,
    YesOption,
    call,
    confirm,
    identity,
    keep_key_if_accepted,
    key_records,
    run,
    settings,
    wants_json,
)
from ringfence.cli.shared.output import kept_file, note, print_json, print_table
from ringfence.cli.shared.tables import prose, state
from ringfence.client.errors import InvalidCallError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.private_files import open_private
from ringfence.kernel.base.text import Lines
from ringfence.messages.base import KeyRecord, Permission
from ringfence.messages.registry import Delegation, GroupDelegation, Role, UserState
from ringfence.model.identity.spiffe_ids import spiffe_id

if TYPE_CHECKING:
    from ringfence.cli.shared.yaml_files import YamlFile
    from ringfence.client.admin.command_client import Accepted

app = typer.Typer(help="Directories that users come from: what they may give.", no_args_is_help=True)

ProvisionerArgument = Annotated[
    str, typer.Argument(metavar="PROVISIONER", callback=check_name, help="Its id, among those of users.")
]
_ROLES: tuple[str, ...] = get_args(Role)


@app.command(name="set")
def change(
    provisioner: ProvisionerArgument,
    file: Annotated[
        Path,
        typer.Option("--delegation", metavar="FILE", help="YAML: the source, and what each group may give."),
    ],
    name: Annotated[str | None, typer.Option("--name", help="What it is called.")] = None,
    public_key: PublicKeyOption = None,
    new_key: NewKeyOption = None,
    key_days: KeyDaysOption = 365,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make a provisioner, or delegate something else to it: the file holds all of it. A new key ends the old ones.

    Of a provisioner that there is, first shows what changes, and asks. As an operator.
    """
    delegation = read_delegation(file)
    keys = key_records(public_key, new_key, spiffe_id(settings().trust_domain, "user", provisioner), key_days)

    async def work() -> tuple[Accepted, dict[str, Any]]:
        async with connect.administrator(identity(me)) as administrator:
            entry = (await administrator.directory()).user(provisioner)
            if entry is None and not keys:
                raise InvalidCallError("a new provisioner needs a key: --new-key FILE, or --public-key FILE")
            now_s = administrator.connection.clock.now_ms() / 1000
            current_keys = [key for key in entry.state.keys if key.not_after > now_s] if entry else []
            before = entry.state.delegation if entry else None
            granted_before = [one for group in before.groups for one in group.scope] if before else []
            granted = [one for group in delegation.groups for one in group.scope]
            await warn_of_unknown(administrator, granted, granted_before)
            details: dict[str, Any] = {}
            if entry is not None and before is not None:
                replacement = _replacement(provisioner, before, delegation, current_keys, keys)
                if entry.state.status == "disabled":
                    replacement.warnings.append(f"{provisioner} is disabled: this makes it active again")
                if replacement.lines or replacement.warnings:
                    question = f"Set provisioner {provisioner} so?"
                    details = await replacement.ask(
                        question, identity(me), yes=yes, quiet=wants_json(as_json)
                    )
                    await check_unchanged(administrator, "user", provisioner, entry)
            called = name or (entry.state.name if entry else provisioner)
            accepted = await administrator.set_provisioner(
                provisioner,
                name=called,
                keys=keys or current_keys,
                delegation=delegation,
                revision=entry.named_revision if entry else 0,
            )
            return accepted, details

    with keep_key_if_accepted(new_key):
        accepted, details = run(work())
    key_file_field = {"key_file": str(new_key)} if new_key else {}
    print_accepted(accepted, f"provisioner {provisioner} set", wants_json(as_json), details, **key_file_field)


def _replacement(
    provisioner: str,
    before: Delegation,
    after: Delegation,
    current_keys: Sequence[KeyRecord],
    keys: Sequence[KeyRecord],
) -> Replacement:
    replacement = Replacement(f"provisioner {provisioner}")
    if before.source != after.source:
        replacement.values("source", [before.source], [after.source])
    old, new = ({one.group: one for one in delegation.groups} for delegation in (before, after))
    for group in sorted(old.keys() | new.keys()):
        if old.get(group) != new.get(group):
            replacement.values(
                f"group {group}", _granted_lines(old.get(group)), _granted_lines(new.get(group))
            )
    if keys and (ended := [key.kid for key in current_keys if key.kid not in {one.kid for one in keys}]):
        replacement.values("keys", ended, [key.kid for key in keys])
    return replacement


def _granted_lines(group: GroupDelegation | None) -> list[str]:
    return [*group.roles, *map(show_permission, group.scope)] if group else []


@app.command(name="list")
def list_provisioners(me: IdentityOption = None, as_json: JsonOption = False) -> None:
    """List provisioners: what each may give, by group. Operators and auditors see all."""

    users = call(ReadApi(identity(me)), lambda api: api.records("user"))
    provisioners = [item for item in users if item["state"].get("delegation")]
    if wants_json(as_json):
        print_json(provisioners)
        return
    print_table(
        ["provisioner", state("status"), "name", "source", prose("groups")],
        # Not strict: JSON has no tuples.
        (_provisioner_row(UserState.model_validate(item["state"], strict=False)) for item in provisioners),
        empty="no provisioner that you may see",
    )


def _provisioner_row(state: UserState) -> Sequence[str]:
    assert state.delegation is not None
    groups = [
        f"{group.group}: {'; '.join(_granted_lines(group)) or 'nothing'}" for group in state.delegation.groups
    ]
    return state.user_id, state.status, state.name, state.delegation.source, Lines(groups) or "none"


@app.command()
def disable(
    provisioner: ProvisionerArgument,
    reason: ReasonOption,
    yes: YesOption = False,
    me: IdentityOption = None,
    as_json: JsonOption = False,
) -> None:
    """Believe a provisioner nothing any more. Its users stay until they are disabled or their entitlements run out.

    As an operator.
    """
    confirm(f"Disable provisioner {provisioner}?", yes)

    accepted = connect.administer(
        identity(me), lambda person: person.disable_user(provisioner, reason=reason)
    )
    print_accepted(accepted, f"provisioner {provisioner} disabled", wants_json(as_json))


@app.command(name="new-token")
def make_token(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", callback=kept_file, help="Where the SCIM endpoint has its tokens."),
    ],
    name: Annotated[str, typer.Option("--name", help="Whose it is; a line of the file.")],
    as_json: JsonOption = False,
) -> None:
    """Make a bearer token for the SCIM endpoint: print it, once, and add its hash to the file."""
    from ringfence.kernel.service.bearer_tokens import new_token

    token, line = new_token(name)
    descriptor = open_private(file, os.O_RDWR | os.O_APPEND)
    with os.fdopen(descriptor, "ab+") as tokens:
        size = tokens.seek(0, os.SEEK_END)
        # An unterminated last line would swallow this one.
        ended = not size or os.pread(descriptor, 1, size - 1) == b"\n"
        tokens.write(("" if ended else "\n").encode() + line.encode() + b"\n")
    note("This is shown once; the file has only its hash:")
    if wants_json(as_json):
        print_json({"name": name, "token": token, "file": str(file)})
    else:
        typer.echo(token)


def read_delegation(file: Path) -> Delegation:
    """Read a delegation from a file. Raises YamlFileError with all mistakes."""
    from ringfence.cli.shared.yaml_files import YamlFile

    source = YamlFile(file)
    top = source.members(source.root, "the file", {"source", "groups"})
    groups: list[GroupDelegation] = []
    for missing in sorted({"source", "groups"} - top.keys()):
        source.problem(source.root, f"the file has no `{missing}`")
    for name, node in source.members(top["groups"], "groups").items() if "groups" in top else ():
        groups.append(_group(source, name, node))
    label = source.text(top["source"], "source") if "source" in top else ""
    source.finish()
    return Delegation(source=label, groups=tuple(groups))


def _group(source: YamlFile, name: str, node: Any) -> GroupDelegation:
    members = source.members(node, f"group {name}", {"roles", "allow"})
    roles: list[Any] = []
    for item, role in source.texts(members["roles"], "roles") if "roles" in members else ():
        if role not in _ROLES:
            source.problem(item, f"{role!r} is no role; write one of {', '.join(_ROLES)}")
        else:
            roles.append(role)
    allowed: list[Permission] = []
    for item, text in source.texts(members["allow"], "allow") if "allow" in members else ():
        try:
            allowed.append(parse_permission(text))
        except typer.BadParameter as error:
            source.problem(item, str(error))
    return GroupDelegation(group=name[:256], roles=tuple(dict.fromkeys(roles)), scope=tuple(allowed[:64]))
