"""Usage of language models: what a request reserves, what is read out of an answer, and what is counted."""

from __future__ import annotations

import json
import random
import tracemalloc
from typing import Any

import pytest

from ringfence.gateway.decision.model_usage import (
    EVENTS,
    MAX_MESSAGE_BYTES,
    OUTPUT_TOKENS,
    AnswerReader,
    PreparedRequest,
    prepare,
    usage_of,
)
from ringfence.messages.operations import ModelUsage
from ringfence.messages.registry import MAX_LIMIT, ModelApi, ModelLimits
from ringfence.model.model_limits import higher_limits, limits_text, lowest_limits
from ringfence.model.model_requests import ModelRequestError

CHAT: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "x" * 400}]}
USAGE = {"prompt_tokens": 30, "completion_tokens": 700, "total_tokens": 730}
JSON = b"application/json"


def prepared(document: dict[str, Any], api: ModelApi = "openai", path: str = "/v1/x") -> PreparedRequest:
    return prepare(api, path, json.dumps(document).encode())


def changed(request: PreparedRequest, document: dict[str, Any]) -> dict[str, Any]:
    """The members that were set."""
    sent: dict[str, Any] = json.loads(request.body)
    assert {
        name: sent[name] for name in document if name != "stream_options" and document[name] is not None
    } == {name: value for name, value in document.items() if name != "stream_options" and value is not None}
    return {name: value for name, value in sent.items() if document.get(name) != value}


# --- reservation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("api", "document", "output", "set_to"),
    [
        ("openai", CHAT, OUTPUT_TOKENS, {"max_completion_tokens": OUTPUT_TOKENS}),
        ("openai", {**CHAT, "max_tokens": 9}, 9, {}),
        ("openai", {**CHAT, "max_tokens": 9, "max_completion_tokens": 10, "n": 3}, 30, {}),
        ("openai", {**CHAT, "max_tokens": None, "n": None}, OUTPUT_TOKENS, {"max_completion_tokens": OUTPUT_TOKENS}),
        ("openai", {"model": "m", "input": "x"}, OUTPUT_TOKENS, {"max_output_tokens": OUTPUT_TOKENS}),
        ("openai", {"model": "m", "input": "x", "max_output_tokens": 5, "stream": True}, 5, {}),
        ("anthropic", {**CHAT, "max_tokens": 9, "stream": True}, 9, {}),
        ("anthropic", CHAT, OUTPUT_TOKENS, {"max_tokens": OUTPUT_TOKENS}),
    ],
    ids=["none", "old", "both", "null", "response", "response streamed", "message", "message without"],
)  # fmt: skip
def test_request_reserves_its_bytes_and_its_output_limit(
    api: ModelApi, document: dict[str, Any], output: int, set_to: dict[str, Any]
) -> None:
    request = prepared(document, api)
    assert request.reservation == len(json.dumps(document)) // 4 + output
    assert changed(request, document) == set_to


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (None, {"include_usage": True}), ({}, {"include_usage": True}), ({"include_usage": False}, None),
        ({"include_obfuscation": False}, {"include_obfuscation": False, "include_usage": True}),
        ({"include_usage": None}, {"include_usage": True}),
    ],
    ids=["none", "empty", "no", "others", "null"],
)  # fmt: skip
def test_stream_is_asked_for_its_usage_unless_it_says_no(options: Any, expected: Any) -> None:
    document = {**CHAT, "max_tokens": 9, "stream": True, "stream_options": options}
    assert changed(prepared(document), document) == ({"stream_options": expected} if expected else {})


def test_request_that_says_all_is_forwarded_to_the_byte() -> None:
    body = b'{ "model":"m", "messages":[], "temperature":1e0, "max_tokens":9 }'
    assert prepare("openai", "/v1/chat/completions", body).body == body


@pytest.mark.parametrize(("path", "output"), [("/v1/embeddings", 0), ("/v1/messages/count_tokens", None)])
def test_endpoint_that_generates_nothing_gets_no_output_limit(path: str, output: int | None) -> None:
    body = json.dumps({"model": "m", "input": "x" * 400}).encode()
    request = prepare("openai", path, body)
    assert request.body == body
    assert request.reservation == (len(body) // 4 if output is not None else 0)


@pytest.mark.parametrize("number", [0, -1, 1.0, "9", True, [], MAX_LIMIT + 1])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n"])
def test_number_that_is_none_is_refused(name: str, number: Any) -> None:
    with pytest.raises(ModelRequestError, match=name):
        prepared({**CHAT, name: number})


def test_inline_data_is_reserved_for_and_is_no_text() -> None:
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 40_000}}
    request = prepared({"model": "m", "messages": [{"role": "user", "content": [image]}]})
    assert request.reservation > 10_000
    assert request.text_tokens == 0


# --- answers ----------------------------------------------------------------------------------------------------------


def events(*documents: Any, end: str = "\n") -> bytes:
    return "".join(f"event: x{end}data: {json.dumps(one)}{end}{end}" for one in documents).encode()


def read(
    body: bytes, media: bytes = EVENTS, *, size: int = 1 << 20, done: bool = True, status: int = 200
) -> AnswerReader:
    reader = AnswerReader(status, media)
    for at in range(0, max(len(body), 1), size):
        reader.feed(body[at : at + size], done=done and at + size >= len(body))
    return reader


def chunk(text: str | None, usage: Any = None, finish: str | None = None) -> dict[str, Any]:
    choices = [] if text is None else [{"delta": {"content": text}, "finish_reason": finish}]
    return {"choices": choices, "usage": usage}


CACHED = {
    "input_tokens": 10, "cache_read_input_tokens": 15, "cache_creation_input_tokens": 5, "output_tokens": 1,
}  # fmt: skip
STREAMS = {
    "chat": ((chunk("é" * 100), chunk("b" * 200, finish="stop"), chunk(None, USAGE)), (30, 700), 400),
    "usage in the last chunk": ((chunk("a" * 400, USAGE, "stop"),), (30, 700), 400),
    "usage so far": ((chunk("a" * 400, {**USAGE, "completion_tokens": 1}),), None, 400),
    "responses": (
        (
            {"type": "response.output_text.delta", "delta": "a" * 400},
            {"type": "response.output_text.done", "text": "a" * 400},
            {"type": "response.completed", "response": {"usage": {"input_tokens": 30, "output_tokens": 700}}},
        ),
        (30, 700), 400,
    ),
    "messages": (
        (
            {"type": "message_start", "message": {"usage": CACHED}},
            {"type": "content_block_delta", "delta": {"type": "text_delta", "text": "a" * 300}},
            {"type": "content_block_delta", "delta": {"type": "input_json_delta", "partial_json": "a" * 100}},
            {"type": "content_block_delta", "delta": {"type": "signature_delta", "signature": "a" * 9000}},
            {"type": "message_delta", "usage": {"output_tokens": 700}},
        ),
        (30, 700), 400,
    ),
    "messages without an end": (
        ({"type": "message_start", "message": {"usage": {"input_tokens": 10, "output_tokens": 1}}},), None, 0,
    ),
    "nothing": ((["x"], 1, None, {"usage": "many"}, {"usage": {"prompt_tokens": -1}}, {"choices": [1]}), None, 0),
}  # fmt: skip


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"], ids=["LF", "CRLF", "CR"])
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
@pytest.mark.parametrize("name", STREAMS)
def test_stream_is_read_in_any_pieces(name: str, size: int, end: str) -> None:
    documents, usage, text_bytes = STREAMS[name]
    body = f": hello{end}{end}".encode() + events(*documents, end=end) + f"data: [DONE]{end}{end}".encode()
    reader = read(body, size=size)
    assert (reader.usage, reader.text_bytes, reader.done) == (usage, text_bytes, True)


def test_event_on_several_lines_counts_and_an_incomplete_one_does_not() -> None:
    whole = b'data: {"choices": [],\ndata: "usage": {"prompt_tokens": 3, "completion_tokens": 4}}\n\n'
    assert read(whole).usage == (3, 4)
    assert read(whole[:-1]).usage is None


@pytest.mark.parametrize("size", [1, 1000])
def test_plain_answer_is_read_at_its_end(size: int) -> None:
    answer = {"choices": [{"message": {"content": "a" * 400}}], "usage": USAGE}
    body = json.dumps(answer).encode()
    assert read(body, JSON, size=size).usage == (30, 700)
    assert read(body, JSON, size=size).text_bytes == 400
    assert read(body[:-1], JSON, size=size).usage is None
    assert read(body, JSON, size=size, done=False).usage is None


@pytest.mark.parametrize("media", [EVENTS, JSON])
@pytest.mark.parametrize("piece", [b"x" * 65536, b"data: " + b"x" * 65530, b"data: x\n" * 8192])
def test_endless_answer_takes_bounded_memory(media: bytes, piece: bytes) -> None:
    reader = AnswerReader(200, media)
    tracemalloc.start()
    try:
        for _ in range(3 * MAX_MESSAGE_BYTES // 65536):
            reader.feed(piece, done=False)
        assert tracemalloc.get_traced_memory()[0] < 2 * MAX_MESSAGE_BYTES
    finally:
        tracemalloc.stop()
    reader.feed(b"\n\n" + events(chunk(None, USAGE)), done=True)
    assert reader.usage == ((30, 700) if media == EVENTS else None)


def test_noise_raises_nothing() -> None:
    noise = random.Random(41)
    for _ in range(300):
        body = bytes(noise.choices(b'data: {}[]"usage\n\r:1,\xff', k=200))
        read(body, noise.choice((EVENTS, JSON)), size=noise.randint(1, 50))


# --- what is counted --------------------------------------------------------------------------------------------------

REQUEST = PreparedRequest(b"{}", reservation=1000, text_tokens=100)


def answered(usage: Any, text_tokens: int = 300, *, status: int = 200) -> AnswerReader:
    return read(events(chunk("a" * text_tokens * 4), chunk(None, usage)), status=status)


def counted(given: int, output: int) -> dict[str, int]:
    return {"prompt_tokens": given, "completion_tokens": output}


@pytest.mark.parametrize(
    ("answer", "reserved", "tokens", "why"),
    [
        (answered(counted(60, 40)), True, 100, "usage"),
        (answered(counted(60, 39)), True, 400, "estimate"),
        (answered(counted(0, 0)), False, 400, "estimate"),
        (answered(counted(0, 0), 0), True, 100, "estimate"),
        (answered(counted(5000, 5000)), True, 10_000, "usage"),
        (answered(None), True, 1000, "reservation"),
        (answered(None, 2000), True, 2100, "reservation"),
        (answered(None), False, 400, "estimate"),
        (None, True, 1000, "reservation"),
        (answered(None, status=429), True, 0, "nothing"),
        (answered(None, status=302), False, 0, "nothing"),
    ],
    ids=[
        "a quarter", "under a quarter", "zero", "zero and no text", "more than reserved", "cut", "cut late",
        "unlimited", "no answer", "refused", "redirected",
    ],
)  # fmt: skip
def test_count_of_an_ended_request(
    answer: AnswerReader | None, reserved: bool, tokens: int, why: str
) -> None:
    usage: ModelUsage = usage_of(answer, REQUEST, reserved=reserved)
    assert (usage.tokens, usage.counted) == (tokens, why)


# --- limits -----------------------------------------------------------------------------------------------------------


def test_lowest_limits_hold_and_unknown_fields_stay() -> None:
    one, other = ModelLimits(tokens=5), ModelLimits.model_validate({"tokens": 4, "requests": 3, "cost": 1})
    assert lowest_limits(None, None) is None
    assert lowest_limits(one, None) == lowest_limits(None, one) == one
    for lowest in (lowest_limits(one, other), lowest_limits(other, one)):
        assert lowest is not None
        assert (lowest.tokens, lowest.requests, lowest.model_extra) == (4, 3, {"cost": 1})


def test_limit_is_higher_only_than_one_that_is_there() -> None:
    assert higher_limits(ModelLimits(tokens=5, requests=2), ModelLimits(tokens=4)) == ["tokens"]
    assert higher_limits(ModelLimits(requests=9), ModelLimits(tokens=4)) == []
    assert limits_text(ModelLimits(tokens=5, requests=2)) == "tokens=5 requests=2"
    assert limits_text(None) == "none"
