"""What servers of MCP answer: lists are cut down however they come in pieces, and everything else passes as it came."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.gateway.contract import McpExchange, McpOutcome
from ringfence.gateway.dataplane.mcp_responses import (
    MAX_MESSAGE_BYTES,
    EventStreamFilter,
    McpResponseFilter,
    media_type,
)
from ringfence.kernel.http1.head import FieldSection, RequestRefusedError, ResponseHead
from ringfence.messages.codes import Code
from ringfence.model.mcp.results import MAX_LISTED, Grants
from tests.support.verdicts import refusal_code

GRANTS = Grants(
    is_visible=lambda method, name: name == "mine",
    is_offered=lambda method: method in ("tools/list", "tools/call"),
    fresh_ms=lambda: 5000,
    seal_state=lambda own: f"sealed {own}",
    bind_task=lambda task: task != "other",
    owns_task=lambda task: task == "mine",
    learn_headers=lambda tool, declared: None,
)
LIST = {
    "jsonrpc": "2.0",
    "id": 1,
    "result": {"tools": [{"name": "mine"}, {"name": "other"}, {"nameless": 1}]},
}
CUT = {**LIST, "result": {"tools": [{"name": "mine"}]}}


def answers(
    id: int | str | None = 1, *, opens_session: bool = False, bind_session: bool = True
) -> McpResponseFilter:
    told: list[McpOutcome] = []
    return McpResponseFilter(
        McpExchange(
            "tools/call",
            id,
            opens_session,
            GRANTS,
            lambda session: bind_session,
            told.append,
        )
    )


def head(status: int = 200, **known: bytes) -> ResponseHead:
    values = {name.replace("_", "-").encode(): value for name, value in known.items()}
    block = FieldSection([], values, None, False, frozenset())
    return ResponseHead(1, block, [], values, None, False, frozenset(), status, b"")


def data(message: Any) -> bytes:
    return json.dumps(message).encode()


@pytest.mark.parametrize(("member", "key"), [("tools", "name"), ("prompts", "name"), ("resources", "uri")])
def test_lists_have_what_may_be_used_and_nothing_else(member: str, key: str) -> None:
    given = {
        "jsonrpc": "2.0",
        "id": 1,
        "result": {member: [{key: "mine"}, {key: "other"}], "nextCursor": "x"},
    }
    assert json.loads(answers().message(data(given)) or b"")["result"] == {
        member: [{key: "mine"}],
        "nextCursor": "x",
    }


@pytest.mark.parametrize(
    "message",
    [
        {"jsonrpc": "2.0", "id": 1, "result": {"tools": [{"name": "mine"}]}},
        {"jsonrpc": "2.0", "id": 1, "result": {"content": [{"type": "text", "text": "tools"}]}},
        {
            "jsonrpc": "2.0",
            "method": "sampling/createMessage",
            "id": 9,
            "params": {"tools": [{"name": "other"}]},
        },
    ],
)
def test_unfiltered_message_passes_unchanged(message: dict[str, Any]) -> None:
    spaced = json.dumps(message, indent=1).encode()
    assert answers().message(spaced) == spaced


@pytest.mark.parametrize("wrong", [b"[]", b"{", b'{"id":1,"id":2}', b"", b"null"])
def test_response_that_is_not_one_message_is_rejected(wrong: bytes) -> None:
    with pytest.raises(RequestRefusedError) as refused:
        answers().message(wrong)
    assert refused.value.status == 502


@pytest.mark.parametrize(
    ("message", "kind", "code"),
    [
        ({"id": 1, "result": {"content": []}}, "result", None),
        ({"id": 1, "result": {"content": [], "isError": True}}, "tool_error", None),
        ({"id": 1, "result": {"content": [], "isError": False}}, "result", None),
        ({"id": 1, "error": {"code": -32602, "message": "x"}}, "rpc_error", -32602),
        ({"id": 1, "error": {"code": "x"}}, "rpc_error", None),
        ({"id": 2, "error": {"code": 1}}, "none", None),
        ({"id": "1", "result": {}}, "none", None),
        ({"id": 1, "method": "ping"}, "none", None),
        ({"method": "notifications/progress"}, "none", None),
    ],
)
def test_outcome_follows_the_response_message(message: dict[str, Any], kind: str, code: int | None) -> None:
    one = answers()
    one.on_response_head(head())
    one.message(data({"jsonrpc": "2.0", **message}))
    assert (one.outcome.kind, one.outcome.code, one.outcome.status) == (kind, code, 200)


@pytest.mark.parametrize(
    ("status", "kind"), [(200, "none"), (202, "accepted"), (302, "transport_error"), (404, "transport_error")]
)
def test_outcome_follows_the_http_status(status: int, kind: str) -> None:
    one = answers()
    one.on_response_head(head(status))
    assert one.outcome.kind == kind


def test_notification_outcome_is_accepted() -> None:
    one = answers(None)
    one.on_response_head(head())
    one.message(data({"jsonrpc": "2.0", "id": 1, "result": {}}))
    assert one.outcome.kind == "accepted"


def test_a_session_that_is_anothers_is_not_given_out() -> None:
    answers(opens_session=True).on_response_head(head(mcp_session_id=b"s"))
    answers(bind_session=False).on_response_head(head(mcp_session_id=b"s"))


STREAM = (
    b": ping\n\n"
    b"id: 1\r\ndata:\r\n\r\n"
    b"event: message\nid: 2\ndata: " + data(LIST) + b"\n\n"
    b"event: message\r\ndata: {\"jsonrpc\":\"2.0\",\r\ndata: \"method\":\"notifications/x\"}\r\n\r\n"
    b"retry: 5\r\r"
    b"data: {\"jsonrpc\":\"2.0\",\"method\":\"never ends\"}\n"
)  # fmt: skip
SIFTED = [
    (b": ping",),
    (b"id: 1", b"data:"),
    (b"event: message", b"id: 2", b"data: " + json.dumps(CUT, separators=(",", ":")).encode()),
    (b"event: message", b'data: {"jsonrpc":"2.0",', b'data: "method":"notifications/x"}'),
    (b"retry: 5",),
]


@given(st.lists(st.integers(0, len(STREAM)), max_size=12))
def test_a_stream_is_sifted_however_it_comes_in_pieces(cuts: list[int]) -> None:
    sieve, at, out = EventStreamFilter(answers()), 0, b""
    for cut in sorted(cuts):
        out += sieve.feed(STREAM[at:cut])
        at = cut
    out += sieve.last(STREAM[at:])
    assert out == b"".join(b"\n".join(lines) + b"\n\n" for lines in SIFTED)


def test_an_event_goes_on_when_it_is_complete() -> None:
    sieve = EventStreamFilter(answers())
    assert sieve.feed(b"data: {}\n") == b""
    assert sieve.feed(b"\n") == b"data: {}\n\n"
    assert sieve.feed(b": still there\n\n") == b": still there\n\n"


@pytest.mark.parametrize("wrong", [b"data: []\n\n", b"\xef\xbb\xbfdata: {}\n\n"])
def test_a_stream_that_says_something_else_is_broken_off(wrong: bytes) -> None:
    with pytest.raises(RequestRefusedError):
        EventStreamFilter(answers()).feed(wrong)


TOO_LONG = {"jsonrpc": "2.0", "id": 1, "result": {"tools": [{"name": "mine"}] * (MAX_LISTED + 1)}}


@pytest.mark.parametrize(
    ("code", "read"),
    [
        (
            Code.MCP_SESSION_TAKEN,
            lambda: answers(opens_session=True, bind_session=False).on_response_head(
                head(mcp_session_id=b"s")
            ),
        ),
        (Code.TARGET_TOO_LARGE, lambda: answers().message(data(TOO_LONG))),
        (Code.TARGET_UNREADABLE, lambda: EventStreamFilter(answers()).feed(b"data: x\n\n")),
    ],
)
def test_answer_is_not_forwarded(code: Code, read: Callable[[], object]) -> None:
    assert refusal_code(read) == code


def test_a_message_that_does_not_end_is_not_held_for_ever() -> None:
    sieve = EventStreamFilter(answers())
    with pytest.raises(RequestRefusedError) as refused:
        for _ in range(MAX_MESSAGE_BYTES // 65536 + 2):
            sieve.feed(b"data: " + b"x" * 65536 + b"\n")
    assert refused.value.code == "target_too_large"


@given(st.binary(max_size=300), st.integers(1, 50))
def test_event_stream_in_any_pieces_shows_no_hidden_tool(stream: bytes, size: int) -> None:
    sieve = EventStreamFilter(answers())
    try:
        out = b"".join(sieve.feed(stream[at : at + size]) for at in range(0, len(stream), size))
        out += sieve.last(b"")
    except RequestRefusedError:
        return
    assert b"other" not in out


@pytest.mark.parametrize(
    ("value", "media"),
    [
        (b"Text/Event-Stream; charset=utf-8", b"text/event-stream"),
        (b"application/json", b"application/json"),
        (None, b""),
    ],
)
def test_a_media_type_has_no_parameters(value: bytes | None, media: bytes) -> None:
    assert media_type(value) == media
