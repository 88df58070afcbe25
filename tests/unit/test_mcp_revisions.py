"""MCP in its revisions: what a message states, what its headers have to say, what is canonical, sealed and filtered."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import McpRule, RequestRule
from ringfence.model.http_targets import Action, RequestMap
from ringfence.model.mcp import canonical
from ringfence.model.mcp.headers import STATELESS, Declared, check_headers, declarations, revision_of
from ringfence.model.mcp.messages import (
    CAPABILITIES_KEY,
    MAX_STATE_CHARS,
    MAX_SUBSCRIBED,
    VERSION_KEY,
    McpMessage,
    McpMessageError,
    read_message,
)
from ringfence.model.mcp.request_state import RequestState, RequestStateError, RequestStates
from ringfence.model.mcp.results import Grants, ResultFilter, UnreadableResultError

META = {VERSION_KEY: STATELESS, CAPABILITIES_KEY: {}}


def message(method: str, *, meta: Any = META, id: Any = 1, **params: Any) -> McpMessage:
    if meta is not None:
        params["_meta"] = meta
    said = {"jsonrpc": "2.0", "id": id, "method": method, "params": params}
    return read_message(json.dumps({key: value for key, value in said.items() if value is not None}).encode())


def call(arguments: Any = None, **params: Any) -> McpMessage:
    return message("tools/call", name="push", arguments=arguments or {"repo": "a"}, **params)


def why(read: Any) -> str | None:
    """The code of the refusal, if there is one."""
    try:
        read()
    except McpMessageError as error:
        return error.code
    return None


@pytest.mark.parametrize(
    ("posted", "stated", "code"),
    [
        (call(), STATELESS, None),
        (message("server/discover"), STATELESS, None),
        (message("notifications/cancelled", id=None, meta=None), STATELESS, None),
        (call(meta=None), "2025-06-18", None),
        (call(meta=None), "2025-03-26", None),
        (call(meta=None), None, None),
        (call(meta={"progressToken": 1}), "2025-11-25", None),
        (message("initialize", meta=None, protocolVersion="2025-11-25"), None, None),
        (message("initialize", meta=None, protocolVersion="2025-11-25"), "2025-11-25", None),
        (message("acme/anything", meta=None), None, None),
        # header against _meta
        (call(), None, "mcp_header"),
        (call(), "2025-11-25", "mcp_header"),
        (call(meta={**META, VERSION_KEY: "2025-11-25"}), STATELESS, "mcp_header"),
        (message("initialize", meta=None, protocolVersion="2025-11-25"), "2025-06-18", "mcp_header"),
        # a revision that nobody knows
        (call(meta={**META, VERSION_KEY: "2027-01-01"}), "2027-01-01", "mcp_version"),
        (call(meta=None), "2024-11-05", "mcp_version"),
        (call(meta=None), "", "mcp_version"),
        # what the revision requires
        (call(meta=None), STATELESS, "mcp_meta"),
        (call(meta={VERSION_KEY: STATELESS}), STATELESS, "mcp_meta"),
        (call(meta={VERSION_KEY: STATELESS, CAPABILITIES_KEY: []}), STATELESS, "mcp_meta"),
        (call(meta={**META, VERSION_KEY: 1}), STATELESS, "mcp_meta"),
        # methods of another revision
        (message("initialize"), STATELESS, "mcp_method"),
        (message("ping"), STATELESS, "mcp_method"),
        (message("resources/subscribe", uri="a"), STATELESS, "mcp_method"),
        (message("tasks/list"), STATELESS, "mcp_method"),
        (message("notifications/initialized", id=None, meta=None), STATELESS, "mcp_method"),
        (message("server/discover", meta=None), "2025-11-25", "mcp_method"),
        (message("server/discover", meta=None), None, "mcp_method"),
        (message("tasks/get", meta=None, taskId="t"), "2025-06-18", "mcp_method"),
        (message("tasks/get", meta=None, taskId="t"), "2025-11-25", None),
        (read_message(b'{"jsonrpc":"2.0","id":1,"result":{}}'), STATELESS, "mcp_method"),
        # params of another revision
        (call(meta=None, requestState="x"), "2025-11-25", "mcp_invalid"),
        (call(meta=None, inputResponses={}), None, "mcp_invalid"),
        (message("tools/list", requestState="x"), STATELESS, "mcp_invalid"),
        (message("tools/list", inputResponses={}), STATELESS, "mcp_invalid"),
        (message("tasks/update", taskId="t", inputResponses={"a": {}}), STATELESS, None),
    ],
)
def test_a_message_is_of_the_revision_that_it_states(
    posted: McpMessage, stated: str | None, code: str | None
) -> None:
    assert why(lambda: revision_of(posted, stated)) == code


def test_over_another_transport_the_message_alone_states_it() -> None:
    assert revision_of(call(), None, always_stated=False) == STATELESS
    assert revision_of(call(meta=None), "2025-11-25", always_stated=False) == "2025-11-25"


@pytest.mark.parametrize(
    "params",
    [
        {"requestState": 1},
        {"requeststate": "x"},
        {"inputResponses": []},
        {"InputResponses": {}},
        {"_meta": []},
        {"_meta": {VERSION_KEY.lower(): STATELESS}},
        {"_meta": {**META, VERSION_KEY.upper(): "2025-06-18"}},
        {"_Meta": {}},
    ],
)
def test_ambiguous_mcp_params_are_rejected(params: dict[str, Any]) -> None:
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {"name": "a", **params}}
    assert why(lambda: read_message(json.dumps(body).encode())) == "mcp_invalid"


NAMED = (("mcp-method", "tools/call"), ("mcp-name", "push"))


def encoded(text: str) -> str:
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


@pytest.mark.parametrize(
    ("fields", "arguments", "declared", "refused"),
    [
        (NAMED, {}, None, False),
        ((("mcp-method", "tools/call"), ("mcp-name", encoded("push"))), {}, None, False),
        (NAMED[:1], {}, None, True),
        (NAMED[1:], {}, None, True),
        ((*NAMED, NAMED[0]), {}, None, True),
        ((("mcp-method", "tools/list"), NAMED[1]), {}, None, True),
        ((NAMED[0], ("mcp-name", "get_issue")), {}, None, True),
        ((NAMED[0], ("mcp-name", "=?base64?!?=")), {}, None, True),
        ((NAMED[0], ("mcp-name", encoded("push") + " ")), {}, None, True),
        ((*NAMED, ("mcp-unknown", "x")), {}, None, True),
        # with the declarations of the tool
        ((*NAMED, ("mcp-param-repository", "a")), {"repo": "a"}, {"repository": ("repo",)}, False),
        ((*NAMED, ("mcp-param-repository", encoded("ä"))), {"repo": "ä"}, {"repository": ("repo",)}, False),
        ((*NAMED, ("mcp-param-n", "7")), {"n": 7}, {"n": ("n",)}, False),
        ((*NAMED, ("mcp-param-n", "7.0")), {"n": 7}, {"n": ("n",)}, False),
        ((*NAMED, ("mcp-param-n", "8")), {"n": 7}, {"n": ("n",)}, True),
        ((*NAMED, ("mcp-param-ok", "true")), {"ok": True}, {"ok": ("ok",)}, False),
        ((*NAMED, ("mcp-param-ok", "1")), {"ok": True}, {"ok": ("ok",)}, True),
        ((*NAMED, ("mcp-param-in", "a")), {"x": {"y": "a"}}, {"in": ("x", "y")}, False),
        ((*NAMED, ("mcp-param-repository", "b")), {"repo": "a", "x": "b"}, {"repository": ("repo",)}, True),
        ((*NAMED, ("mcp-param-repository", "a")), {}, {"repository": ("repo",)}, True),
        ((*NAMED, ("mcp-param-other", "a")), {"other": "a"}, {"repository": ("repo",)}, True),
        # without
        ((*NAMED, ("mcp-param-repo", "a")), {"repo": "a"}, None, False),
        ((*NAMED, ("mcp-param-repo-name", "a")), {"repo_name": "a"}, None, False),
        ((*NAMED, ("mcp-param-repo", "b")), {"repo": "a", "x": "b"}, None, True),
        ((*NAMED, ("mcp-param-repository", "a")), {"repo": "a"}, None, True),
    ],
)
def test_headers_say_what_the_message_says(
    fields: tuple[tuple[str, str], ...], arguments: dict[str, Any], declared: Declared | None, refused: bool
) -> None:
    posted = message("tools/call", name="push", arguments=arguments)
    code = why(lambda: check_headers(posted, STATELESS, fields, lambda tool: declared))
    assert code == ("mcp_header" if refused else None)


def test_earlier_revisions_need_no_headers_and_know_no_params() -> None:
    assert why(lambda: check_headers(call(meta=None), "2025-06-18", (), lambda tool: None)) is None
    assert why(lambda: check_headers(call(meta=None), None, NAMED, lambda tool: None)) is None
    routed = (("mcp-param-repo", "a"),)
    assert why(lambda: check_headers(call(meta=None), None, routed, lambda tool: None)) == "mcp_header"


def test_declarations_are_those_that_only_properties_lead_to() -> None:
    schema = {
        "x-mcp-header": "Root",
        "properties": {
            "repo": {"type": "string", "x-mcp-header": "Repository"},
            "in": {"properties": {"er": {"x-mcp-header": "Inner"}}},
            "list": {"items": {"x-mcp-header": "Item"}},
            "odd": {"x-mcp-header": "not a token"},
        },
    }
    assert declarations(schema) == {"repository": ("repo",), "inner": ("in", "er")}
    assert declarations([]) == {}


def test_a_retry_has_the_same_canonical_form() -> None:
    first = call({"repo": "a", "n": 1})
    again = message(
        "tools/call", id="other", meta={**META, "progressToken": "p", "com.acme/x": 1},
        arguments={"n": 1, "repo": "a"}, name="push", requestState="s",
    )  # fmt: skip
    assert canonical.canonical_form(first) == canonical.canonical_form(again)
    assert canonical.digest(first) == canonical.digest(again)
    answered = call({"repo": "a", "n": 1}, inputResponses={"a": {}})
    assert canonical.digest(answered) != canonical.digest(first)
    assert canonical.call_digest(answered) == canonical.call_digest(first)
    for other in (
        call({"repo": "b", "n": 1}),
        message("tools/call", name="x", arguments={"repo": "a", "n": 1}),
    ):
        assert canonical.call_digest(other) != canonical.call_digest(first)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers(-(2**53) + 1, 2**53 - 1) | st.text(),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
        max_leaves=8,
    )
)
def test_rebuilt_message_has_the_approved_canonical_form(value: Any) -> None:
    try:
        posted = call({"repo": "a", "value": value})
    except McpMessageError:
        return
    sent = read_message(canonical.rebuilt(posted, "own"))
    assert canonical.canonical_form(sent) == canonical.canonical_form(posted)
    assert (sent.id, sent.request_state, sent.meta) == (posted.id, "own", META)


def test_unapproved_meta_fields_are_not_forwarded() -> None:
    meta = {
        **META, "progressToken": "p", "com.acme/dry-run": True, "traceparent": "00-1",
        CAPABILITIES_KEY: {
            "elicitation": {"form": {"x": 1}, "y": {}}, "experimental": {"run": 1}, "roots": {"listChanged": True},
            "extensions": {"io.modelcontextprotocol/tasks": {"x": 1}, "com.acme/x": {}},
        },
    }  # fmt: skip
    sent = json.loads(canonical.rebuilt(call(meta=meta, requestState="sealed"), None))
    assert sent == {
        "jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": {
            "name": "push", "arguments": {"repo": "a"}, "_meta": {
                VERSION_KEY: STATELESS, "progressToken": "p", CAPABILITIES_KEY: {
                    "elicitation": {"form": {}}, "roots": {}, "extensions": {"io.modelcontextprotocol/tasks": {}},
                },
            },
        },
    }  # fmt: skip
    kept = json.loads(canonical.with_state(call(meta=meta, requestState="sealed"), "own"))["params"]
    assert (kept["_meta"], kept["requestState"]) == (meta, "own")


@pytest.mark.parametrize("number", [2**53, -(2**60), 10**30, 1e300])
def test_a_number_that_readers_tell_differently_has_no_form(number: Any) -> None:
    with pytest.raises(McpMessageError):
        canonical.canonical_form(call({"n": [number]}))


STATE = RequestState("server", "bot", "task", "lease", "target", "call", 1, "own")


def test_a_sealed_state_opens_where_it_was_sealed_and_as_it_was() -> None:
    key = SigningKey.generate("spiffe://a/service/gateway")
    current = [key]
    states = RequestStates(lambda: current[0])
    sealed = states.seal(STATE)
    assert "own" not in sealed
    assert states.open(sealed) == STATE
    assert RequestStates(lambda: key).open(sealed) == STATE, "a replica with the same key"
    assert states.seal(STATE) != sealed
    current[0] = SigningKey.generate(key.id)
    assert states.open(sealed) == STATE, "a rotation breaks no round"
    assert states.open(states.seal(replace(STATE, state=None))).state is None
    for wrong in (
        "",
        "own",
        sealed[:-2],
        sealed.replace("rf1.", "rf2."),
        f"{sealed}=",
        "rf1.",
        f"rf1.{'A' * 40}",
    ):
        with pytest.raises(RequestStateError):
            states.open(wrong)
    with pytest.raises(RequestStateError):
        RequestStates(lambda: SigningKey.generate(key.id)).open(sealed)


@given(st.integers(4, 200), st.sampled_from("ABCabc019-_"))
def test_a_state_that_was_changed_does_not_open(at: int, char: str) -> None:
    sealed = STATES.seal(STATE)
    at %= len(sealed)
    changed = sealed[:at] + char + sealed[at + 1 :]
    if changed == sealed:
        return
    with pytest.raises(RequestStateError):
        STATES.open(changed)


KEY = SigningKey.generate("spiffe://a/service/gateway", "EdDSA")
STATES = RequestStates(lambda: KEY)


# --- what a message needs ---


def rule(method: str, verb: str, resource: str, name: str | None = None) -> RequestRule:
    return RequestRule(
        method="MCP", path="/mcp", mcp=McpRule(method=method, name=name), verb=verb, resource=resource
    )


MAP = RequestMap(
    [
        rule("tools/call", "call", "tool/{tool}", "{tool}"),
        rule("subscriptions/listen", "connect", "server"),
        rule("resources/subscribe", "read", "note/{note}", "note:///{note}"),
        rule("tasks/get", "poll", "server"),
        rule("completion/complete", "complete", "{arguments.repo}", "review"),
        rule("completion/complete", "read", "server", "note:///{x}"),
        rule("response", "answer", "server"),
    ]
)


def actions(posted: McpMessage) -> tuple[Action, ...] | None:
    return MAP.mcp_actions("/mcp", posted)


def test_a_message_needs_all_that_it_asks_for() -> None:
    assert actions(call()) == (Action("call", "tool/push"),)
    assert actions(call(requestState="s", inputResponses={"a": {}})) == (
        Action("call", "tool/push"), Action("answer", "server"),
    )  # fmt: skip
    listened = {
        "toolsListChanged": True,
        "resourceSubscriptions": ["note:///a", "note:///b"],
        "taskIds": ["t"],
    }
    assert actions(message("subscriptions/listen", notifications=listened)) == (
        Action("read", "note/a"), Action("read", "note/b"), Action("poll", "server"), Action("connect", "server"),
    )  # fmt: skip
    beyond = {"resourceSubscriptions": ["note:///a", "file:///etc/passwd"]}
    assert actions(message("subscriptions/listen", notifications=beyond)) is None
    no_answers = RequestMap([rule("tools/call", "call", "server")])
    assert no_answers.mcp_actions("/mcp", call(inputResponses={"a": {}}, requestState="s")) is None


def complete(ref: Any, argument: Any = None, **params: Any) -> McpMessage:
    return message(
        "completion/complete", ref=ref, argument=argument or {"name": "repo", "value": "a"}, **params
    )


def test_completion_is_decided_by_what_it_completes() -> None:
    prompt = {"type": "ref/prompt", "name": "review"}
    assert actions(complete(prompt)) == (Action("complete", "a"),)
    known = {"arguments": {"repo": "b"}}
    assert actions(complete(prompt, {"name": "x", "value": "y"}, context=known)) == (Action("complete", "b"),)
    assert actions(complete({"type": "ref/resource", "uri": "note:///{n}"})) == (Action("read", "server"),)
    assert actions(complete({"type": "ref/prompt", "name": "merge"})) is None


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: complete(None),
        lambda: complete({"type": "ref/prompt", "uri": "note:///a"}),
        lambda: complete({"type": "ref/prompt", "name": "a", "uri": "note:///a"}),
        lambda: complete({"type": "ref/resource", "name": "a", "uri": "note:///a"}),
        lambda: complete({"type": "ref/prompt", "name": "note:///a"}),
        lambda: complete({"type": "ref/prompt", "name": "a", "Name": "b"}),
        lambda: complete({"type": "ref/prompt", "name": "a"}, {"name": "x"}),
        lambda: complete(
            {"type": "ref/prompt", "name": "a"},
            {"name": "x", "value": "y"},
            context={"arguments": {"x": "z"}},
        ),
        lambda: message("subscriptions/listen"),
        lambda: message("subscriptions/listen", notifications={"toolsListChanged": 1}),
        lambda: message("subscriptions/listen", notifications={"everything": True}),
        lambda: message("subscriptions/listen", notifications={"taskIds": [1]}),
        lambda: message(
            "subscriptions/listen", notifications={"resourceSubscriptions": ["a"] * (MAX_SUBSCRIBED + 1)}
        ),
        lambda: message("tasks/get"),
        lambda: message("tasks/get", taskId=7),
    ],
)
def test_completion_without_a_clear_reference_is_rejected(wrong: Any) -> None:
    assert why(wrong) == "mcp_invalid"


# --- what is shown of answers ---


def grants(**other: Any) -> Grants:
    learned: dict[str, Declared] = {}
    usual: dict[str, Any] = {
        "is_visible": lambda method, name: "mine" in name,
        "is_offered": lambda method: method in ("tools/list", "tasks/get"),
        "fresh_ms": lambda: 5000,
        "seal_state": lambda own: f"sealed {own}",
        "bind_task": lambda task: task != "other",
        "owns_task": lambda task: task == "mine",
        "learn_headers": learned.__setitem__,
    }
    return Grants(**{**usual, **other})


def shown(method: str | None, result: dict[str, Any], revision: str | None = STATELESS, **other: Any) -> Any:
    said = {"jsonrpc": "2.0", "id": 1, "result": result}
    ResultFilter(method, 1, revision, grants(**other)).apply(said)
    return said["result"]


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({"ttlMs": 60_000, "cacheScope": "public"}, {"ttlMs": 5000, "cacheScope": "private"}),
        ({"ttlMs": 10, "cacheScope": "private"}, {"ttlMs": 10, "cacheScope": "private"}),
        ({}, {"ttlMs": 0, "cacheScope": "private"}),
        ({"ttlMs": True, "cacheScope": "Public"}, {"ttlMs": 0, "cacheScope": "private"}),
        ({"ttlMs": -1}, {"ttlMs": 0, "cacheScope": "private"}),
    ],
)
def test_cache_of_a_result_is_private_and_no_longer_than_the_lease(
    given: dict[str, Any], kept: dict[str, Any]
) -> None:
    assert shown("resources/read", given) == kept
    assert shown("tools/call", {"x": 1}) == {"x": 1}
    assert shown("tools/call", {"ttlMs": 9}) == {"ttlMs": 9, "cacheScope": "private"}
    assert shown("tools/list", {"ttlMs": 60_000}, "2025-11-25") == {"ttlMs": 60_000}


def test_a_server_shows_only_what_is_behind_it() -> None:
    discovered = {
        "supportedVersions": ["2024-11-05", "2025-11-25", STATELESS, "2027-01-01"],
        "capabilities": {
            "tools": {"listChanged": True}, "prompts": {}, "resources": {}, "completions": {}, "logging": {},
            "extensions": {"io.modelcontextprotocol/tasks": {}, "com.acme/run": {}}, "acme": {},
        },
        "ttlMs": 1, "cacheScope": "public",
    }  # fmt: skip
    assert shown("server/discover", discovered) == {
        "supportedVersions": ["2025-11-25", STATELESS],
        "capabilities": {
            "tools": {"listChanged": True}, "logging": {}, "extensions": {"io.modelcontextprotocol/tasks": {}},
        },
        "ttlMs": 1, "cacheScope": "private",
    }  # fmt: skip
    nothing = shown(
        "server/discover", {"capabilities": {"extensions": {"x": {}}}}, is_offered=lambda method: False
    )
    assert nothing["capabilities"] == {"extensions": {}}


def test_a_state_is_sealed_where_input_may_be_required_and_nowhere_else() -> None:
    assert (
        shown("tools/call", {"resultType": "input_required", "requestState": "s"})["requestState"]
        == "sealed s"
    )
    assert shown("prompts/get", {"resultType": "input_required"})["requestState"] == "sealed None"
    for method, result in (
        ("tools/list", {"resultType": "input_required"}),
        ("tools/call", {"resultType": "input_required", "requestState": 1}),
    ):
        with pytest.raises(UnreadableResultError):
            shown(method, result)
    untouched = {"resultType": "input_required", "requestState": "s"}
    assert shown("tools/call", dict(untouched), "2025-11-25") == untouched


def test_a_state_that_no_client_could_send_back_is_not_given_out() -> None:
    with pytest.raises(UnreadableResultError):
        shown(
            "tools/call", {"resultType": "input_required"}, seal_state=lambda own: "x" * (MAX_STATE_CHARS + 1)
        )


@pytest.mark.parametrize("id", ["1", 2, None, [1]])
def test_a_stateless_answer_is_one_to_the_request(id: Any) -> None:
    """Under another id it would not be filtered, and some clients would take it all the same."""
    said = {"jsonrpc": "2.0", "id": id, "result": {"resultType": "input_required", "requestState": "s"}}
    with pytest.raises(UnreadableResultError):
        ResultFilter("tools/call", 1, STATELESS, grants()).apply(said)
    assert ResultFilter("tools/call", 1, "2025-11-25", grants()).apply(said) is False, "a resumed stream may"
    unread = {"jsonrpc": "2.0", "id": None, "error": {"code": -32700, "message": "x"}}
    assert ResultFilter("tools/call", 1, STATELESS, grants()).apply(unread) is False


def test_tasks_of_others_are_not_shown() -> None:
    assert shown("tools/call", {"resultType": "task", "taskId": "new"})["taskId"] == "new"
    for result in ({"taskId": "other"}, {"task": {"taskId": "other"}}):
        with pytest.raises(UnreadableResultError):
            shown("tools/call", result, "2025-11-25")
    listed = {"tasks": [{"taskId": "mine"}, {"taskId": "other"}, {}, 7]}
    assert shown("tasks/list", listed, "2025-11-25") == {"tasks": [{"taskId": "mine"}]}


@pytest.mark.parametrize(
    ("method", "params", "passes"),
    [
        ("notifications/resources/updated", {"uri": "mine"}, False),
        ("notifications/resources/updated", {"uri": "other"}, None),
        ("notifications/resources/updated", {}, None),
        ("notifications/tasks", {"taskId": "mine"}, False),
        ("notifications/tasks/status", {"taskId": "other"}, None),
        ("notifications/progress", {"progressToken": 1}, False),
    ],
)
def test_of_unasked_messages_those_about_others_are_dropped(
    method: str, params: dict[str, Any], passes: bool | None
) -> None:
    said = {"jsonrpc": "2.0", "method": method, "params": params}
    assert ResultFilter("subscriptions/listen", 1, STATELESS, grants()).apply(said) is passes


def test_a_stateless_server_asks_nothing_by_itself() -> None:
    asked = {"jsonrpc": "2.0", "id": 5, "method": "sampling/createMessage", "params": {}}
    with pytest.raises(UnreadableResultError):
        ResultFilter("tools/call", 1, STATELESS, grants()).apply(asked)
    assert ResultFilter("tools/call", 1, "2025-11-25", grants()).apply(asked) is False


def test_declarations_of_listed_tools_are_kept() -> None:
    learned: dict[str, Declared] = {}
    tools = [
        {"name": "mine", "inputSchema": {"properties": {"a": {"x-mcp-header": "B"}}}},
        {"name": "other", "inputSchema": {"properties": {"a": {"x-mcp-header": "B"}}}},
    ]
    shown("tools/list", {"tools": tools}, learn_headers=learned.__setitem__)
    assert learned == {"mine": {"b": ("a",)}}
