"""The server of docs/gateway-mcp.md, with version 1 of MCP's Python SDK (pip install 'mcp<2')."""

from mcp.server.fastmcp import FastMCP

server = FastMCP("notes", port=9002)


@server.tool()
def get_note(folder: str) -> str:
    """Read a note."""
    return f"a note of {folder}"


@server.tool()
def delete_notes(folder: str) -> str:
    """Delete all notes of a folder."""
    return f"nothing is left of {folder}"


if __name__ == "__main__":
    server.run(transport="streamable-http")
