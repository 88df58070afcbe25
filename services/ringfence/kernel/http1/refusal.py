"""A message that is refused by its form or by a proxy itself, and the HTTP answer to it (RFC 9457)."""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from typing import Final

import orjson

from ringfence.kernel.base.errors import RingfenceError

LINGER_S: Final = 5.0
LINGER_BYTES: Final = 2 * 1024 * 1024
"""Limits of a lingering close (RFC 9112, 9.6): a server that answers before it has read all of a request ends its
direction, and discards what still arrives. If it closed at once, a reset could take the answer from the client.
"""

_PROBLEM: Final = "application/problem+json"


class RequestRefusedError(RingfenceError):
    """A request or its response is not forwarded. `status` is the HTTP status for the client (RFC 9110, 15)."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.headers = headers or {}
        self.agent_id: str | None = None
        """The agent that the refusal is attributed to, if the request itself proved who sent it."""


def problem_answer(error: RequestRefusedError) -> tuple[int, Mapping[str, str], bytes]:
    """Status, headers and body of the answer: problem details (RFC 9457)."""
    return (
        error.status,
        {"Content-Type": _PROBLEM, **error.headers},
        _problem_details(error.status, error.code, error.message),
    )


def answer_head(status: int, headers: Mapping[str, str], length: int, *, close: bool) -> bytes:
    """The head of an answer by the gateway itself."""
    lines = [f"HTTP/1.1 {status} {_phrase(status)}", f"Content-Length: {length}", "Cache-Control: no-store"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    if close:
        lines.append("Connection: close")
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def _problem_details(status: int, code: str, message: str) -> bytes:
    return orjson.dumps(
        {
            "type": "about:blank",
            "title": _phrase(status),
            "status": status,
            "code": code,
            "detail": message,
        }
    )


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Refused"
