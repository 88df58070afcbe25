"""Filters the responses of MCP endpoints: lists contain only what the lease may use. The outcome is recorded.

What is filtered, and why, is that of `ringfence.model.mcp.results`: in a JSON body, and in each event of a stream.
"""

from __future__ import annotations

import re
from typing import Any, Final

import orjson

from ringfence.gateway.contract import McpExchange, McpOutcome
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.http1.head import RequestRefusedError, ResponseHead
from ringfence.messages.codes import Code
from ringfence.model.mcp.results import ResultFilter, TooLongListError, UnreadableResultError

MAX_MESSAGE_BYTES: Final = 4 * 1024 * 1024
"""The most bytes of a message of a target, which is buffered until it is complete."""
JSON: Final = b"application/json"
EVENTS: Final = b"text/event-stream"

_ACCEPTED: Final = 202
_MAX_CODE: Final = 2**53
_LINE_COSTS: Final = 64
"""The memory that a line takes besides its own bytes, so that many short lines count for what they cost."""
_LINE_END: Final = re.compile(rb"\r\n|\n|\r(?!\Z)")
_BOM: Final = b"\xef\xbb\xbf"


class McpResponseFilter:
    """Filters the messages that answer one request."""

    def __init__(self, mcp: McpExchange) -> None:
        self._mcp = mcp
        self._results = ResultFilter(mcp.method, mcp.id, mcp.revision, mcp.grants)
        self.outcome = McpOutcome()

    @property
    def may_be_empty(self) -> bool:
        """Whether a success may have no body: the answer to a message without an id, or to the end of a session."""
        return self._mcp.id is None

    def on_response_head(self, response: ResponseHead) -> None:
        """Note the status and the session. Raises RequestRefusedError if the session belongs to another lease."""
        self.outcome.status = response.status
        if response.status >= 300:
            self.outcome.kind = "transport_error"
        elif response.status == _ACCEPTED or self._mcp.id is None:
            self.outcome.kind = "accepted"
        session = response.values.get(b"mcp-session-id")
        if session is None or not self._mcp.opens_session or response.status >= 300:
            return
        if not self._mcp.bind_session(session.decode("latin-1")):
            text = "the target gives out a session that is another lease's already, or none that can be one"
            raise RequestRefusedError(Code.MCP_SESSION_TAKEN, text)

    def finish(self) -> None:
        self._mcp.record_outcome(self.outcome)

    def message(self, data: bytes) -> bytes | None:
        """Filter one message; None if it must not be shown. Raises RequestRefusedError if it cannot be understood."""
        try:
            message = json_object(data)
        except ValueError:
            raise _unreadable("a message is not one JSON object") from None
        self._record_outcome(message)
        try:
            changed = self._results.apply(message)
        except TooLongListError as error:
            raise too_large(error.message) from None
        except UnreadableResultError as error:
            raise _unreadable(error.message) from None
        if changed is None:
            return None
        return orjson.dumps(message) if changed else data

    def _record_outcome(self, message: dict[str, Any]) -> None:
        if "method" in message or self._mcp.id is None or message.get("id") != self._mcp.id:
            return
        error, result = message.get("error"), message.get("result")
        if isinstance(error, dict):
            code = error.get("code")
            self.outcome.kind = "rpc_error"
            self.outcome.code = code if type(code) is int and abs(code) <= _MAX_CODE else None
        elif isinstance(result, dict) and result.get("isError") is True:
            self.outcome.kind = "tool_error"
        elif result is not None:
            self.outcome.kind = "result"


class EventStreamFilter:
    """Filters server-sent events. Each is held until it is complete. Lines other than data are forwarded unchanged."""

    def __init__(self, answers: McpResponseFilter) -> None:
        self._answers = answers
        self._buffer = bytearray()
        self._lines: list[bytes] = []
        self._held_bytes = 0
        self._begun = False

    def feed(self, piece: bytes) -> bytes:
        """The filtered events that are complete now. Raises RequestRefusedError."""
        self._buffer += piece
        if not self._begun and self._buffer:
            if _BOM.startswith(bytes(self._buffer[:3])) and len(self._buffer) < len(_BOM):
                return b""
            self._begun = True
            if self._buffer.startswith(_BOM):
                raise _unreadable("a stream begins with a byte order mark")
        out: list[bytes] = []
        at = 0
        for end in _LINE_END.finditer(self._buffer):
            self._line(bytes(self._buffer[at : end.start()]), out)
            at = end.end()
        del self._buffer[:at]
        if self._held_bytes + len(self._buffer) > MAX_MESSAGE_BYTES:
            raise too_large()
        return b"".join(out)

    def last(self, piece: bytes) -> bytes:
        """As `feed`, at the end of the stream. An incomplete event is dropped (HTML, 9.2.6)."""
        return self.feed(piece + b"\n") if self._ends_with_return(piece) else self.feed(piece)

    def _ends_with_return(self, piece: bytes) -> bool:
        """Whether a line end was held back, because an LF could follow the CR."""
        return (piece or bytes(self._buffer)).endswith(b"\r")

    def _line(self, line: bytes, out: list[bytes]) -> None:
        if line:
            self._lines.append(line)
            self._held_bytes += len(line) + _LINE_COSTS
            return
        lines, self._lines, self._held_bytes = self._lines, [], 0
        out.append(self._event(lines))

    def _event(self, lines: list[bytes]) -> bytes:
        data = b"\n".join(_value(line) for line in lines if _name(line) == b"data")
        if data:
            filtered = self._answers.message(data)
            if filtered is None:
                return b""
            if filtered != data:
                lines = [*(line for line in lines if _name(line) != b"data"), b"data: " + filtered]
        return b"".join(line + b"\n" for line in lines) + b"\n"


def media_type(value: bytes | None) -> bytes:
    """The media type of a `Content-Type`, in lower case, without parameters."""
    return (value or b"").partition(b";")[0].strip(b" \t").lower()


def _name(line: bytes) -> bytes:
    return line.partition(b":")[0]


def _value(line: bytes) -> bytes:
    return line.partition(b":")[2].removeprefix(b" ")


def _unreadable(problem: str) -> RequestRefusedError:
    return RequestRefusedError(Code.TARGET_UNREADABLE, f"the target's answer is not forwarded: {problem}")


def too_large(text: str = f"a message of a target may have {MAX_MESSAGE_BYTES} bytes") -> RequestRefusedError:
    """The refusal of a message that is too large to be buffered, or has too many entries."""
    return RequestRefusedError(Code.TARGET_TOO_LARGE, text)
