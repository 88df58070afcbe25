"""An MCP server by the official Python SDK 2.x. Prints its port, then a line of JSON for each call."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Annotated, Any

import uvicorn
from mcp.server.caching import CacheHint
from mcp.server.mcpserver import Context, Elicit, MCPServer, Resolve
from mcp_types import Completion
from pydantic import BaseModel, Field


def note(**said: Any) -> None:
    """Tell the test what reached the server."""
    print(json.dumps(said), flush=True)


class Confirmed(BaseModel):
    """What the client's user says."""

    ok: bool


server = MCPServer(
    "repos",
    cache_hints={
        "tools/list": CacheHint(3_600_000, "public"),
        "server/discover": CacheHint(3_600_000, "public"),
    },
)


@server.tool()
def get_issue(repo: str) -> str:
    note(called="get_issue", repo=repo)
    return f"an issue of {repo}"


@server.tool()
def push(repo: str, dry_run: bool = False) -> str:
    note(called="push", repo=repo)
    return "pushed"


@server.tool()
def get_wrong(repo: str) -> str:
    raise ValueError(f"{repo} is broken")


@server.tool()
def get_routed(repo: Annotated[str, Field(json_schema_extra={"x-mcp-header": "Repository"})]) -> str:
    """A tool whose argument is repeated in the header `Mcp-Param-Repository`."""
    note(called="get_routed", repo=repo)
    return f"routed to {repo}"


def confirm(repo: str) -> Elicit[Confirmed]:
    """Ask the client's user, in a round of its own."""
    return Elicit(f"really {repo}?", Confirmed)


@server.tool()
def get_confirmed(repo: str, confirmed: Annotated[Confirmed, Resolve(confirm)]) -> str:
    note(called="get_confirmed", repo=repo, ok=confirmed.ok)
    return f"confirmed: {confirmed.ok}"


@server.tool()
async def get_changed(repo: str, context: Context) -> str:
    """Tell subscribers that lists and two resources changed."""
    await context.notify_tools_changed()
    await context.notify_resource_updated("note:///b")
    await context.notify_resource_updated("note:///a")
    return repo


@server.prompt()
def review(repo: str = "") -> str:
    return "look at it"


@server.prompt()
def merge() -> str:
    return "merge it"


@server.resource("note:///a")
def note_a() -> str:
    return "note a"


@server.resource("note:///b")
def note_b() -> str:
    return "note b"


@server.completion()
async def complete(ref: Any, argument: Any, context: Any) -> Completion:
    note(completed=getattr(ref, "name", None) or getattr(ref, "uri", None))
    return Completion(values=[f"{argument.value}{end}" for end in ("1", "2")])


async def main(json_response: bool) -> None:
    """Serve until the process is ended."""
    app = server.streamable_http_app(json_response=json_response)

    async def noting(scope: Any, receive: Any, send: Any) -> None:
        for name, value in scope.get("headers", ()):
            if name == b"authorization":
                note(token=value.decode())
        await app(scope, receive, send)

    own = uvicorn.Server(uvicorn.Config(noting, port=0, log_level="error", timeout_graceful_shutdown=1))
    task = asyncio.create_task(own.serve())
    while not own.started:
        await asyncio.sleep(0.01)
    note(port=own.servers[0].sockets[0].getsockname()[1])
    await task


if __name__ == "__main__":
    asyncio.run(main("json" in sys.argv[1:]))
