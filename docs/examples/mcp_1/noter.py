"""The agent of docs/gateway-mcp.md, with version 1 of MCP's Python SDK (pip install 'mcp<2')."""

import asyncio
import sys

import httpx
from mcp import ClientSession, McpError
from mcp.client.streamable_http import streamable_http_client


async def main(socket: str) -> None:
    """Show the tools, and call three times."""
    async with (
        httpx.AsyncClient(transport=httpx.AsyncHTTPTransport(uds=socket)) as http,
        streamable_http_client("http://gateway/notes/mcp", http_client=http) as (read, write, _),
        ClientSession(read, write) as session,
    ):
        await session.initialize()
        print([tool.name for tool in (await session.list_tools()).tools])
        for tool, folder in (("get_note", "today"), ("get_note", "private"), ("delete_notes", "today")):
            try:
                print((await session.call_tool(tool, {"folder": folder})).content[0].text)
            except McpError as error:
                print(error.error.code, error.error.message)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
