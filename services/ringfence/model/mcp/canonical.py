"""The canonical form of a request, for approvals and states: what it does, without what changes from try to try. Pure.

Left out: the id, `_meta` and `requestState`. So a retry with others has the same form, and the same digest. What is
forwarded after an approval is built from that form, so that nothing goes along that nobody approved.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any, Final

import orjson

from ringfence.kernel.base.strict_json import MAX_EXACT
from ringfence.messages.codes import Code
from ringfence.model.mcp.messages import CAPABILITIES_KEY, VERSION_KEY, McpMessage, McpMessageError

_LOG_LEVEL_KEY: Final = "io.modelcontextprotocol/logLevel"
_LEVELS: Final = frozenset({"debug", "info", "notice", "warning", "error", "critical", "alert", "emergency"})
_TASKS: Final = "io.modelcontextprotocol/tasks"
_NOT_OF_THE_FORM: Final = frozenset({"_meta", "requestState"})


def canonical_form(message: McpMessage, *, without: frozenset[str] = frozenset()) -> bytes:
    """Method and params as JSON with sorted names, without spaces, in UTF-8. `without`: more params to leave out.

    Raises McpMessageError if a number cannot be told for certain: readers understand large ones differently (RFC 8259,
    6).
    """
    params = {
        name: value
        for name, value in message.params.items()
        if name not in _NOT_OF_THE_FORM and name not in without
    }
    if not _is_exact(params):
        text = "a number in it is larger than all readers can tell exactly: send it as a text"
        raise McpMessageError(Code.MCP_INVALID, f"the message is refused: {text}", id=message.id)
    return orjson.dumps({"method": message.method, "params": params}, option=orjson.OPT_SORT_KEYS)


def call_digest(message: McpMessage) -> str:
    """SHA-256, in hexadecimal, of the form without `inputResponses`: the call that a server's state belongs to.

    Raises McpMessageError.
    """
    return hashlib.sha256(canonical_form(message, without=frozenset({"inputResponses"}))).hexdigest()


def digest(message: McpMessage) -> str:
    """SHA-256, in hexadecimal, of the canonical form. Raises McpMessageError."""
    return hashlib.sha256(canonical_form(message)).hexdigest()


def rebuilt(message: McpMessage, state: str | None) -> bytes:
    """The request as it is forwarded after an approval, with the server's own `state`, if it has one.

    Of `_meta` only what the protocol itself needs is kept, in its known values.
    """
    params = {name: value for name, value in message.params.items() if name not in _NOT_OF_THE_FORM}
    return _request(message, params, state, _protocol_meta(message.meta))


def with_state(message: McpMessage, state: str | None) -> bytes:
    """The request as it was sent, with the server's own `state` in place of the sealed one. Raises McpMessageError."""
    canonical_form(message)  # numbers have to be exact, since the request is written anew
    params = {name: value for name, value in message.params.items() if name not in _NOT_OF_THE_FORM}
    return _request(message, params, state, message.meta)


def _request(
    message: McpMessage, params: Mapping[str, Any], state: str | None, meta: Mapping[str, Any]
) -> bytes:
    said = dict(params)
    if state is not None:
        said["requestState"] = state
    if meta:
        said["_meta"] = meta
    document: dict[str, Any] = {"jsonrpc": "2.0"}
    if message.kind == "request":
        document["id"] = message.id
    return orjson.dumps({**document, "method": message.method, "params": said})


def _protocol_meta(meta: Mapping[str, Any]) -> dict[str, Any]:
    kept: dict[str, Any] = {}
    if VERSION_KEY in meta:
        kept[VERSION_KEY] = meta[VERSION_KEY]
        kept[CAPABILITIES_KEY] = _known_capabilities(meta.get(CAPABILITIES_KEY))
    token = meta.get("progressToken")
    if (isinstance(token, str) and len(token) <= 256) or type(token) is int:
        kept["progressToken"] = token
    level = meta.get(_LOG_LEVEL_KEY)
    if isinstance(level, str) and level in _LEVELS:
        kept[_LOG_LEVEL_KEY] = level
    return kept


def _known_capabilities(declared: Any) -> dict[str, Any]:
    """Capabilities of a client, without all that is not the protocol's own."""
    found: dict[str, Any] = {}
    if not isinstance(declared, dict):
        return found
    for name, inner in (("elicitation", ("form", "url")), ("sampling", ("tools", "context")), ("roots", ())):
        if isinstance(declared.get(name), dict):
            found[name] = {member: {} for member in inner if isinstance(declared[name].get(member), dict)}
    extensions = declared.get("extensions")
    if isinstance(extensions, dict) and isinstance(extensions.get(_TASKS), dict):
        found["extensions"] = {_TASKS: {}}
    return found


def _is_exact(value: Any) -> bool:
    """Whether all numbers in a value are ones that every reader of JSON can tell exactly."""
    if isinstance(value, dict):
        return all(map(_is_exact, value.values()))
    if isinstance(value, list):
        return all(map(_is_exact, value))
    return not isinstance(value, int | float) or isinstance(value, bool) or abs(value) <= MAX_EXACT
