"""A server that speaks as much of the APIs of OpenAI and Anthropic as their SDKs need, plain and streamed."""

from __future__ import annotations

import json
from typing import Any

from tests.gateway.target import Received


def respond(received: Received) -> bytes:
    """As much of both APIs as the SDKs need. The text repeats the key, as a server that logs too much would."""
    document = json.loads(received.body) if received.body else {}
    key = "".join(received.values("authorization") + received.values("x-api-key"))
    if received.target.partition("?")[0].endswith("/messages"):
        events = _anthropic_events(document["model"], key)
        whole = {**events[0]["message"], "content": [{"type": "text", "text": f"Hello {key}"}]}
    else:
        events = [_openai_chunk(document.get("model"), text) for text in ("Hello ", key)]
        message = {"role": "assistant", "content": f"Hello {key}"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        whole = {**events[0], "object": "chat.completion", "choices": [choice]}
    if not document.get("stream"):
        return _answer("application/json", json.dumps(whole))
    lines = [f"event: {one['type']}\n" if "type" in one else "" for one in events]
    stream = "".join(f"{line}data: {json.dumps(one)}\n\n" for line, one in zip(lines, events, strict=True))
    return _answer("text/event-stream", stream + ("" if "type" in events[0] else "data: [DONE]\n\n"))


def _openai_chunk(model: str | None, text: str) -> dict[str, Any]:
    choice = {"index": 0, "delta": {"role": "assistant", "content": text}, "finish_reason": None}
    return {"id": "c", "object": "chat.completion.chunk", "created": 1, "model": model, "choices": [choice]}


def _anthropic_events(model: str, key: str) -> list[dict[str, Any]]:
    usage = {"input_tokens": 1, "output_tokens": 2}
    message = {
        "id": "m",
        "type": "message",
        "role": "assistant",
        "model": model,
        "content": [],
        "usage": usage,
    }
    return [
        {"type": "message_start", "message": {**message, "stop_reason": "end_turn", "stop_sequence": None}},
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": f"Hello {key}"}},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_stop"},
    ]


def _answer(media: str, body: str) -> bytes:
    data = body.encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (
        media.encode(),
        len(data),
        data,
    )
