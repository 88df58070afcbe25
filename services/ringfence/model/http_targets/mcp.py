"""Strict parser of Model Context Protocol messages (2025-06-18 and later): no other reader can read them differently.

Pure.

A message is one JSON-RPC 2.0 object. A batch, which the protocol no longer has, is refused. Names that differ only in
case from others, or from meaningful ones, are refused too: some JSON readers take `Name` for `name`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.strict_json import json_object

RESPONSE: Final = "response"
"""Stands for the method of a response to a request of the server. A response has no method."""
NAMED_BY: Final[Mapping[str, str]] = {
    "tools/call": "name", "prompts/get": "name",
    "resources/read": "uri", "resources/subscribe": "uri", "resources/unsubscribe": "uri",
}  # fmt: skip
"""By method: the member of `params` that names the tool, prompt or resource."""
CALL: Final = "tools/call"
_READ_METHODS: Final = frozenset({
    "initialize", "ping", "tools/list", "prompts/list", "prompts/get", "resources/list", "resources/templates/list",
    "resources/read", "completion/complete",
})  # fmt: skip
"""Methods that change nothing at the server, according to the protocol."""
_NOTIFIES: Final = "notifications/"
WITH_ARGUMENTS: Final = frozenset({"tools/call", "prompts/get"})
LISTED: Final[Mapping[str, tuple[str, str]]] = {
    "tools": ("tools/call", "name"), "prompts": ("prompts/get", "name"), "resources": ("resources/read", "uri"),
}  # fmt: skip
"""By member of a list result: the method that uses an entry, and the member that names the entry."""

_TOP: Final = frozenset({"jsonrpc", "id", "method", "params", "result", "error"})
_MEANT: Final = frozenset({"name", "uri", "arguments", "_meta"})
_MAX_NAME_CHARS: Final = 1024
_MAX_ID_CHARS: Final = 256
_MAX_ID: Final = 2**53 - 1


class McpMessageError(RingfenceError):
    """Raised when a body is not exactly one message that can be read unambiguously. The message says what is wrong."""

    def __init__(self, code: str, message: str, *, id: str | int | None = None) -> None:
        super().__init__(message, code=code)
        self.id = id
        """The id of the request, if that could be read."""


@dataclass(frozen=True, slots=True)
class McpMessage:
    """One message from a client to a server."""

    kind: Literal["request", "notification", "response"]
    method: str
    """The JSON-RPC method; `RESPONSE` for a response."""
    id: str | int | None = None
    name: str | None = None
    """The name of the tool or prompt, or the URI of the resource."""
    arguments: Mapping[str, Any] = field(default_factory=dict)

    @property
    def only_asks(self) -> bool:
        """Return whether the message changes nothing at any server. For a tool call that is unknown, so it is False."""
        return self.method in _READ_METHODS or self.method.startswith(_NOTIFIES)


def read_message(body: bytes) -> McpMessage:
    """Parse a body into one message. Raises McpMessageError."""
    if body.lstrip(b" \t\r\n")[:1] == b"[":
        raise McpMessageError("mcp_batch", "several messages at once are not taken: post each by itself")
    try:
        document = json_object(body)
    except ValueError as error:
        raise McpMessageError(
            "mcp_unreadable", f"the message is not one JSON object: {_without_quotation(error)}"
        ) from None
    if not document.keys() <= _TOP or document.get("jsonrpc") != "2.0":
        raise _invalid("it is not JSON-RPC 2.0, or has members that JSON-RPC does not know")
    id = document.get("id")
    if "id" in document and not _is_id(id):
        raise _invalid("its id is neither a text nor a whole number")
    if "method" not in document:
        return _response(document, id)
    if "result" in document or "error" in document:
        raise _invalid("it is a request and a response", id)
    method, params = document["method"], document.get("params", {})
    if not isinstance(method, str) or method == RESPONSE:
        raise _invalid("its method is none", id)
    if not isinstance(params, dict):
        raise _invalid("its params are no object", id)
    name, arguments = _name_and_arguments(method, params, id)
    kind: Literal["request", "notification"] = "request" if "id" in document else "notification"
    if (kind == "notification") != method.startswith("notifications/"):
        raise _invalid("a notification has no id and a method notifications/..., a request has an id", id)
    return McpMessage(kind, method, id, name, arguments)


def _response(given: Mapping[str, Any], id: str | int | None) -> McpMessage:
    if id is None or "params" in given or ("result" in given) == ("error" in given):
        raise _invalid("it is neither a request, nor a notification, nor a response")
    return McpMessage("response", RESPONSE, id)


def _name_and_arguments(
    method: str, params: Mapping[str, Any], id: str | int | None
) -> tuple[str | None, Mapping[str, Any]]:
    """Return what a request names, and its arguments. Raises McpMessageError."""
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
    """Return whether two of the names differ only in case."""
    listed = list(names)
    return len({name.casefold() for name in listed}) != len(listed)


def _is_id(id: Any) -> bool:
    if isinstance(id, str):
        return len(id) <= _MAX_ID_CHARS
    return isinstance(id, int) and not isinstance(id, bool) and abs(id) <= _MAX_ID


def _invalid(what: str, id: str | int | None = None) -> McpMessageError:
    return McpMessageError("mcp_invalid", f"the message is refused: {what}", id=id)


def _without_quotation(error: ValueError) -> str:
    """Return the error's text without what the parser quotes: that may be a secret."""
    quotable = ("nested too deeply", "no JSON object", "a name comes twice")
    return str(error) if str(error) in quotable else "it cannot be parsed"
