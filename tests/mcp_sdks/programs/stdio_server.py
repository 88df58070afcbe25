"""An MCP server on standard input and output by the official Python SDK 2.x, which a test runs in a sandbox."""

from __future__ import annotations

from mcp.server.mcpserver import MCPServer

server = MCPServer("noted")


@server.tool()
def get_note(folder: str) -> str:
    return f"a note of {folder}"


@server.tool()
def delete_notes(folder: str) -> str:
    return f"nothing is left of {folder}"


if __name__ == "__main__":
    server.run()
