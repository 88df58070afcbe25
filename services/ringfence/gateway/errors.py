"""What a data plane refuses by itself, before or after the decision, and how it says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import Final

import orjson

from ringfence.gateway.contract import Verdict
from ringfence.kernel.base.errors import RingfenceError

AnswerVerdict = Callable[[Verdict], tuple[int, Mapping[str, str], bytes]]
"""Status, headers and body that tell an agent of a verdict that is not `allowed`."""

_PROBLEM: Final = "application/problem+json"


class RefusedError(RingfenceError):
    """A request, or the answer to it, goes no further. `status` is what the client is told (RFC 9110, 15)."""

    def __init__(
        self, status: int, code: str, message: str, *, headers: Mapping[str, str] | None = None
    ) -> None:
        super().__init__(message, code=code)
        self.status = status
        self.headers = headers or {}


def problem_answer(error: RefusedError) -> tuple[int, Mapping[str, str], bytes]:
    """What a client is told of a refusal: problem details (RFC 9457)."""
    return (
        error.status,
        {"Content-Type": _PROBLEM, **error.headers},
        _problem_details(error.status, error.code, error.message),
    )


def answer_head(status: int, headers: Mapping[str, str], length: int, *, close: bool) -> bytes:
    """The head of an answer of the gateway's own."""
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
