"""An agent with the official Python SDK 2.x. Takes URL, negotiation, and steps as JSON; prints a result for each.

In the place of the URL it takes the command of a server on standard input and output, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import sys
from typing import Any

from mcp import Client, MCPError, StdioServerParameters
from mcp_types import ElicitResult, PromptReference, ResourceTemplateReference


async def elicited(context: Any, asked: Any) -> ElicitResult:
    """The user says yes."""
    return ElicitResult(action="accept", content={"ok": True})


async def listened(client: Client, uris: list[str]) -> Any:
    """Subscribe, have the server change things, and return the first events."""
    seen = []
    async with client.listen(tools_list_changed=True, resource_subscriptions=uris) as subscription:
        await client.call_tool("get_changed", {"repo": "a"})
        async for event in subscription:
            seen.append(getattr(event, "uri", type(event).__name__))
            if len(seen) == 1 + len(uris):
                break
    return sorted(map(str, seen))


async def done(client: Client, step: list[Any]) -> Any:
    """Do one step."""
    what, *given = step
    if what == "version":
        return client.protocol_version
    if what == "capabilities":
        return sorted(client.server_capabilities.model_dump(exclude_none=True, by_alias=True))
    if what == "tools":
        return sorted(tool.name for tool in (await client.list_tools()).tools)
    if what == "prompts":
        return sorted(prompt.name for prompt in (await client.list_prompts()).prompts)
    if what == "resources":
        return sorted(str(resource.uri) for resource in (await client.list_resources()).resources)
    if what == "call":
        result = await client.call_tool(*given)
        return [bool(result.is_error), result.content[0].text]
    if what == "prompt":
        return (await client.get_prompt(given[0])).messages[0].content.text
    if what == "read":
        return (await client.read_resource(given[0])).contents[0].text
    if what == "complete":
        ref = (
            PromptReference(type="ref/prompt", name=given[0])
            if given[1] == "prompt"
            else (ResourceTemplateReference(type="ref/resource", uri=given[0]))
        )
        return (await client.complete(ref, {"name": "repo", "value": "a"})).completion.values
    if what == "listen":
        return await listened(client, given)
    raise AssertionError(what)


async def main(url: str, mode: str, steps: list[list[Any]]) -> None:
    """Take the steps, one after the other."""
    server: Any = StdioServerParameters(**json.loads(url)) if url.startswith("{") else url
    async with Client(server, mode=mode, elicitation_callback=elicited) as client:
        for step in steps:
            try:
                said = {"result": await done(client, step)}
            except MCPError as error:
                data = error.error.data
                known = data if isinstance(data, dict) else {}
                said = {"code": error.error.code, "data": known, "message": error.error.message}
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3])))
