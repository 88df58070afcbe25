"""What services and `dev` write is for their user alone: under any umask, and where wider files stood before."""

from __future__ import annotations

import asyncio
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from ringfence.dev.processes import Child, spawn
from ringfence.messages.base import ServiceRole
from ringfence.messages.registry import BackendSettings
from tests.support.world import World

WITHIN_S = 60.0
UMASKS = (0, 0o022)
INDEX = ("audit.sqlite", "audit-tree.sqlite")
SPOOL = ("lock", "published", "000000000001.spool")


def wide(folder: Path, *files: str) -> None:
    """The folder, and files in it, as a version of before or another program left them: open to everybody."""
    folder.mkdir(parents=True)
    for name in files:
        (folder / name).touch()
        (folder / name).chmod(0o666)
    folder.chmod(0o777)


def open_to_others(folder: Path) -> dict[str, str]:
    """What others have access to, the folder itself with it: by name, its mode."""
    everything = [folder, *folder.rglob("*")]
    modes = {str(path): stat.S_IMODE(path.lstat().st_mode) for path in everything if not path.is_symlink()}
    return {path: oct(mode) for path, mode in modes.items() if mode & 0o077}


@contextmanager
def serving(
    world: World, role: ServiceRole, umask: int, folder: Path, is_there: Callable[[], bool], **more: str
) -> Iterator[Child]:
    settings = world.settings(role)
    given = settings.model_dump(mode="json", exclude_none=True, exclude_defaults=True)
    environment = {f"RINGFENCE_{name.upper()}": str(value) for name, value in given.items()}
    child = spawn(
        role, [sys.executable, "-m", "ringfence.cli.main", "serve", role], log_path=folder / f"{role}.log",
        env={**os.environ, "RINGFENCE_CONFIG": os.devnull, **environment, **more}, umask=umask,
    )  # fmt: skip

    def ready() -> bool:
        try:
            httpx.get(f"http://{settings.http}/healthz", timeout=5, trust_env=False)
        except httpx.HTTPError:
            return False
        return is_there()

    try:
        child.wait_until(ready, WITHIN_S, "wrote its files")
        yield child
    finally:
        child.kill()


@pytest.mark.parametrize("umask", UMASKS, ids=oct)
async def test_audits_indexes_are_for_its_user_alone(world: World, tmp_path: Path, umask: int) -> None:
    state = tmp_path / "parent" / "state"
    beside = [f"{name}{suffix}" for name in INDEX for suffix in ("", "-journal", "-wal", "-shm")]
    wide(state, *beside)

    def written() -> bool:
        return all((state / name).stat().st_size > 0 for name in INDEX)

    with serving(world, "audit", umask, tmp_path, written, RINGFENCE_STATE_DIR=str(state)):
        assert open_to_others(state) == {}
        assert sorted(path.name for path in state.iterdir()) == sorted(INDEX)


async def test_a_state_folder_that_is_not_there_is_made_with_all_above_it(
    world: World, tmp_path: Path
) -> None:
    top = tmp_path / "top"
    state = top / "in" / "state"

    def written() -> bool:
        return all((state / name).exists() for name in INDEX)

    with serving(world, "audit", 0, tmp_path, written, RINGFENCE_STATE_DIR=str(state)):
        assert open_to_others(top) == {}


@pytest.mark.parametrize("umask", UMASKS, ids=oct)
async def test_a_gateways_files_are_for_its_user_alone(world: World, tmp_path: Path, umask: int) -> None:
    spool, sockets, certificate = (
        tmp_path / "spool",
        tmp_path / "deep" / "sockets",
        tmp_path / "gateway-ca.pem",
    )
    wide(spool, *SPOOL)
    async with world.running("registry"):
        await world.target(
            "web",
            backend=BackendSettings.model_validate(
                {"kind": "http", "url": "https://web.example.com", "auth": "bearer"}
            ),
        )

    with serving(
        world, "gateway", umask, tmp_path, certificate.exists,
        RINGFENCE_GATEWAY_SPOOL=str(spool), RINGFENCE_GATEWAY_SOCKETS=str(sockets),
        RINGFENCE_GATEWAY_CA_FILE=str(certificate),
    ):  # fmt: skip
        assert len(list(spool.iterdir())) > 1
        assert open_to_others(spool) == open_to_others(tmp_path / "deep") == {}
        # Agents that run as somebody else trust it: they read it, and nobody else writes it.
        assert stat.S_IMODE(certificate.stat().st_mode) == 0o644


@pytest.mark.parametrize("umask", UMASKS, ids=oct)
async def test_dev_state_is_readable_by_its_user_alone(tmp_path: Path, umask: int) -> None:
    """The broker and Redis with it: they are programs of others."""
    state = tmp_path / "above" / "state"
    wide(state, "lock", "ringfence.toml")
    (state / "logs").mkdir()
    (state / "logs").chmod(0o777)
    (state / "logs" / "registry.log").touch()
    (state / "logs" / "registry.log").chmod(0o666)
    program = """
import os, sys
from pathlib import Path
from ringfence.cli.commands.dev import write_config
from ringfence.dev.stack import Stack, StackOptions

state, umask = Path(sys.argv[1]), int(sys.argv[2])
os.umask(umask)
with Stack(StackOptions(state, services=("registry",))) as stack:
    write_config(stack.environment(), state / "ringfence.toml")
    print("ready", flush=True)
    sys.stdin.read()
"""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", program, str(state), str(umask),
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(WITHIN_S):
            assert await process.stdout.readline() == b"ready\n"
        names = {path.name for path in state.rglob("*")}
        assert {"root.json", "trust-bundle.jws", "registry.log", "kafka.log", "ringfence.toml"} <= names
        assert any((state / "kafka").iterdir())
        found = open_to_others(state)
        # This one stood there before; nobody else gets to it by a folder that is closed.
        assert found.pop(str(state / "logs")) == "0o777"
        assert found == {}
    finally:
        process.stdin.close()
        async with asyncio.timeout(WITHIN_S):
            await process.wait()
