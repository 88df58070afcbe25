"""An agent with the official Python SDK 1.x, which takes the same as `client.py`."""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

import mcp.types as types
from mcp import ClientSession, McpError
from mcp.client.streamable_http import streamablehttp_client


async def elicited(context: Any, asked: Any) -> types.ElicitResult:
    """The user says yes."""
    return types.ElicitResult(action="accept", content={"ok": True})


async def done(session: ClientSession, opened: types.InitializeResult, step: list[Any]) -> Any:
    """Do one step."""
    what, *given = step
    if what == "version":
        return opened.protocolVersion
    if what == "tools":
        return sorted(tool.name for tool in (await session.list_tools()).tools)
    if what == "prompts":
        return sorted(prompt.name for prompt in (await session.list_prompts()).prompts)
    if what == "resources":
        return sorted(str(resource.uri) for resource in (await session.list_resources()).resources)
    if what == "call":
        result = await session.call_tool(*given)
        return [bool(result.isError), result.content[0].text]
    if what == "prompt":
        return (await session.get_prompt(given[0])).messages[0].content.text
    if what == "read":
        return (await session.read_resource(given[0])).contents[0].text
    if what == "complete":
        ref = (
            types.PromptReference(type="ref/prompt", name=given[0])
            if given[1] == "prompt"
            else (types.ResourceTemplateReference(type="ref/resource", uri=given[0]))
        )
        return (await session.complete(ref, {"name": "repo", "value": "a"})).completion.values
    raise AssertionError(what)


async def main(url: str, steps: list[list[Any]]) -> None:
    """Take the steps, one after the other."""
    async with (
        streamablehttp_client(url) as (read, write, _),
        ClientSession(read, write, elicitation_callback=elicited) as session,
    ):
        opened = await session.initialize()
        for step in steps:
            try:
                said = {"result": await done(session, opened, step)}
            except McpError as error:
                data = error.error.data
                known = data if isinstance(data, dict) else {}
                said = {"code": error.error.code, "data": known, "message": error.error.message}
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[3])))
