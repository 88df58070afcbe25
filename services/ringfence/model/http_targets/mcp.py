"""Messages of the Model Context Protocol (2025-06-18 and later), read so that nobody can read them otherwise. Pure.

A message is one JSON-RPC 2.0 object: a batch, which the protocol no longer has, is refused. So are names that differ
from others, or from those that mean something, by nothing but upper and lower case: some readers of JSON take
`Name` for `name`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.strict_json import json_object

RESPONSE: Final = "response"
"""Stands for the method of what answers a request of the server's, which has none."""
NAMED_BY: Final[Mapping[str, str]] = {
    "tools/call": "name", "prompts/get": "name",
    "resources/read": "uri", "resources/subscribe": "uri", "resources/unsubscribe": "uri",
}  # fmt: skip
"""The member of `params` that says which one is meant, by method."""
CALL: Final = "tools/call"
_ASKS: Final = frozenset({
    "initialize", "ping", "tools/list", "prompts/list", "prompts/get", "resources/list", "resources/templates/list",
    "resources/read", "completion/complete",
})  # fmt: skip
"""What changes nothing at the server, as the protocol has it."""
_NOTIFIES: Final = "notifications/"
WITH_ARGUMENTS: Final = frozenset({"tools/call", "prompts/get"})
LISTED: Final[Mapping[str, tuple[str, str]]] = {
    "tools": ("tools/call", "name"), "prompts": ("prompts/get", "name"), "resources": ("resources/read", "uri"),
}  # fmt: skip
"""The members of a result that list things, by what they are called there: how one is used, and what names it."""

_TOP: Final = frozenset({"jsonrpc", "id", "method", "params", "result", "error"})
_MEANT: Final = frozenset({"name", "uri", "arguments", "_meta"})
_MAX_NAME_CHARS: Final = 1024
_MAX_ID_CHARS: Final = 256
_MAX_ID: Final = 2**53 - 1


class McpMessageError(RingfenceError):
    """What was posted is no single message that can be understood for certain. The message says what is wrong."""

    def __init__(self, code: str, message: str, *, id: str | int | None = None) -> None:
        super().__init__(message, code=code)
        self.id = id
        """Of the request, where that much could be read."""


@dataclass(frozen=True, slots=True)
class McpMessage:
    """One message from a client to a server."""

    kind: Literal["request", "notification", "response"]
    method: str
    """`RESPONSE` where it is one."""
    id: str | int | None = None
    name: str | None = None
    """Of the tool or prompt, or the URI of the resource."""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def only_asks(self) -> bool:
        """Whether it changes nothing, whatever the server is. Of a call that cannot be said."""
        return self.method in _ASKS or self.method.startswith(_NOTIFIES)


def read_message(body: bytes) -> McpMessage:
    """The message that a body is. Raises McpMessageError."""
    if body.lstrip(b" \t\r\n")[:1] == b"[":
        raise McpMessageError("mcp_batch", "several messages at once are not taken: post each by itself")
    try:
        given = json_object(body)
    except ValueError as error:
        raise McpMessageError(
            "mcp_unreadable", f"the message is not one JSON object: {_short(error)}"
        ) from None
    if not given.keys() <= _TOP or given.get("jsonrpc") != "2.0":
        raise _invalid("it is not JSON-RPC 2.0, or has members that JSON-RPC does not know")
    id = given.get("id")
    if "id" in given and not _is_id(id):
        raise _invalid("its id is neither a text nor a whole number")
    if "method" not in given:
        return _response(given, id)
    if "result" in given or "error" in given:
        raise _invalid("it is a request and a response", id)
    method, params = given["method"], given.get("params", {})
    if not isinstance(method, str) or method == RESPONSE:
        raise _invalid("its method is none", id)
    if not isinstance(params, dict):
        raise _invalid("its params are no object", id)
    name, arguments = _meant(method, params, id)
    kind: Literal["request", "notification"] = "request" if "id" in given else "notification"
    if (kind == "notification") != method.startswith("notifications/"):
        raise _invalid("a notification has no id and a method notifications/..., a request has an id", id)
    return McpMessage(kind, method, id, name, arguments)


def _response(given: Mapping[str, Any], id: str | int | None) -> McpMessage:
    if id is None or "params" in given or ("result" in given) == ("error" in given):
        raise _invalid("it is neither a request, nor a notification, nor a response")
    return McpMessage("response", RESPONSE, id)


def _meant(
    method: str, params: Mapping[str, Any], id: str | int | None
) -> tuple[str | None, Mapping[str, Any]]:
    """What a request names, and with which arguments."""
    if clash(params) or any(name.casefold() in _MEANT and name not in _MEANT for name in params):
        raise _invalid("names in its params differ by upper and lower case alone", id)
    name = params.get(NAMED_BY[method]) if method in NAMED_BY else None
    if method in NAMED_BY and not (isinstance(name, str) and 0 < len(name) <= _MAX_NAME_CHARS):
        raise _invalid(f"{method} needs params.{NAMED_BY[method]}, a text", id)
    arguments = params.get("arguments", {}) if method in WITH_ARGUMENTS else {}
    if not isinstance(arguments, dict) or clash(arguments):
        raise _invalid(
            "its arguments are no object, or have names that differ by upper and lower case alone", id
        )
    return name, arguments


def clash(names: Iterable[str]) -> bool:
    """Whether two names are the same but for upper and lower case."""
    given = list(names)
    return len({name.casefold() for name in given}) != len(given)


def _is_id(id: Any) -> bool:
    if isinstance(id, str):
        return len(id) <= _MAX_ID_CHARS
    return isinstance(id, int) and not isinstance(id, bool) and abs(id) <= _MAX_ID


def _invalid(what: str, id: str | int | None = None) -> McpMessageError:
    return McpMessageError("mcp_invalid", f"the message is refused: {what}", id=id)


def _short(error: ValueError) -> str:
    """Without what the parser quotes of the text, which may be a secret."""
    known = ("nested too deeply", "no JSON object", "a name comes twice")
    return str(error) if str(error) in known else "it cannot be parsed"
