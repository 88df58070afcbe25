"""Usage of language models: the reservation for a request, and the tokens of its answer. Pure.

The shapes are those of OpenAI's chat completions, responses and embeddings, and of Anthropic's messages. Answers are
read as they pass, plain or as server-sent events (HTML, 9.2.6), in bounded memory.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import orjson

from ringfence.messages.operations import ModelUsage
from ringfence.messages.registry import MAX_LIMIT, ModelApi
from ringfence.model.model_requests import ModelRequestError

BYTES_PER_TOKEN: Final = 4
OUTPUT_TOKENS: Final = 4096
"""The output limit of requests that set none."""
MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""The longest plain answer, or event of a stream, in which usage is looked for."""
EVENTS: Final = b"text/event-stream"
_UNDERSTATED: Final = 4
"""A usage of less than one part in so many of the estimate does not count."""
_REFUSED: Final = 300
"""Statuses from this on: the provider generated nothing."""
_TEXT: Final = frozenset({
    "arguments", "content", "delta", "input", "instructions", "output", "partial_json", "refusal", "summary", "system",
    "text", "thinking", "transcript",
})  # fmt: skip
"""The members whose texts are tokens for certain. Others may be inline data, signatures or vectors."""
_CACHES: Final = ("cache_creation_input_tokens", "cache_read_input_tokens")
"""Anthropic's, which `input_tokens` leaves out."""


@dataclass(frozen=True, slots=True)
class PreparedRequest:
    """A request as it is forwarded, and what it may use."""

    body: bytes
    reservation: int
    """Tokens: the bytes of the request, and its output limit as often as it may be used."""
    text_tokens: int
    """Tokens of its text alone, for the estimate: inline images cost less than their bytes."""


def prepare(api: ModelApi, path: str, body: bytes) -> PreparedRequest:
    """Set the output limit, and ask for usage in a stream, where the request does not say.

    Args:
        api: whose shape the request has.
        path: of the request, without its query.
        body: as `read_model_request` accepted it.

    Raises ModelRequestError if a limit or number that it sets is none.
    """
    document = orjson.loads(body)
    if path.endswith("/count_tokens"):  # generates nothing, and costs nothing
        return PreparedRequest(body, 0, 0)
    changes: dict[str, Any] = {}
    output = 0
    if not path.endswith("/embeddings"):
        names = _limit_names(api, document)
        given = [number for name in names if (number := _number(document, name)) is not None]
        if not given:
            changes[names[0]] = OUTPUT_TOKENS
        output = max(given, default=OUTPUT_TOKENS) * (_number(document, "n") or 1)
    options = document.get("stream_options")
    if api == "openai" and "messages" in document and document.get("stream") is True:
        asked = options if isinstance(options, dict) else {}
        if asked.get("include_usage") is None:
            changes["stream_options"] = {**asked, "include_usage": True}
    sent = json.dumps({**document, **changes}, separators=(",", ":")).encode() if changes else body
    text = _text_bytes(document) // BYTES_PER_TOKEN
    return PreparedRequest(sent, min(len(body) // BYTES_PER_TOKEN + output, MAX_LIMIT), text)


def _limit_names(api: ModelApi, document: Mapping[str, Any]) -> tuple[str, ...]:
    if api == "anthropic":
        return ("max_tokens",)
    return ("max_completion_tokens", "max_tokens") if "messages" in document else ("max_output_tokens",)


def _number(document: Mapping[str, Any], name: str) -> int | None:
    value = document.get(name)
    if value is not None and (type(value) is not int or not 0 < value <= MAX_LIMIT):
        raise ModelRequestError(f"{name} is no whole number from 1 on")
    return value


class AnswerReader:
    """Reads usage and the length of the text out of an answer."""

    def __init__(self, status: int, media_type: bytes) -> None:
        self.refused = status >= _REFUSED
        self.status = status
        self.done = False
        """Whether all of the answer has passed."""
        self.input_tokens: int | None = None
        self.output_tokens: int | None = None
        self.text_bytes = 0
        self._final = False
        """Whether the usage is that of the whole answer."""
        self._events = media_type == EVENTS
        self._buffer = bytearray()
        self._data = bytearray()
        self._too_long = False
        self._skip_line_feed = False

    @property
    def usage(self) -> tuple[int, int] | None:
        """Tokens of request and answer, once the whole answer's usage has passed."""
        if not self._final or self.input_tokens is None:
            return None
        return self.input_tokens, self.output_tokens or 0

    def feed(self, piece: bytes, *, done: bool) -> None:
        self.done = done
        if self.refused:
            return
        if self._events:
            self._read_lines(piece)
            return
        if not self._too_long:
            self._buffer += piece
            self._too_long = len(self._buffer) > MAX_MESSAGE_BYTES
        if self._too_long:
            self._buffer.clear()
        elif done:
            self._read_answer(_json(self._buffer))

    def _read_lines(self, piece: bytes) -> None:
        """Lines end with CR, LF or both, also where pieces part them. An incomplete event at the end does not count."""
        if self._skip_line_feed and piece[:1] == b"\n":
            piece = piece[1:]
        self._skip_line_feed = piece.endswith(b"\r")
        self._buffer += piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if len(self._buffer) <= MAX_MESSAGE_BYTES and b"\n" not in piece and b"\r" not in piece:
            return
        *lines, rest = self._buffer.split(b"\n")
        for line in lines:
            self._read_line(bytes(line))
        if len(rest) > MAX_MESSAGE_BYTES:  # of no use, and the end of the line shows nothing
            self._too_long, rest = True, rest[:0]
        self._buffer = bytearray(rest)

    def _read_line(self, line: bytes) -> None:
        if line:
            name, _, value = line.partition(b":")
            if name == b"data":
                self._data += b"\n" + value.removeprefix(b" ")
            self._too_long = self._too_long or len(self._data) > MAX_MESSAGE_BYTES
            if self._too_long:
                self._data.clear()
            return
        if self._data and not self._too_long:
            self._read_event(_json(self._data))
        self._data.clear()
        self._too_long = False

    def _read_answer(self, answer: Any) -> None:
        if not isinstance(answer, dict):
            return
        self.text_bytes += _text_bytes(answer)
        self._note_usage(answer.get("usage"), final=True)

    def _read_event(self, event: Any) -> None:
        if not isinstance(event, dict):
            return
        listed = event.get("choices")
        choices = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        deltas = (event.get("delta"), *(one.get("delta") for one in choices))
        self.text_bytes += sum(_text_bytes(one, text=True) for one in deltas)
        of_message = event.get("message")  # Anthropic's first event
        if isinstance(of_message, dict):
            self._note_usage(of_message.get("usage"), final=False)
        response = event.get("response")  # OpenAI's last event of a response
        if isinstance(response, dict):
            self._note_usage(response.get("usage"), final=True)
        # Some servers add the usage so far to each chunk.
        self._note_usage(event.get("usage"), final=all(one.get("finish_reason") for one in choices))

    def _note_usage(self, usage: Any, *, final: bool) -> None:
        if not isinstance(usage, dict):
            return
        caches = [_count(usage.get(name)) or 0 for name in _CACHES]
        given = _count(usage.get("prompt_tokens", usage.get("input_tokens")))
        output = _count(usage.get("completion_tokens", usage.get("output_tokens")))
        if given is not None:
            self.input_tokens = max(given + sum(caches), self.input_tokens or 0)
        if output is not None:
            self.output_tokens = max(output, self.output_tokens or 0)
        self._final = self._final or (final and (given is not None or output is not None))


def usage_of(answer: AnswerReader | None, prepared: PreparedRequest, *, reserved: bool) -> ModelUsage:
    """Return the usage of an ended request, and the tokens that its task pays.

    `answer`: None if no head of an answer came. `reserved`: whether the task has a reservation, which it pays where the
    answer does not say what was used.
    """
    if answer is not None and answer.refused:
        return ModelUsage(tokens=0, counted="nothing")
    estimate = prepared.text_tokens + (answer.text_bytes // BYTES_PER_TOKEN if answer is not None else 0)
    usage = answer.usage if answer is not None else None
    if usage is not None:
        stated = sum(usage)
        enough = stated * _UNDERSTATED >= estimate
        return ModelUsage(
            input_tokens=usage[0], output_tokens=usage[1],
            tokens=stated if enough else estimate, counted="usage" if enough else "estimate",
        )  # fmt: skip
    if reserved:
        return ModelUsage(tokens=max(prepared.reservation, estimate), counted="reservation")
    return ModelUsage(tokens=estimate, counted="estimate")


def _json(data: bytearray) -> Any:
    """The value in JSON; None if it is none, such as the `[DONE]` at the end of OpenAI's streams."""
    try:
        return orjson.loads(data)
    except ValueError:
        return None


def _count(value: Any) -> int | None:
    return value if type(value) is int and 0 <= value <= MAX_LIMIT else None


def _text_bytes(value: Any, *, text: bool = False) -> int:
    """The bytes of the texts in JSON that are tokens. `text`: whether a text here is one."""
    return sum(len(one.encode("utf-8", "surrogatepass")) for one in _texts(value, text))


def _texts(value: Any, text: bool) -> Iterator[str]:
    left: list[tuple[Any, bool]] = [(value, text)]
    while left:
        one, counts = left.pop()
        if isinstance(one, str):
            if counts and not one.startswith("data:"):
                yield one
        elif isinstance(one, list):
            left += [(each, counts) for each in one]
        elif isinstance(one, dict):
            left += [(each, name in _TEXT) for name, each in one.items()]
