"""Strict parser of requests to language models, in the shapes of OpenAI's and Anthropic's APIs. Pure.

A request names one model. It *generates* if it has nothing besides text, inline data and tools that the client runs
itself. The lists are allow-lists: a member or type that is not known here may let the provider run a tool, fetch a URL,
read what it stores, or ask another model. Such a request uses *server tools*.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ringfence.kernel.base.strict_json import case_folded, json_object
from ringfence.messages.registry import ModelApi
from ringfence.model.mcp.rules import CannotTellError, check_segments

_MAX_NAME_CHARS: Final = 256
_MAX_DEPTH: Final = 8
"""Of content in content. A tool's result is at depth 4."""
_NAME: Final = re.compile(r"[A-Za-z0-9._:@+/-]+")
_QUERIES: Final = frozenset({"", "beta=true"})
"""Anthropic's SDK sends `beta=true` with its beta methods. Another parameter might name a model."""

_MEMBERS: Final[Mapping[ModelApi, frozenset[str]]] = {
    "openai": frozenset({
        "audio", "dimensions", "encoding_format", "frequency_penalty", "function_call", "functions", "include", "input",
        "instructions", "logit_bias", "logprobs", "max_completion_tokens", "max_output_tokens", "max_tokens",
        "max_tool_calls", "messages", "metadata", "modalities", "model", "n", "parallel_tool_calls", "prediction",
        "presence_penalty", "prompt_cache_key", "prompt_cache_retention", "reasoning", "reasoning_effort",
        "response_format", "safety_identifier", "seed", "service_tier", "stop", "store", "stream", "stream_options",
        "temperature", "text", "tool_choice", "tools", "top_logprobs", "top_p", "truncation", "user", "verbosity",
    }),
    "anthropic": frozenset({
        "cache_control", "max_tokens", "messages", "metadata", "model", "output_config", "service_tier",
        "stop_sequences", "stream", "system", "temperature", "thinking", "tool_choice", "tools", "top_k", "top_p",
    }),
}  # fmt: skip
"""By API: the members of a request that only generates."""
_CONTENT: Final = ("messages", "input", "system", "instructions", "prediction")
"""The members that hold text or blocks."""
_CLIENT_TOOLS: Final[Mapping[ModelApi, re.Pattern[str]]] = {
    "openai": re.compile(r"function|custom"),
    "anthropic": re.compile(r"custom|(?:bash|computer|memory|text_editor)_[0-9]{8}"),
}
"""By API: the types of tools that the client runs."""
_BLOCK_TYPES: Final = frozenset({
    "custom_tool_call", "custom_tool_call_output", "file", "function_call", "function_call_output", "image_url",
    "input_audio", "input_file", "input_image", "input_text", "message", "output_text", "reasoning", "reasoning_text",
    "refusal", "summary_text", "text",
    "content", "document", "image", "redacted_thinking", "search_result", "thinking", "tool_result", "tool_use",
})  # fmt: skip
_BLOCK_MEMBERS: Final = frozenset({
    "annotations", "arguments", "cache_control", "call_id", "caller", "citations", "content", "context", "data",
    "detail", "encrypted_content", "file", "file_data", "filename", "function_call", "id", "image_url", "input",
    "input_audio", "is_error", "logprobs", "name", "output", "phase", "refusal", "role", "signature", "source",
    "status", "summary", "text", "thinking", "title", "tool_call_id", "tool_calls", "tool_use_id", "type",
})  # fmt: skip
_SOURCE_TYPES: Final = frozenset({"base64", "content", "text"})
_SOURCE_MEMBERS: Final = frozenset({"content", "data", "media_type", "type"})


class ModelRequestError(CannotTellError):
    """Raised for a request whose model is not certain. The message says what is wrong."""


@dataclass(frozen=True, slots=True)
class ModelRequest:
    """One request to a model."""

    model: str
    """The model's name: segments of a resource."""
    uses_server_tools: bool
    """Whether it may have the provider do more than generate with this model from the request's own content."""


def read_model_request(api: ModelApi, query: str, body: bytes | None) -> ModelRequest:
    """Parse a request.

    Args:
        api: the API whose shape the request has.
        query: as it was sent.
        body: as it was sent; None if it was not seen whole or is not declared as JSON.

    Raises ModelRequestError: for a query that is not known, for a body that is not one JSON object as all readers
    understand it, and unless exactly one member `model` has a name that a resource can have.
    """
    if query not in _QUERIES:
        raise ModelRequestError("a query may name another model or version: leave it out")
    if body is None:
        raise ModelRequestError("send one JSON object, uncompressed, as application/json")
    try:
        document = json_object(body)
    except ValueError:
        raise ModelRequestError(
            "the body is not one JSON object in UTF-8 without duplicate members: two readers could see two models"
        ) from None
    model = document.get("model")
    alike = [name for name in document if re.sub(r"[^a-z]", "", case_folded(name)) == "model"]
    if alike != ["model"]:
        raise ModelRequestError('the body has no member "model", or another that some readers take for it')
    if not isinstance(model, str) or len(model) > _MAX_NAME_CHARS or not _NAME.fullmatch(model):
        raise ModelRequestError(
            f"the name of a model is a text of at most {_MAX_NAME_CHARS} of the characters A-Z a-z 0-9 . _ : @ + / -"
        )
    try:
        check_segments(model, several=True)
    except CannotTellError:
        raise ModelRequestError("the name of a model has no empty segment, '.' or '..'") from None
    return ModelRequest(model, uses_server_tools=not _only_generates(api, _given(document)))


def _only_generates(api: ModelApi, document: Mapping[str, Any]) -> bool:
    tools = document.get("tools", [])
    return (
        document.keys() <= _MEMBERS[api]
        and isinstance(tools, list)
        and all(_is_client_tool(api, tool) for tool in tools)
        and all(_is_inline(document.get(member), _MAX_DEPTH) for member in _CONTENT)
    )


def _is_client_tool(api: ModelApi, tool: Any) -> bool:
    """Whether the client runs a tool. Anthropic's tools are `custom` unless they have a type."""
    if not isinstance(tool, dict) or any(name != "type" and case_folded(name) == "type" for name in tool):
        return False
    type = tool.get("type") or ("custom" if api == "anthropic" else None)
    return isinstance(type, str) and _CLIENT_TOOLS[api].fullmatch(type) is not None


def _is_inline(content: Any, depth: int) -> bool:
    """Whether content is text, tokens, or blocks of known types that refer to nothing outside of the request."""
    if not isinstance(content, (list, dict)):
        return True
    if depth == 0:
        return False
    if isinstance(content, list):
        return all(_is_inline(one, depth - 1) for one in content)
    block = _given(content)
    # OpenAI takes an object with an id alone for a reference to a stored item. A message without a type has a role.
    type = block.get("type", "message" if "role" in block else None)
    return (
        block.keys() <= _BLOCK_MEMBERS
        and isinstance(type, str)
        and type in _BLOCK_TYPES
        and _is_inline_image(block.get("image_url"))
        and _is_inline_file(block)
        and _is_inline_file(block.get("file"))
        and _is_inline_source(block.get("source"), depth)
        and _is_inline(block.get("content"), depth - 1)
        and _is_inline(block.get("output"), depth - 1)
    )


def _is_inline_image(image: Any) -> bool:
    """Whether an image's URL has the image itself. The provider fetches any other URL, which can carry data away."""
    if isinstance(image, dict):
        image = image.get("url") if image.keys() <= {"url", "detail"} else ""
    return image is None or (isinstance(image, str) and image.startswith("data:"))


def _is_inline_file(file: Any) -> bool:
    """Whether a file is in the request. `file`: an object, or None."""
    if file is None:
        return True
    if not isinstance(file, dict) or not _given(file).keys() <= _BLOCK_MEMBERS:
        return False
    data = file.get("file_data")
    return data is None or (isinstance(data, str) and "://" not in data)


def _is_inline_source(source: Any, depth: int) -> bool:
    """Whether Anthropic's source has the data itself. The source of a search result is a text, which is not fetched."""
    if source is None or isinstance(source, str):
        return True
    return (
        isinstance(source, dict)
        and _given(source).keys() <= _SOURCE_MEMBERS
        and isinstance(source.get("type"), str)
        and source["type"] in _SOURCE_TYPES
        and _is_inline(source.get("content"), depth - 1)
    )


def _given(members: Mapping[str, Any]) -> dict[str, Any]:
    """The members that are not null. SDKs write null for what is absent."""
    return {name: value for name, value in members.items() if value is not None}
