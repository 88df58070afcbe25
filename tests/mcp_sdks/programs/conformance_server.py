"""The server that the official conformance suite asks for, by the Python SDK 2.x. Prints its port.

What it has to offer, and the names of it, are in the descriptions of the suite's scenarios.
"""

from __future__ import annotations

import asyncio
import json
from typing import Any

import mcp_types as types
import uvicorn
from mcp.server import Server
from mcp.server.context import ServerRequestContext
from mcp.server.request_state import RequestStateBoundary, RequestStateSecurity
from mcp.shared.exceptions import MCPError

Context = ServerRequestContext[Any]
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
WAV = "UklGRiQAAABXQVZFZm10IBAAAAABAAEAQB8AAEAfAAABAAgAZGF0YQAAAAA="


def text(said: str) -> types.TextContent:
    return types.TextContent(type="text", text=said)


def embedded(uri: str, kind: str, said: str) -> types.EmbeddedResource:
    return types.EmbeddedResource(
        type="resource", resource=types.TextResourceContents(uri=uri, mime_type=kind, text=said)
    )


IMAGE = types.ImageContent(type="image", data=PNG, mime_type="image/png")
RESULTS: dict[str, list[Any]] = {
    "test_simple_text": [text("This is a simple text response for testing.")],
    "test_image_content": [IMAGE],
    "test_audio_content": [types.AudioContent(type="audio", data=WAV, mime_type="audio/wav")],
    "test_embedded_resource": [embedded("test://embedded-resource", "text/plain", "This is an embedded resource.")],
    "test_multiple_content_types": [
        text("Multiple content types test:"), IMAGE,
        embedded("test://mixed-content-resource", "application/json", '{"test":"data","value":123}'),
    ],
}  # fmt: skip


def asked(message: str, name: str, kind: str = "string") -> dict[str, Any]:
    schema = {"type": "object", "properties": {name: {"type": kind}}, "required": [name]}
    return {
        "method": "elicitation/create",
        "params": {"mode": "form", "message": message, "requestedSchema": schema},
    }


def sampled(question: str, most: int = 100) -> dict[str, Any]:
    message = {"role": "user", "content": {"type": "text", "text": question}}
    return {"method": "sampling/createMessage", "params": {"messages": [message], "maxTokens": most}}


ROOTS = {"method": "roots/list", "params": {}}
ROUNDS: dict[str, list[tuple[dict[str, Any], str | None]]] = {
    "test_input_required_result_elicitation": [({"user_name": asked("What is your name?", "name")}, None)],
    "test_input_required_result_sampling": [({"capital_question": sampled("What is the capital of France?")}, None)],
    "test_input_required_result_list_roots": [({"client_roots": ROOTS}, None)],
    "test_input_required_result_request_state": [({"confirm": asked("Please confirm", "ok", "boolean")}, "1")],
    "test_input_required_result_tampered_state": [({"confirm": asked("Please confirm", "ok", "boolean")}, "1")],
    "test_input_required_result_multiple_inputs": [
        ({"user_name": asked("What is your name?", "name"), "greeting": sampled("Generate a greeting", 50),
          "client_roots": ROOTS}, "1"),
    ],
    "test_input_required_result_multi_round": [
        ({"step1": asked("Step 1: What is your name?", "name")}, "1"),
        ({"step2": asked("Step 2: What is your favorite color?", "color")}, "2"),
    ],
}  # fmt: skip
"""By tool: what it asks in each round, and its state."""


def required(requests: dict[str, Any], state: str | None) -> types.InputRequiredResult:
    return types.InputRequiredResult.model_validate({
        "resultType": "input_required", "inputRequests": requests,
        **({"requestState": state} if state is not None else {}),
    })  # fmt: skip


def round_of(
    name: str, params: types.CallToolRequestParams
) -> types.CallToolResult | types.InputRequiredResult:
    rounds, answers = ROUNDS[name], params.input_responses or {}
    at = int(params.request_state or 0) if rounds[0][1] is not None else (1 if answers else 0)
    asked_before = rounds[at - 1][0] if at else {}
    if at and not asked_before.keys() <= answers.keys():
        return required(*rounds[at - 1])
    if at < len(rounds):
        return required(*rounds[at])
    said = json.dumps({key: value.model_dump(mode="json", by_alias=True) for key, value in answers.items()})
    return types.CallToolResult(content=[text(f"state-ok {said}")])


async def call_tool(context: Context, params: types.CallToolRequestParams) -> Any:
    name = params.name
    if name in RESULTS:
        return types.CallToolResult(content=RESULTS[name])
    if name in ROUNDS:
        return round_of(name, params)
    if name == "test_error_handling":
        return types.CallToolResult(
            content=[text("This tool intentionally returns an error for testing")], is_error=True
        )
    if name == "test_tool_with_progress":
        for progress in (0, 50, 100):
            await context.session.report_progress(progress, 100)
            await asyncio.sleep(0.05)
        return types.CallToolResult(content=[text("done")])
    if name == "test_input_required_result_capabilities":
        declared = (context.meta or {}).get("io.modelcontextprotocol/clientCapabilities") or {}
        may = {"elicitation": asked("Name?", "name"), "sampling": sampled("Hello?")}
        wanted = {key: one for key, one in may.items() if key in dict(declared)}
        return (
            required(wanted, None)
            if wanted and not params.input_responses
            else (types.CallToolResult(content=[text("nothing to ask")]))
        )
    if name == "test_missing_capability":
        data = {"requiredCapabilities": {"sampling": {}}}
        raise MCPError(
            code=types.MISSING_REQUIRED_CLIENT_CAPABILITY, message="sampling is required", data=data
        )
    raise MCPError(code=types.INVALID_PARAMS, message=f"unknown tool {name}")


async def list_tools(context: Context, params: Any) -> types.ListToolsResult:
    others = ("test_error_handling", "test_tool_with_progress", "test_input_required_result_capabilities",
              "test_missing_capability")  # fmt: skip
    return types.ListToolsResult(tools=[
        types.Tool(name=name, description=f"the tool {name}", input_schema={"type": "object", "properties": {}})
        for name in (*RESULTS, *ROUNDS, *others)
    ])  # fmt: skip


PROMPTS: dict[str, tuple[str, ...]] = {
    "test_simple_prompt": (), "test_prompt_with_arguments": ("arg1", "arg2"),
    "test_prompt_with_embedded_resource": ("resourceUri",), "test_prompt_with_image": (),
    "test_input_required_result_prompt": (),
}  # fmt: skip


async def list_prompts(context: Context, params: Any) -> types.ListPromptsResult:
    return types.ListPromptsResult(prompts=[
        types.Prompt(
            name=name, description=f"the prompt {name}",
            arguments=[types.PromptArgument(name=one, description=one, required=True) for one in arguments],
        )
        for name, arguments in PROMPTS.items()
    ])  # fmt: skip


async def get_prompt(context: Context, params: types.GetPromptRequestParams) -> Any:
    given, contents = params.arguments or {}, [text("This is a simple prompt for testing.")]
    if params.name == "test_prompt_with_arguments":
        contents = [text(f"Prompt with arguments: arg1='{given['arg1']}', arg2='{given['arg2']}'")]
    elif params.name == "test_prompt_with_embedded_resource":
        contents = [
            embedded(given["resourceUri"], "text/plain", "Embedded resource content for testing."),
            text("Please process the embedded resource above."),
        ]
    elif params.name == "test_prompt_with_image":
        contents = [IMAGE, text("Please analyze the image above.")]
    elif params.name == "test_input_required_result_prompt" and not params.input_responses:
        return required({"user_context": asked("What context should the prompt use?", "context")}, None)
    return types.GetPromptResult(messages=[types.PromptMessage(role="user", content=one) for one in contents])


async def list_resources(context: Context, params: Any) -> types.ListResourcesResult:
    return types.ListResourcesResult(resources=[
        types.Resource(uri="test://static-text", name="text", description="text", mime_type="text/plain"),
        types.Resource(uri="test://static-binary", name="binary", description="binary", mime_type="image/png"),
    ])  # fmt: skip


async def list_templates(context: Context, params: Any) -> types.ListResourceTemplatesResult:
    template = types.ResourceTemplate(
        uri_template="test://template/{id}/data",
        name="template",
        description="a template",
        mime_type="application/json",
    )
    return types.ListResourceTemplatesResult(resource_templates=[template])


async def read_resource(
    context: Context, params: types.ReadResourceRequestParams
) -> types.ReadResourceResult:
    uri = str(params.uri)
    if uri == "test://static-binary":
        return types.ReadResourceResult(contents=[
            types.BlobResourceContents(uri=uri, mime_type="image/png", blob=PNG),
        ])  # fmt: skip
    if uri == "test://static-text":
        kind, said = "text/plain", "This is the content of the static text resource."
    elif uri.startswith("test://template/"):
        id = uri.split("/")[3]
        kind, said = (
            "application/json",
            json.dumps({"id": id, "templateTest": True, "data": f"Data for ID: {id}"}),
        )
    else:
        raise MCPError(code=types.INVALID_PARAMS, message="Resource not found", data={"uri": uri})
    return types.ReadResourceResult(contents=[types.TextResourceContents(uri=uri, mime_type=kind, text=said)])


async def complete(context: Context, params: types.CompleteRequestParams) -> types.CompleteResult:
    return types.CompleteResult(
        completion=types.Completion(values=["paris", "park", "party"], total=3, has_more=False)
    )


async def main() -> None:
    """Serve until the process is ended."""
    server = Server(
        "conformance", version="1", on_list_tools=list_tools, on_call_tool=call_tool, on_list_prompts=list_prompts,
        on_get_prompt=get_prompt, on_list_resources=list_resources, on_list_resource_templates=list_templates,
        on_read_resource=read_resource, on_completion=complete,
    )  # fmt: skip
    server.middleware.append(
        RequestStateBoundary(RequestStateSecurity.ephemeral(), default_audience=server.name)
    )
    own = uvicorn.Server(uvicorn.Config(server.streamable_http_app(), port=0, log_level="error"))
    task = asyncio.create_task(own.serve())
    while not own.started:
        await asyncio.sleep(0.01)
    print(json.dumps({"port": own.servers[0].sockets[0].getsockname()[1]}), flush=True)
    await task


if __name__ == "__main__":
    asyncio.run(main())
