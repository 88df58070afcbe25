"""`ringfence adopt --wrap` of the real server-everything, with a token in the configuration of a client."""

from __future__ import annotations

import json
import shlex
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from mcp import ClientSession, McpError, StdioServerParameters
from mcp.client.stdio import stdio_client

from tests.mcp_sdks.conftest import NODE
from tests.runner.installation import Installation, NotesServer, installation
from tests.support.adopter import adopt_in
from tests.support.scan_corpus import Maker

TOKEN = Maker(46).crc_token("ghp")


@pytest.fixture
async def here() -> AsyncIterator[Installation]:
    async with installation() as made:
        yield made


async def test_server_everything_runs_in_a_sandbox_without_its_token(
    here: Installation, sdks: Path, tmp_path: Path
) -> None:
    config = tmp_path / ".cursor" / "mcp.json"
    config.parent.mkdir()
    server = sdks / "node_modules/@modelcontextprotocol/server-everything/dist/index.js"
    command = [str(sdks / NODE), str(server), "stdio"]
    entry = {"command": command[0], "args": command[1:], "env": {"GITHUB_TOKEN": TOKEN}}
    config.write_text(json.dumps({"mcpServers": {"everything": entry}}))
    with NotesServer() as hub:
        adopt_in(
            here, tmp_path, TOKEN, str(config), "--target", "hub", "--url", f"http://127.0.0.1:{hub.port}",
            "--agent", "hub-bot", "--agent-key", str(tmp_path / "bot.json"), "--trial", "/repos/acme/shop",
            "--wrap", shlex.join(command), "--mount", str(sdks),
        )  # fmt: skip
    assert TOKEN not in config.read_text()
    after = json.loads(config.read_text())["mcpServers"]["everything"]
    environment = {**here.environment(), **after["env"]}
    how = StdioServerParameters(
        command=after["command"], args=after["args"], env=environment, cwd=here.folder
    )
    with (tmp_path / "stderr").open("w") as errors:
        async with stdio_client(how, errors) as streams, ClientSession(*streams) as session:
            await session.initialize()
            listed = {one.name for one in (await session.list_tools()).tools}
            assert {"echo", "get-env"} <= listed
            assert "toggle-simulated-logging" not in listed
            said = (await session.call_tool("get-env", {})).model_dump_json()
            assert "replaced-by-ringfence" in said
            assert TOKEN not in said
            with pytest.raises(McpError) as refused:
                await session.call_tool("toggle-simulated-logging", {})
    (here.folder / ".ringfence/secrets/hub").write_text(Maker(47).crc_token("ghp"))
    adopt_in(here, tmp_path, TOKEN, "--target", "hub", "--finish")  # the agent is in the sandbox
    assert refused.value.error.data["code"] in ("beyond_scope", "beyond_lease")  # type: ignore[index]
