"""An MCP server on standard input and output, by the official SDK 1.x, that a test runs in a sandbox.

It writes to the folder of its first argument what it was asked, so that a test sees what got to it.
"""

from __future__ import annotations

import json
import os
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from mcp.server.fastmcp import Context, FastMCP

FOLDER = Path(sys.argv[1])
server = FastMCP("noted")


def note(what: str) -> None:
    with (FOLDER / "calls.txt").open("a") as file:
        file.write(f"{what}\n")


@server.tool()
def get_note(folder: str) -> str:
    note(f"get_note {folder}")
    return f"a note of {folder}"


@server.tool()
def delete_notes(folder: str) -> str:
    note(f"delete_notes {folder}")
    return f"nothing is left of {folder}"


@server.tool()
def get_environment(folder: str) -> str:
    return json.dumps(dict(os.environ))


@server.tool()
def get_page(folder: str, url: str) -> str:
    """As servers do that have a token in their environment."""
    request = urllib.request.Request(
        url, headers={"Authorization": f"Bearer {os.environ.get('NOTES_TOKEN', '')}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:
            return f"{answer.status} {answer.read().decode()}"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()}"
    except OSError as error:
        return f"none: {error}"


@server.tool()
async def get_changed(folder: str, context: Context[Any, Any]) -> str:
    """Tells the client that the list of tools has changed, and how far it got."""
    await context.report_progress(1, 2, "half")
    await context.session.send_tool_list_changed()
    return "told"


@server.tool()
async def get_slow(folder: str) -> str:
    import anyio

    note("get_slow began")
    try:
        await anyio.sleep(600)
    except BaseException:
        note("get_slow was cancelled")
        raise
    return "late"


if __name__ == "__main__":
    server.run()
