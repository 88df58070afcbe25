"""Users as a YAML file says that they are, by commands alone."""

from __future__ import annotations

import gc
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ringfence.cli.commands.user_sync import read_users
from ringfence.cli.shared.yaml_files import YamlFileError
from ringfence.messages.registry import UserRecord, UserState
from ringfence.messages.topics import USER
from tests.flows.test_cli import Shell
from tests.support.world import World

DELEGATION = """\
source: hr-file
groups:
  Developers:
    allow:
      - platform:deploy:env/staging/*
  Leads:
    roles: [sponsor]
    allow: ["platform:read:**"]
"""
USERS = """\
users:
  maria:
    name: Maria Ortiz
    groups: [Developers]
    external_id: "1001"
  noor:
    name: Noor Haddad
    groups: [Developers, Leads]
"""


@pytest.fixture
async def shell(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Shell]:
    """A registry; olga the operator has her key file, and `hr` is a provisioner."""
    async with world.running("registry"):
        shared = world.settings("registry")
        for name in [name for name in os.environ if name.startswith("RINGFENCE_")]:
            monkeypatch.delenv(name)
        for name in ("kafka", "topic_prefix", "trust_domain", "trust_root", "embedded_broker"):
            monkeypatch.setenv(f"RINGFENCE_{name.upper()}", str(getattr(shared, name)))
        world.operator.key.save(tmp_path / "olga.json")
        (tmp_path / "delegation.yaml").write_text(DELEGATION)
        (tmp_path / "users.yaml").write_text(USERS)
        shell = Shell(tmp_path, capsys)
        await shell(
            "olga", "provisioner", "set", "hr", "--name", "HR", "--delegation", str(tmp_path / "delegation.yaml"),
            "--new-key", str(tmp_path / "hr.json"),
        )  # fmt: skip
        gc.disable()
        try:
            yield shell
        finally:
            gc.enable()


async def test_changed_delegation_is_shown_and_needs_confirmation(shell: Shell) -> None:
    file = shell.folder / "delegation.yaml"
    change = ("provisioner", "set", "hr", "--delegation", str(file))
    await shell("olga", *change)  # nothing changes, and nobody is asked
    file.write_text(DELEGATION.replace("platform:", "platfrom:"))
    assert "add --yes" in await shell("olga", *change, status=2)
    assert "group " in shell.noted
    await shell("olga", *change, "--yes")
    assert "warning: there is no target platfrom" in shell.noted
    assert "add --yes" in await shell("olga", "provisioner", "disable", "hr", "--reason", "x", status=2)


async def state(world: World, user_id: str) -> UserState | None:
    found = [record for record in await world.records(USER) if record.key == user_id]
    return world.opened(found[-1], UserRecord, "registry").state if found else None


async def sync(shell: Shell, *args: str, status: int = 0) -> str:
    return await shell("hr", "user", "sync", str(shell.folder / "users.yaml"), *args, status=status)


async def kinds(shell: Shell, *args: str) -> dict[str, str]:
    """What a dry run would do."""
    found = await shell.json("hr", "user", "sync", str(shell.folder / "users.yaml"), "--dry-run", *args)
    return {one["user_id"]: one["kind"] for one in found["users"]}


async def test_users_become_what_the_file_says(shell: Shell, world: World) -> None:
    assert await kinds(shell) == {"maria": "add", "noor": "add"}
    assert await state(world, "maria") is None
    assert "2 users are as the file says" in await sync(shell)
    noor = await state(world, "noor")
    assert noor is not None
    assert (noor.roles, len(noor.entitlements.scope), noor.entitlements.source) == (
        ("sponsor",),
        2,
        "hr-file",
    )
    assert await kinds(shell) == {"maria": "confirm", "noor": "confirm"}

    (shell.folder / "users.yaml").write_text(USERS.replace("[Developers, Leads]", "[Developers]"))
    found = await shell.json("hr", "user", "sync", str(shell.folder / "users.yaml"))
    changed = {one["user_id"]: (one["kind"], one["done"]) for one in found["users"]}
    assert changed == {"maria": ("confirm", True), "noor": ("change", True)}
    noor = await state(world, "noor")
    assert noor is not None
    assert noor.roles == ()


async def test_user_missing_from_the_file_is_disabled_and_can_return(shell: Shell, world: World) -> None:
    await sync(shell)
    (shell.folder / "users.yaml").write_text(USERS.partition("  noor")[0])
    assert await kinds(shell) == {"maria": "confirm", "noor": "disable"}
    await sync(shell)
    noor = await state(world, "noor")
    assert noor is not None
    assert noor.status == "disabled"
    (shell.folder / "users.yaml").write_text(USERS)
    await sync(shell)
    noor = await state(world, "noor")
    assert noor is not None
    assert noor.status == "active"


async def test_a_file_that_was_cut_short_disables_nobody(shell: Shell, world: World) -> None:
    many = "users:\n" + "".join(f"  user{n}: {{name: User {n}}}\n" for n in range(12))
    (shell.folder / "users.yaml").write_text(many)
    await sync(shell)
    (shell.folder / "users.yaml").write_text(many.partition("  user9")[0])
    told = await sync(shell, status=1)
    assert "3 of 12 active users" in told
    assert "--force" in told
    user = await state(world, "user10")
    assert user is not None
    assert user.status == "active"
    await sync(shell, "--max-leaving", "25")
    user = await state(world, "user10")
    assert user is not None
    assert user.status == "disabled"
    (shell.folder / "users.yaml").write_text("users: {}\n")
    await sync(shell, status=1)
    await sync(shell, "--force")


async def test_sync_leaves_users_that_an_operator_made_or_disabled(shell: Shell, world: World) -> None:
    await world.user("maria")
    told = await sync(shell, status=1)
    assert "maria does not come from hr" in told
    assert await state(world, "noor") is None
    (shell.folder / "users.yaml").write_text(USERS.replace("maria:", "mira:"))
    await sync(shell)
    await shell("olga", "user", "disable", "noor", "--reason", "stolen laptop", "--yes")
    assert "noor was disabled by an operator" in await sync(shell, status=1)
    await shell("olga", "user", "set", "noor", "--new-key", str(shell.folder / "noor.json"), "--yes")
    await sync(shell)
    noor = await state(world, "noor")
    assert noor is not None
    assert (noor.status, len(noor.keys), noor.roles) == ("active", 1, ("sponsor",))
    await shell("olga", "user", "set", "noor", "--take-over")
    assert "noor does not come from hr" in await sync(shell, status=1)


async def test_sync_by_anyone_but_a_provisioner_is_refused(shell: Shell) -> None:
    told = await shell("olga", "user", "sync", str(shell.folder / "users.yaml"), status=1)
    assert "olga is no provisioner" in told


WRONG = """\
users:
  Maria:
    name: Maria
  sam:
    groups: Developers
  noor:
    name:
    active: maybe
    groups: [Developers, Admins]
    phone: 12
  noor:
    name: Twice
extra: 1
"""


def test_every_mistake_in_the_users_file_is_reported_with_its_line(tmp_path: Path) -> None:
    file = tmp_path / "users.yaml"
    file.write_text(WRONG)
    with pytest.raises(YamlFileError) as caught:
        read_users(file, {"Developers"})
    said = str(caught.value).splitlines()
    lines = [int(line.removeprefix(f"{file}:").partition(":")[0]) for line in said]
    assert lines == [3, 5, 7, 8, 9, 10, 11, 13]
    for word in (
        "'Maria'",
        "no `name`",
        "a text",
        "true or false",
        "'Admins'",
        "'phone'",
        "twice",
        "'extra'",
    ):
        assert word in str(caught.value), word


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "empty"),
        ("users: [\n", "line 2"),
        ("users:\n  a: &x {name: A}\n  b: *x\n", ":3: aliases"),
        ("- maria\n", "mapping"),
        ("users:\n  a: !!python/object:os.system {name: A}\n  b: 1\n", "mapping"),
        ("[" * 2000, "nested"),
    ],
)
def test_invalid_users_file_is_rejected(tmp_path: Path, text: str, word: str) -> None:
    file = tmp_path / "users.yaml"
    file.write_text(text)
    with pytest.raises(YamlFileError, match=word):
        read_users(file, ())
