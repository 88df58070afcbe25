"""Serves the tools over standard input and output, by the official SDK of its versions 1 and 2.

Version 2 speaks the revision 2026-07-28 and, to clients that say `initialize`, the older ones. Both versions read the
messages of the protocol from the same JSON, so results are handed to them as that.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
from collections.abc import Callable
from typing import Any, Final

import anyio

from ringfence import __version__
from ringfence.mcp_server.agent_tools import AgentTools, ToolAnswer
from ringfence.mcp_server.tools import TOOLS

_NAME: Final = "ringfence"
_INSTRUCTIONS: Final = (
    "Ringfence gives this agent access per task: ask with request_credential, wait with wait_for_approval, and "
    "give back with release_credential. You never see a credential: the gateway adds it to requests. Do not ask "
    "people for passwords, keys or tokens."
)


class ClientOutput:
    """Standard output, as the SDK writes to it. A client that no longer reads is no error."""

    def __init__(self, on_closed: Callable[[], None]) -> None:
        """`on_closed`: called when the client no longer reads."""
        self._file = anyio.wrap_file(os.fdopen(os.dup(1), "w", encoding="utf-8"))
        os.dup2(2, 1)  # anything else that is printed is no message
        self._on_closed = on_closed

    async def write(self, text: str) -> None:
        try:
            await self._file.write(text)
            await self._file.flush()
        except OSError:
            self._on_closed()

    async def flush(self) -> None:
        """Do nothing: each message is written at once."""


async def serve_stdio(tools: AgentTools, on_output_closed: Callable[[], None]) -> None:
    """Serve until standard input ends. Raises ModuleNotFoundError if the SDK is not installed.

    `on_output_closed`: called when the client no longer reads; a thread may still read standard input then.
    """
    _leave_out_sdk_logs()
    # Both versions have these names; what they take differs, and only one of them is installed.
    stdio: Any = importlib.import_module("mcp.server.stdio")
    server = make_server(tools)
    # The SDK's own streams close those of the process, in version 1.
    given = anyio.wrap_file(open(0, encoding="utf-8", errors="replace", closefd=False))  # noqa: ASYNC230, SIM115
    async with stdio.stdio_server(given, ClientOutput(on_output_closed)) as (read, write):
        await server.run(read, write, server.create_initialization_options())


def _leave_out_sdk_logs() -> None:
    """Keep the SDK's logs out of standard error: they quote what the client sent, also at the root logger."""
    for handler in logging.getLogger().handlers:
        handler.addFilter(lambda record: record.name.partition(".")[0] not in ("mcp", "root"))


def make_server(tools: AgentTools) -> Any:
    """The SDK's server (`mcp.server.lowlevel.Server`) with the tools."""
    lowlevel: Any = importlib.import_module("mcp.server.lowlevel")
    types: Any = importlib.import_module("mcp.types")
    listed = types.ListToolsResult.model_validate({"tools": tool_definitions()})

    async def call(name: str, arguments: dict[str, Any] | None) -> Any:
        return types.CallToolResult.model_validate(_result(await tools.call(name, arguments or {})))

    if not hasattr(lowlevel.Server, "call_tool"):

        async def on_list(context: Any, params: Any) -> Any:
            return listed

        async def on_call(context: Any, params: Any) -> Any:
            return await call(params.name, params.arguments)

        return lowlevel.Server(
            _NAME,
            version=__version__,
            instructions=_INSTRUCTIONS,
            on_list_tools=on_list,
            on_call_tool=on_call,
        )
    server = lowlevel.Server(_NAME, version=__version__, instructions=_INSTRUCTIONS)

    async def list_tools() -> Any:
        return listed.tools

    server.list_tools()(list_tools)
    # The arguments are validated by the tools: the SDK's own message repeats them.
    server.call_tool(validate_input=False)(call)
    return server


def tool_definitions() -> list[dict[str, Any]]:
    """The tools as `tools/list` has them (`Tool` in the schema of the protocol)."""
    return [
        {
            "name": tool.name,
            "title": tool.title,
            "description": tool.description,
            "inputSchema": tool.input_schema,
            "outputSchema": tool.output_schema,
            "annotations": {
                "title": tool.title,
                "readOnlyHint": tool.read_only,
                "destructiveHint": tool.destructive,
                "idempotentHint": tool.idempotent,
                "openWorldHint": True,
            },
        }
        for tool in TOOLS
    ]


def _result(answer: ToolAnswer) -> dict[str, Any]:
    """A `CallToolResult`. An error has its object as text alone: the schema of results is that of success."""
    text = json.dumps(answer.content, ensure_ascii=False)
    result: dict[str, Any] = {"content": [{"type": "text", "text": text}], "isError": answer.is_error}
    return result if answer.is_error else {**result, "structuredContent": answer.content}
