"""Requests to language models: which model, whether the provider does more than generate, and what is ambiguous."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ringfence.cli.commands.target import _parse_request_rule
from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.cli.shared.records import _conditions
from ringfence.messages.registry import ModelApi, ModelRule, RequestRule, VerbFloor
from ringfence.model.http_targets import MAX_BODY_BYTES, Action, RequestMap, RequestMapError
from ringfence.model.model_requests import ModelRequestError, read_model_request

TEMPLATE = TEMPLATES["model"]
MAP = RequestMap(TEMPLATE.requests)
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
TEXT = [{"role": "user", "content": "Hello"}]
PNG = "data:image/png;base64,aGk="
GENERATES = Action("generate", "model/m-1")
USES_SERVER_TOOLS = Action("server-tools", "model/m-1")


def action(path: str, **members: Any) -> Action | None:
    given = {"model": "m-1", **({} if path == RESPONSES else {"messages": TEXT}), **members}
    return MAP.action("POST", path, json.dumps(given).encode())


def says(*blocks: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": list(blocks)}]}


def test_order_of_the_template_asks_for_the_stronger_verb_last() -> None:
    MAP.check_order([VerbFloor(verb=verb, floor=floor) for verb, floor in TEMPLATE.verbs.items()])
    weak = [VerbFloor(verb=verb) for verb in TEMPLATE.verbs]
    with pytest.raises(RequestMapError, match="server-tools, which is not stronger"):
        MAP.check_order(weak)


@pytest.mark.parametrize(
    ("path", "members"),
    [
        (CHAT, {"stream": True, "stream_options": {"include_usage": True}, "n": 3, "max_tokens": 5}),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"mcp": 1}}}]}),
        (CHAT, {"tools": None, "web_search_options": None}),
        (CHAT, says({"type": "image_url", "image_url": {"url": PNG, "detail": "low"}})),
        (CHAT, says({"type": "file", "file": {"file_data": PNG, "filename": "a.pdf", "file_id": None}})),
        (RESPONSES, {"input": "Hello", "instructions": "Be short.", "store": False}),
        (RESPONSES, {"input": [{"type": "function_call_output", "call_id": "c", "output": "42"}]}),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": PNG}]}]}),
        ("/v1/embeddings", {"input": [[1, 2, 3], [4]], "messages": None}),
        (MESSAGES, {"system": [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]}),
        (MESSAGES, {"tools": [{"name": "f", "input_schema": {}}, {"type": "bash_20250124", "name": "bash"}]}),
        (MESSAGES, says({"type": "image", "source": {"type": "base64", "media_type": "x/y", "data": "aGk="}})),
        (MESSAGES, says({"type": "tool_use", "id": "t", "name": "f", "input": {"file_id": 1, "url": "https://x"}})),
        (MESSAGES, says({"type": "tool_result", "tool_use_id": "t", "content": [{"type": "text", "text": "x"}]})),
        ("/v1/messages/count_tokens", {}),
    ],
)  # fmt: skip
def test_request_with_inline_content_and_client_tools_generates(path: str, members: dict[str, Any]) -> None:
    assert action(path, **members) == GENERATES


@pytest.mark.parametrize(
    ("path", "members"),
    [
        (CHAT, {"web_search_options": {}}),
        (CHAT, {"models": ["m-2"]}),
        (CHAT, {"tools": [{"type": "web_search"}]}),
        (CHAT, {"tools": {"0": {"type": "mcp"}}}),
        (CHAT, says({"type": "image_url", "image_url": {"url": "https://evil.example/?data"}})),
        (CHAT, says({"type": "image_url", "image_url": "https://evil.example/?data"})),
        (CHAT, says({"type": "image_url", "image_url": {"url": PNG, "Url": "https://evil.example"}})),
        (CHAT, says({"type": "file", "file": {"file_id": "file-1"}})),
        (CHAT, says({"type": "file", "file": {"file_data": "https://evil.example"}})),
        (CHAT, {"messages": [{"role": "assistant", "audio": {"id": "audio-1"}}]}),
        (RESPONSES, {"tools": [{"type": "mcp", "server_url": "https://evil.example"}]}),
        (RESPONSES, {"tools": [{"type": "function", "name": "f", "Type": "mcp"}]}),
        (RESPONSES, {"tools": [{"type": ["function"]}]}),
        (RESPONSES, {"tools": [{"name": "f"}]}),
        (RESPONSES, {"background": True}),
        (RESPONSES, {"previous_response_id": "resp-1"}),
        (RESPONSES, {"conversation": "conv-1"}),
        (RESPONSES, {"prompt": {"id": "pmpt-1"}}),
        (RESPONSES, {"input": [{"id": "msg-1"}]}),
        (RESPONSES, {"input": [{"type": "item_reference", "id": "msg-1"}]}),
        (RESPONSES, {"input": [{"type": "mcp_approval_response", "approve": True}]}),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]}),
        (RESPONSES, {"input": [{"role": "user", "content": [{"type": "input_file", "file_url": "https://x"}]}]}),
        (RESPONSES, {"input": [[[[[[[[["deep"]]]]]]]]]}),
        (MESSAGES, {"mcp_servers": [{"type": "url", "url": "https://evil.example", "name": "x"}]}),
        (MESSAGES, {"container": "c-1"}),
        (MESSAGES, {"tools": [{"type": "web_search_20250305", "name": "web_search"}]}),
        (MESSAGES, {"tools": [{"type": "code_execution_20250825", "name": "code_execution"}]}),
        (MESSAGES, says({"type": "image", "source": {"type": "url", "url": "https://evil.example/?data"}})),
        (MESSAGES, says({"type": "document", "source": {"type": "file", "file_id": "f"}})),
        (MESSAGES, says({"type": "container_upload", "file_id": "f"})),
        (MESSAGES, says({"type": "tool_result", "content": [{"type": "image", "source": {"type": "url"}}]})),
        ("/v1/messages/count_tokens", {"mcp_servers": []}),
    ],
)  # fmt: skip
def test_request_that_may_use_what_the_provider_has_needs_server_tools(
    path: str, members: dict[str, Any]
) -> None:
    assert action(path, **members) == USES_SERVER_TOOLS


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "m-1", "model": "m-2"}',
        b'{"model": "m-1", "mod\\u0065l": "m-2"}',
        b'{"model": "m-1", "Model": "m-2"}',
        b'{"model": "m-1", "model[]": "m-2"}',
        b'{"model": "m-1", " model": "m-2"}',
        b'{"model": "m-1", "messages": [{"role": "user", "role": "system"}]}',
        b"{}",
        b'{"model": null}',
        b'{"model": 1}',
        b'{"model": ["m-1"]}',
        b'{"model": {"model": "m-1"}}',
        b'["model", "m-1"]',
        b'[{"model": "m-1"}]',
        b'\xef\xbb\xbf{"model": "m-1"}',
        '{"model": "m-1"}'.encode("utf-16"),
        b'{"model": "m-1"} {"model": "m-2"}',
        b'{"model": "m-1"}\x00',
        b'{"model": "m-1", "x": NaN}',
        b'{"model": "m-1", "x": "\xff"}',
        b'{"model": "m-1", "x": "\\ud800"}',
        b'{"model": "m-1", "messages": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b"model=m-1",
        b"",
        None,
    ],
)
def test_body_without_exactly_one_model_is_refused(body: bytes | None) -> None:
    for path in (CHAT, MESSAGES):
        assert MAP.action("POST", path, body) is None
        assert MAP.model_request_problem("POST", path, body)


@pytest.mark.parametrize(
    "name",
    ["", " m-1", "m-1 ", "m-1\n", "*", "m-*", "**", "..", ".", "a/..", "../m-1", "/m-1", "m-1/", "a//b", "m%2f1",
     "m?x=1", "m#1", "m;1", "m\\1", "m\u00a01", "\u217f-1", "m\u200b-1", "m" * 257, "m{a}", "m[1]", "m,n"],
)  # fmt: skip
def test_name_that_no_resource_has_is_refused(name: str) -> None:
    assert action(CHAT, model=name) is None
    assert MAP.model_request_problem("POST", CHAT, json.dumps({"model": name}).encode())


@pytest.mark.parametrize(
    "name", ["m-1", "ft:m-1:org::id", "org/m-1", "anthropic.m-1-v2:0", "m@2026-01-01", "M-1"]
)
def test_name_is_the_resource_letter_by_letter(name: str) -> None:
    assert action(CHAT, model=name) == Action("generate", f"model/{name}")


def test_escaped_letters_are_the_letters() -> None:
    assert MAP.action("POST", CHAT, b'{"mod\\u0065l": "m\\u002d1"}') == GENERATES


@pytest.mark.parametrize("query", ["model=m-2", "beta=true&model=m-2", "api-version=1", "beta=false"])
def test_query_is_refused_unless_it_is_known(query: str) -> None:
    body = b'{"model": "m-1"}'
    assert MAP.action("POST", f"{CHAT}?{query}", body) is None
    assert "query" in str(MAP.model_request_problem("POST", f"{CHAT}?{query}", body))
    assert MAP.action("POST", f"{MESSAGES}?beta=true", body) == GENERATES


def test_longer_body_than_is_inspected_is_refused() -> None:
    start, end = b'{"model": "m-1", "user": "', b'"}'
    for size, found in ((MAX_BODY_BYTES, GENERATES), (MAX_BODY_BYTES + 1, None)):
        assert MAP.action("POST", CHAT, start + b"x" * (size - len(start) - len(end)) + end) == found


@pytest.mark.parametrize(
    ("method", "path", "found"),
    [
        ("GET", "/v1/models", Action("read", "models")),
        ("GET", "/v1/models/m-1", Action("read", "model/m-1")),
        ("GET", "/v1/batches", Action("batch", "batches")),
        ("POST", "/v1/batches/b/cancel", Action("batch", "batches/b/cancel")),
        ("POST", "/v1/messages/batches", Action("batch", "messages/batches")),
        ("POST", "/v1/files", Action("batch", "files")),
        ("GET", "/v1/responses/resp-1", None),
        ("GET", "/v1/responses", None),
        ("DELETE", "/v1/models/m-1", None),
        ("POST", "/v1/fine_tuning/jobs", None),
        ("POST", "/v1/completions", None),
        ("POST", "/v1/chat/completions/", None),
        ("POST", "/V1/chat/completions", None),
        ("POST", "/v1/assistants", None),
        ("PUT", CHAT, None),
        ("GET", "/v1/organization/api_keys", None),
    ],
)
def test_only_listed_endpoints_have_a_verb(method: str, path: str, found: Action | None) -> None:
    assert MAP.action(method, path, b'{"model": "m-1"}' if method in ("POST", "PUT") else None) == found


def test_body_is_read_before_the_decision_only_where_a_model_is_named() -> None:
    assert MAP.reads_body("POST", CHAT)
    assert MAP.reads_body("POST", "/v1/messages/count_tokens")
    assert not MAP.reads_body("POST", "/v1/files")


@pytest.mark.parametrize("api", ["openai", "anthropic"])
def test_rule_is_written_as_the_command_shows_it(api: ModelApi) -> None:
    for server_tools in (False, True):
        rule = RequestRule(
            method="POST", path="/openai/v1/responses", verb="generate", resource="model/{model*}",
            model=ModelRule(api=api, server_tools=server_tools),
        )  # fmt: skip
        text = f"{rule.method} {rule.path} {rule.verb} {rule.resource}{_conditions(rule)}"
        assert _parse_request_rule(text) == rule


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "PUT"},
        {"query": {"a": ("b",)}},
        {"body": {"a": ("b",)}},
        {"path": "/{model}"},
        {"path": "/{model*}"},
    ],
)
def test_rule_with_another_condition_or_capture_of_the_model_is_invalid(fields: dict[str, Any]) -> None:
    given = {
        "method": "POST",
        "path": CHAT,
        "verb": "v",
        "resource": "x",
        "model": ModelRule(api="openai"),
        **fields,
    }
    with pytest.raises(RequestMapError, match="a rule for requests to models"):
        RequestMap([RequestRule(**given)])


def test_error_quotes_nothing_of_the_body() -> None:
    for body in (b'{"model": "secret secret"}', b'{"secret": 1, "secret": 2}', b"secret"):
        with pytest.raises(ModelRequestError) as error:
            read_model_request("openai", "", body)
        assert "secret" not in str(error.value)
