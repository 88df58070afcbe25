"""Real `git` through the gateway, before `git http-backend` behind nginx: each ref of a push is decided."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from ringfence.backends.http import StaticSecrets
from ringfence.backends.secret_sources import TargetAccess
from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.dev.processes import free_port
from ringfence.messages.registry import VerbFloor
from tests.gateway.agents import Outcome
from tests.gateway.git_server import SECRET, USER, GitServer, commit, environment, git, git_server
from tests.gateway.mcp_place import McpPlace, mcp_placed
from tests.support.in_memory_registry import permission

TEMPLATE = TEMPLATES["git"]
WIDE = permission("**", verbs=tuple(TEMPLATE.verbs))
REPO = "repo/octo/hello"
READER = permission(REPO, verbs=("fetch",))
WRITER = permission(REPO, f"{REPO}/ref/heads/agent/**", f"{REPO}/ref/tags/v*", verbs=("fetch", "push", "tag"))
DELETER = permission(REPO, f"{REPO}/ref/**", verbs=tuple(TEMPLATE.verbs))
ZEROS = "0" * 40


@dataclass
class GitPlace:
    """The gateway before the server, and agent `bot` with a clone."""

    place: McpPlace
    server: GitServer
    bare: Path
    url: str
    work: Path

    async def git(self, *argv: str, cwd: Path | None = None) -> Outcome:
        process = await asyncio.create_subprocess_exec(
            "git", *argv, cwd=cwd or self.work, env=environment(), stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        out, err = await asyncio.wait_for(process.communicate(), 50)
        assert SECRET.encode() not in out + err
        assert process.returncode is not None
        return Outcome(process.returncode, out.decode(), err.decode())

    async def clone(self, *options: str) -> None:
        outcome = await self.git("clone", "-q", *options, self.url, str(self.work), cwd=self.server.folder)
        assert outcome.code == 0, outcome

    def refs(self) -> dict[str, str]:
        lines = git(self.bare, "for-each-ref", "--format=%(refname) %(objectname)").splitlines()
        return {line.partition(" ")[0]: line.partition(" ")[2] for line in lines}

    @property
    def actions(self) -> list[tuple[bool, str | None, str | None]]:
        return [(one.allowed, one.verb, one.resource) for one in self.place.events]


@contextlib.asynccontextmanager
async def git_placed(folder: Path, *leases: Any) -> AsyncIterator[GitPlace]:
    secret = folder / "token"
    secret.touch(mode=0o600)
    secret.write_text(SECRET)
    verbs = tuple(VerbFloor(verb=verb, floor=floor) for verb, floor in TEMPLATE.verbs.items())
    (folder / "server").mkdir()
    with git_server(folder / "server") as server:
        bare = server.repository("octo/hello.git")
        async with mcp_placed(
            server.port, folder, *leases, rules=TEMPLATE.requests, verbs=verbs,
            settings={"kind": "http", "auth": "basic", "username": USER}, wide=WIDE,
            secrets=StaticSecrets(TargetAccess({"staging": f"file:{secret}"})),
        ) as place:  # fmt: skip
            assert place.plane is not None
            port = free_port()
            await place.plane.listen("127.0.0.1", port, names=[f"localhost:{port}"])
            url = f"http://localhost:{port}/staging/octo/hello.git"
            yield GitPlace(place, server, bare, url, folder / "work")


@pytest.mark.tools
@pytest.mark.parametrize("version", [0, 1, 2])
@pytest.mark.parametrize(
    "options", [(), ("--depth=1",), ("--filter=blob:none",)], ids=["whole", "shallow", "partial"]
)
async def test_git_clones_and_fetches(tmp_path: Path, version: int, options: tuple[str, ...]) -> None:
    async with git_placed(tmp_path, READER) as place:
        await place.clone("-c", f"protocol.version={version}", *options)
        assert (place.work / "file-1").read_text() == "file-1"
        commit(place.server.folder / "seed/octo/hello.git", "later")
        git(place.server.folder / "seed/octo/hello.git", "push", "-q", str(place.bare), "main")
        outcome = await place.git("pull", "-q")
        assert outcome.code == 0, outcome
        assert (place.work / "later").exists()
        assert set(place.actions) == {(True, "fetch", REPO)}
        sent = f'protocol="version={version}"' if version else 'protocol="-"'
        assert all(sent in line for line in place.server.requests)


@pytest.mark.tools
async def test_git_pushes_branches_and_tags(tmp_path: Path) -> None:
    async with git_placed(tmp_path, WRITER) as place:
        await place.clone()
        head = commit(place.work, "change")
        git(place.work, "tag", "v1")
        outcome = await place.git(
            "push", "-q", "origin", "HEAD:refs/heads/agent/a", "HEAD:refs/heads/agent/b", "v1"
        )
        assert outcome.code == 0, outcome
        assert {place.refs()[f"refs/{ref}"] for ref in ("heads/agent/a", "heads/agent/b", "tags/v1")} == {
            head
        }
        pushed = [f"{REPO}/ref/heads/agent/a", f"{REPO}/ref/heads/agent/b"]
        assert place.actions[-3:] == [
            (True, "push", pushed[0]), (True, "push", pushed[1]), (True, "tag", f"{REPO}/ref/tags/v1"),
        ]  # fmt: skip


@pytest.mark.tools
async def test_one_refused_ref_refuses_the_push(tmp_path: Path) -> None:
    async with git_placed(tmp_path, WRITER) as place:
        await place.clone()
        before = place.refs()
        commit(place.work, "change")
        outcome = await place.git("push", "origin", "HEAD:refs/heads/agent/a", "HEAD:main")
        assert outcome.code == 1
        assert (
            f"[remote rejected] HEAD -> main (beyond_lease: no live lease allows push on {REPO}/ref/heads/main"
            in (outcome.err)
        )
        assert f"--allow staging:push:{REPO}/ref/heads/main" in outcome.err
        assert place.refs() == before
        assert not any(line.startswith("POST") and "receive-pack" in line for line in place.server.requests)


@pytest.mark.tools
@pytest.mark.parametrize(
    ("push", "verb", "ref"),
    [
        (("--force", "HEAD~1:main"), "push", "heads/main"),
        (("--delete", "main"), "delete", "heads/main"),
        (("--delete", "agent/a"), "delete", "heads/agent/a"),
        (("HEAD:refs/notes/x",), "push-other", "notes/x"),
        (("HEAD:refs/for/main",), "push-other", "for/main"),
        (("v1:refs/tags/w1",), "tag", "tags/w1"),
        (("--atomic", "HEAD:refs/heads/agent/b", "HEAD:refs/heads/c"), "push", "heads/c"),
        (("--mirror",), "delete", "heads/agent/a"),
    ],
    ids=["force", "delete", "delete own", "notes", "review", "other tag", "atomic", "mirror"],
)
async def test_push_needs_the_verb_of_each_ref(
    tmp_path: Path, push: tuple[str, ...], verb: str, ref: str
) -> None:
    async with git_placed(tmp_path, WRITER) as place:
        await place.clone()
        git(place.bare, "branch", "agent/a", "main")
        git(place.work, "tag", "v1")
        before = place.refs()
        outcome = await place.git("push", "origin", *push)
        assert outcome.code == 1
        assert f"beyond_lease: no live lease allows {verb} on {REPO}/ref/{ref} at staging" in outcome.err
        assert place.refs() == before
        assert place.actions[-1] == (False, verb, f"{REPO}/ref/{ref}")


@pytest.mark.tools
async def test_delete_and_other_refs_with_a_lease_for_them(tmp_path: Path) -> None:
    async with git_placed(tmp_path, DELETER) as place:
        git(place.bare, "branch", "old", "main")
        await place.clone()
        outcome = await place.git("push", "-q", "origin", ":old", "HEAD:refs/notes/x", "+HEAD~1:main")
        assert outcome.code == 0, outcome
        outcome = await place.git("push", "-q", "--delete", "origin", "refs/notes/x")
        assert outcome.code == 0, outcome
        assert place.refs() == {"refs/heads/main": git(place.work, "rev-parse", "HEAD~1")}


@pytest.mark.tools
@pytest.mark.parametrize(
    ("argv", "verb"),
    [
        (("fetch",), "fetch on repo/octo/other"),
        (("push", "HEAD:main"), "push on repo/octo/other/ref/**"),
    ],
    ids=["fetch", "push"],
)
async def test_git_shows_why_a_repository_is_refused(
    tmp_path: Path, argv: tuple[str, ...], verb: str
) -> None:
    async with git_placed(tmp_path, WRITER) as place:
        place.server.repository("octo/other.git")
        await place.clone()
        seen = len(place.server.requests)
        command, *rest = argv
        outcome = await place.git(command, place.url.replace("hello", "other"), *rest)
        assert outcome.code != 0
        assert f"remote: beyond_lease: no live lease allows {verb} at staging" in outcome.err
        assert "remote: ask for it: ringfence request --task" in outcome.err
        assert len(place.server.requests) == seen


@pytest.mark.tools
async def test_git_finds_no_push_options(tmp_path: Path) -> None:
    async with git_placed(tmp_path, WRITER) as place:
        await place.clone()
        outcome = await place.git("push", "--push-option=ci.skip", "origin", "HEAD:refs/heads/agent/a")
        assert "the receiving end does not support push options" in outcome.err


@pytest.mark.tools
async def test_long_pack_is_streamed_and_a_refused_one_reported(tmp_path: Path) -> None:
    """The pack is longer than what Git sends at once, so Git probes first, and sends it in chunks."""
    megabytes = int(os.environ.get("RINGFENCE_TEST_PACK_MB", "32"))
    async with git_placed(tmp_path, WRITER) as place:
        await place.clone()
        git(place.work, "config", "core.compression", "0")
        git(place.work, "config", "pack.window", "0")
        for number in range(megabytes // 8):
            commit(place.work, f"large-{number}", os.urandom(8 * 1024 * 1024))
        refused = await place.git("push", "-q", "origin", "HEAD:main")
        assert refused.code == 1
        assert "[remote rejected] HEAD -> main (beyond_lease:" in refused.err
        before_kb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome = await place.git("push", "-q", "origin", "HEAD:refs/heads/agent/a")
        assert outcome.code == 0, outcome
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kb < 12 * 1024
        posted = [
            line for line in place.server.requests if line.startswith("POST /octo/hello.git/git-receive")
        ]
        assert len(posted) == 3, "two probes and a pack"
        assert place.refs()["refs/heads/agent/a"] == git(place.work, "rev-parse", "HEAD")
