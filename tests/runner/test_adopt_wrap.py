"""`ringfence adopt --wrap`: an MCP server with a token in its client's configuration, and after it one in a sandbox."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mcp
import pytest
from mcp import ClientSession, McpError, StdioServerParameters
from mcp.client.stdio import stdio_client

from tests.runner.installation import Installation, NotesServer
from tests.support.adopter import adopt_in
from tests.support.scan_corpus import Maker

SITE = Path(mcp.__file__).parents[1]
PYTHON = Path(os.path.realpath(sys.executable))
BASE = Path(os.path.realpath(sys.base_prefix))
TOKEN = Maker(44).crc_token("ghp")
_HUB = """
import os, sys
sys.path.insert(0, sys.argv[1])
import httpx
from mcp.server.fastmcp import FastMCP
from mcp.types import ToolAnnotations
server = FastMCP("hub")
@server.tool(annotations=ToolAnnotations(readOnlyHint=True))
def get(path: str) -> str:
    token = os.environ["GITHUB_TOKEN"]
    answer = httpx.get(os.environ["HUB_URL"] + path, headers={"Authorization": "Bearer " + token})
    return f"{answer.status_code} {token}"
@server.tool(annotations=ToolAnnotations(readOnlyHint=True))
def look(path: str) -> str:
    return str(os.path.exists(path))
@server.tool()
def delete(path: str) -> str:
    return "deleted"
server.run()
"""


@pytest.fixture
def hub() -> Iterator[NotesServer]:
    """The provider."""
    with NotesServer() as server:
        yield server


@pytest.fixture
def config(hub: NotesServer, tmp_path: Path) -> Path:
    """The configuration of a client, which starts the server with its token."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "hub.py").write_text(_HUB)
    file = tmp_path / ".cursor" / "mcp.json"
    file.parent.mkdir()
    env = {"GITHUB_TOKEN": TOKEN, "HUB_URL": f"http://127.0.0.1:{hub.port}"}
    command = [str(PYTHON), str(tmp_path / "hub" / "hub.py"), str(SITE)]
    entry = {"command": command[0], "args": command[1:], "env": env}
    file.write_text(json.dumps({"mcpServers": {"hub": entry}}))
    return file


def words(hub: NotesServer, config: Path, target: str, command: str | None = None) -> list[str]:
    entry = json.loads(config.read_text())["mcpServers"]["hub"]
    mounts = [SITE, config.parents[1] / "hub", *([] if BASE.is_relative_to("/usr") else [BASE])]
    return [
        str(config), "--target", target, "--url", f"http://127.0.0.1:{hub.port}",
        "--agent", f"{target}-bot", "--agent-key", str(config.parents[1] / "bot.json"), "--trial", "/repos/acme/shop",
        "--wrap", command or shlex.join([entry["command"], *entry["args"]]),
        *(word for one in mounts for word in ("--mount", str(one))),
    ]  # fmt: skip


async def test_server_with_a_token_starts_in_a_sandbox_and_goes_back(
    here: Installation, hub: NotesServer, config: Path
) -> None:
    before = config.read_text()
    printed = adopt_in(here, config.parents[1], TOKEN, *words(hub, config, "hub"))
    assert "starts hub in a sandbox" in " ".join(printed.split())
    after = json.loads(config.read_text())["mcpServers"]["hub"]
    assert TOKEN not in config.read_text()
    assert "wrap" in after["args"]
    assert "GITHUB_TOKEN=replaced-by-ringfence" in after["args"]

    environment = {**here.environment(), **after["env"]}
    how = StdioServerParameters(
        command=after["command"], args=after["args"], env=environment, cwd=here.folder
    )
    with (config.parent / "stderr").open("w") as errors:
        async with stdio_client(how, errors) as streams, ClientSession(*streams) as session:
            await session.initialize()
            assert {one.name for one in (await session.list_tools()).tools} == {"get", "look"}

            async def text(tool: str, path: Path | str) -> str:
                (content,) = (await session.call_tool(tool, {"path": str(path)})).content
                return str(content.text) if content.type == "text" else ""

            assert await text("get", "/repos/acme/site") == "200 replaced-by-ringfence"
            assert await text("get", "/user") == "403 replaced-by-ringfence"
            secrets = here.folder / ".ringfence/secrets"
            assert (secrets / "hub").read_text() == TOKEN
            assert await text("look", secrets) == "False"
            with pytest.raises(McpError) as refused:
                await session.call_tool("delete", {"path": "x"})
            assert code_of(refused.value) in ("beyond_scope", "beyond_lease")
    assert hub.authorizations[-1] == f"Bearer {TOKEN}"

    adopt_in(here, config.parents[1], TOKEN, "--target", "hub", "--undo")
    assert config.read_text() == before
    shown = here.say("target", "show", "hub-tools", who="olga")
    assert shown["state"]["status"] == "removed"


def code_of(error: McpError) -> str:
    data: Any = error.error.data
    return str(data["code"])


def test_other_command_than_that_in_the_file_is_refused(
    here: Installation, hub: NotesServer, config: Path
) -> None:
    printed = adopt_in(
        here, config.parents[1], TOKEN, *words(hub, config, "hub-2", command="/bin/true"), status=1
    )
    assert "another command than that in the file" in printed
    assert TOKEN in config.read_text()


def test_server_with_a_second_credential_is_refused(
    here: Installation, hub: NotesServer, config: Path
) -> None:
    document = json.loads(config.read_text())
    document["mcpServers"]["hub"]["env"]["NPM_TOKEN"] = Maker(45).crc_token("npm")
    config.write_text(json.dumps(document))
    given = [*words(hub, config, "hub-3"), "--field", "mcpServers.hub.env.GITHUB_TOKEN"]
    printed = adopt_in(here, config.parents[1], TOKEN, *given, status=1)
    assert "has another credential" in printed
