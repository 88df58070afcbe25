"""`ringfence user sync`: reconcile users with a YAML file."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ringfence.cli.shared.output import note, print_json, say, visible
from ringfence.cli.shared.yaml_files import YamlFile
from ringfence.client.admin.provisioner import (
    FileUser,
    Provisioner,
    SyncPlan,
    UserChange,
    carry_out,
    delegation_of,
    plan,
)
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.text import Lines
from ringfence.kernel.base.validation_problems import explain
from ringfence.messages.base import Name
from ringfence.messages.registry import Provisioning

_A_NAME: TypeAdapter[str] = TypeAdapter(Name)
_MEMBERS = frozenset({"name", "groups", "active", "external_id"})
_SIGNS = {"add": "+", "change": "~", "disable": "-", "confirm": " "}


async def sync(
    file: Path, identity: Path | None, *, dry_run: bool, force: bool, max_leaving: int, as_json: bool
) -> None:
    """Make the users of a provisioner match the file. Raises RingfenceError if a command failed."""
    async with Provisioner.connect(identity) as provisioner:
        delegation = await delegation_of(provisioner)
        file_users = read_users(file, {one.group for one in delegation.groups})
        sync_plan = await plan(provisioner, file_users)
        if not as_json:
            _show(sync_plan)
        if sync_plan.problems:
            raise InvalidCallError(
                Lines(["nothing was changed:", *(f"  {one}" for one in sync_plan.problems)])
            )
        if not force:
            sync_plan.check_leaving(max_leaving)
        results: dict[str, str | None] = {}
        if not dry_run:
            await carry_out(
                provisioner,
                file_users,
                sync_plan,
                lambda one, problem: results.update({one.user_id: problem}),
            )
    if as_json:
        print_json({"dry_run": dry_run, "users": [_as_json(one, results) for one in sync_plan.differences]})
    failed = {user_id: problem for user_id, problem in results.items() if problem}
    if failed:
        lines = [f"  {user_id}: {problem}" for user_id, problem in sorted(failed.items())]
        raise RingfenceError(Lines([f"{len(failed)} of {len(sync_plan.differences)} were refused:", *lines]))
    if not as_json:
        say("nothing was changed (--dry-run)" if dry_run else f"{len(results)} users are as the file says")


def read_users(file: Path, delegated: Collection[str]) -> dict[str, FileUser]:
    """Return the users in a file, by id. Raises YamlFileError with all mistakes."""
    source = YamlFile(file)
    top = source.members(source.root, "the file", {"users"})
    users: dict[str, FileUser] = {}
    if "users" not in top:
        source.problem(source.root, "the file has no `users`")
    else:
        for user_id, node in source.members(top["users"], "users").items():
            try:
                _A_NAME.validate_python(user_id)
            except ValidationError as error:
                source.problem(node, f"{user_id!r}: {explain(error)}")
            user = _parse_user(source, user_id, node, delegated)
            if user is not None:
                users[user_id] = user
    source.finish()
    return users


def _parse_user(source: YamlFile, user_id: str, node: Any, delegated: Collection[str]) -> FileUser | None:
    members = source.members(node, f"user {user_id}", _MEMBERS)
    if "name" not in members:
        source.problem(node, f"user {user_id} has no `name`")
        return None
    name = source.text(members["name"], "name")
    groups: list[str] = []
    if "groups" in members:
        for item, group in source.texts(members["groups"], "groups"):
            if group not in delegated:
                source.problem(item, f"the group {group!r} is not delegated to this provisioner")
            groups.append(group)
    active = source.flag(members["active"], "active") if "active" in members else True
    external_id = source.text(members["external_id"], "external_id") if "external_id" in members else None
    try:
        provisioning = Provisioning(
            groups=tuple(sorted(set(groups))),
            active=active,
            external_id=external_id or None,
            display_name=name or None,
        )
        return FileUser(name, provisioning)
    except ValidationError as error:
        source.problem(node, f"user {user_id}: {explain(error)}")
        return None


def _show(sync_plan: SyncPlan) -> None:
    same = 0
    for one in sync_plan.differences:
        if one.kind == "confirm":
            same += 1
            continue
        note(f"{_SIGNS[one.kind]} {one.user_id}  {'; '.join(map(visible, one.details))}")
    if same:
        note(f"  {same} as they should be, to be confirmed as of now")


def _as_json(one: UserChange, results: dict[str, str | None]) -> dict[str, Any]:
    problem = results.get(one.user_id)
    return {
        "user_id": one.user_id,
        "kind": one.kind,
        "details": list(one.details),
        "done": one.user_id in results and problem is None,
        **({"problem": problem} if problem else {}),
    }
