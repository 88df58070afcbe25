"""Revisions of the Model Context Protocol, and the check of a request's `Mcp-...` headers against its message. Pure.

Up to 2025-11-25 a connection begins with `initialize`, and requests may name the negotiated revision in a header.
From 2026-07-28 on each request names its revision in `params._meta`, and over HTTP in `MCP-Protocol-Version` too.

A proxy may route by the `Mcp-...` headers (2026-07-28, SEP-2243), and a server act on them. So they must say what the
body says, and nothing besides.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ringfence.kernel.base.strict_json import case_folded
from ringfence.messages.codes import Code
from ringfence.model.mcp.messages import (
    CALL,
    CAPABILITIES_KEY,
    RESPONSE,
    TASK_METHODS,
    VERSION_KEY,
    McpMessage,
    McpMessageError,
)

STATELESS: Final = "2026-07-28"
"""The first revision without `initialize` and sessions."""
WITH_HANDSHAKE: Final = ("2025-03-26", "2025-06-18", "2025-11-25")
"""Revisions that begin with `initialize`. A server may negotiate down to 2025-03-26, which is read as 2025-06-18."""
SUPPORTED: Final = ("2025-06-18", "2025-11-25", STATELESS)
SELF_STATED: Final = (STATELESS,)
"""The revisions that requests state by themselves, without a handshake."""
INPUT_REQUIRED: Final = frozenset({"tools/call", "prompts/get", "resources/read"})
"""Methods whose result may be that more input is required (2026-07-28)."""
CACHEABLE: Final = frozenset({
    "server/discover", "tools/list", "prompts/list", "resources/list", "resources/templates/list", "resources/read",
})  # fmt: skip
"""Methods whose results say how long they may be cached (2026-07-28)."""

_COMMON: Final = frozenset({
    "tools/list", "tools/call", "prompts/list", "prompts/get", "resources/list", "resources/templates/list",
    "resources/read", "completion/complete", "notifications/cancelled",
})  # fmt: skip
_HANDSHAKE_METHODS: Final = _COMMON | {
    "initialize", "ping", "logging/setLevel", "resources/subscribe", "resources/unsubscribe",
    "notifications/initialized", "notifications/progress", "notifications/roots/list_changed", RESPONSE,
}  # fmt: skip
_METHODS: Final[Mapping[str, frozenset[str]]] = {
    "2025-03-26": _HANDSHAKE_METHODS,
    "2025-06-18": _HANDSHAKE_METHODS,
    "2025-11-25": _HANDSHAKE_METHODS
    | {"tasks/get", "tasks/result", "tasks/list", "tasks/cancel", "notifications/tasks/status"},
    STATELESS: _COMMON
    | {"server/discover", "subscriptions/listen", "tasks/get", "tasks/update", "tasks/cancel"},
}  # fmt: skip
_KNOWN: Final = frozenset[str]().union(*_METHODS.values())


def is_stateless(message: McpMessage) -> bool:
    """Return whether a message states a revision of its own, as from 2026-07-28 on."""
    return VERSION_KEY in message.meta


def is_known(method: str) -> bool:
    """Return whether some revision has a method."""
    return method in _KNOWN


def revision_of(message: McpMessage, stated: str | None, *, always_stated: bool = True) -> str | None:
    """Return the revision of a message; None if it states none, which only revisions with `initialize` allow.

    Args:
        message: the message.
        stated: `MCP-Protocol-Version` over HTTP; over stdio the revision that was negotiated, or None.
        always_stated: whether the transport repeats the revision of `_meta`, as HTTP does in its header.

    Raises McpMessageError: `mcp_header` if header and `_meta` contradict each other, `mcp_version` for a revision that
    is not known, `mcp_meta` if `_meta` lacks what its revision requires, `mcp_method` for a method that the revision
    does not have, and `mcp_invalid` for params that it does not have.
    """
    id, own = message.id, message.meta.get(VERSION_KEY)
    in_meta = VERSION_KEY in message.meta
    if in_meta and not isinstance(own, str):
        raise McpMessageError(Code.MCP_META, f"{VERSION_KEY} in its _meta is no text", id=id)
    if in_meta and always_stated and stated != own:
        text = "MCP-Protocol-Version is missing, or names another revision than _meta does; send the same in both"
        raise McpMessageError(Code.MCP_HEADER, text, id=id)
    revision: str | None = own if in_meta else stated
    offered = message.params.get("protocolVersion") if message.method == "initialize" else None
    if offered is not None and stated is not None and offered != stated:
        text = (
            "MCP-Protocol-Version names another revision than initialize offers; leave the header out of it"
        )
        raise McpMessageError(Code.MCP_HEADER, text, id=id)
    if revision is None:
        _check_method(message, WITH_HANDSHAKE[-1])
    elif revision not in _METHODS:
        text = f"revision {revision[:32]} of MCP is not known here; these are: {', '.join(SUPPORTED)}"
        raise McpMessageError(Code.MCP_VERSION, text, id=id)
    else:
        _check_method(message, revision)
    if revision == STATELESS and message.kind == "request":
        _check_envelope(message)
    elif revision != STATELESS and (message.request_state is not None or message.input_responses is not None):
        text = f"the message is refused: requestState and inputResponses are of {STATELESS}, which it does not state"
        raise McpMessageError(Code.MCP_INVALID, text, id=id)
    return revision


def _check_method(message: McpMessage, revision: str) -> None:
    """Refuse methods of other revisions. A method that no revision has is left to the rules, which have to name it."""
    if message.method in _KNOWN and message.method not in _METHODS[revision]:
        text = f"revision {revision} of MCP has no {message.method}"
        raise McpMessageError(Code.MCP_METHOD, text, id=message.id)
    if revision == STATELESS and message.kind == "notification" and message.method not in _METHODS[revision]:
        text = f"a client of revision {revision} sends no {message.method}"
        raise McpMessageError(Code.MCP_METHOD, text, id=message.id)


def _check_envelope(message: McpMessage) -> None:
    if VERSION_KEY not in message.meta or not isinstance(message.meta.get(CAPABILITIES_KEY), dict):
        text = f"a request of {STATELESS} names {VERSION_KEY} and {CAPABILITIES_KEY} in params._meta"
        raise McpMessageError(Code.MCP_META, text, id=message.id)
    if message.method not in INPUT_REQUIRED and message.request_state is not None:
        raise McpMessageError(
            Code.MCP_INVALID,
            f"the message is refused: {message.method} is never retried with a requestState",
            id=message.id,
        )
    if (
        message.method not in INPUT_REQUIRED
        and message.method != "tasks/update"
        and message.input_responses is not None
    ):
        raise McpMessageError(
            Code.MCP_INVALID,
            f"the message is refused: {message.method} takes no inputResponses",
            id=message.id,
        )


Declared = Mapping[str, tuple[str, ...]]
"""The `x-mcp-header` declarations of a tool: the path of an argument, by its header's name after `Mcp-Param-`."""

_PARAM: Final = "mcp-param-"
_MUST_NAME: Final = frozenset({"tools/call", "prompts/get", "resources/read"}) | TASK_METHODS
_BASE64: Final = re.compile(r"=\?base64\?(.*)\?=", re.DOTALL)
_DECIMAL: Final = re.compile(r"-?[0-9]{1,40}(\.0{1,40})?")
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_MAX_DECLARED: Final = 64


def check_headers(
    message: McpMessage,
    revision: str | None,
    fields: Sequence[tuple[str, str]],
    declared: Callable[[str], Declared | None],
) -> None:
    """Check the `Mcp-...` headers of a posted message, without session and protocol version.

    Args:
        message: the posted message.
        revision: as `revisions.revision_of` returns it.
        fields: names in lower case, and values, in order.
        declared: the declarations of a tool by its name; None if they are not known here.

    Raises McpMessageError with the code `mcp_header`.
    """
    stateless = revision == STATELESS
    seen: set[str] = set()
    for name, value in fields:
        if name in seen:
            raise _refused(f"the header {name} comes twice", message)
        seen.add(name)
        decoded = _decoded(value) if stateless else value
        if stateless and name.startswith(_PARAM) and message.method == CALL:
            _check_param(message, name.removeprefix(_PARAM), decoded, declared(message.name or ""))
        elif name == "mcp-method":
            _compare(message, name, value, message.method)
        elif name == "mcp-name" and message.method in _MUST_NAME:
            _compare(message, name, decoded, message.name)
        else:
            raise _refused(f"the header {name} is not known here", message)
    if stateless and message.kind == "request":
        needed = {"mcp-method"} | ({"mcp-name"} if message.method in _MUST_NAME - TASK_METHODS else set())
        if missing := needed - seen:
            raise _refused(f"a request of {STATELESS} needs the header {min(missing)}", message)


def declarations(input_schema: Any) -> Declared:
    """The `x-mcp-header` declarations of a tool's input schema: those on properties that only `properties` lead to."""
    found: dict[str, tuple[str, ...]] = {}
    stack: list[tuple[tuple[str, ...], Any]] = [((), input_schema)]
    while stack and len(found) < _MAX_DECLARED:
        path, schema = stack.pop()
        if not isinstance(schema, dict):
            continue
        token = schema.get("x-mcp-header")
        if path and isinstance(token, str) and _TOKEN.fullmatch(token):
            found[token.lower()] = path
        properties = schema.get("properties")
        if isinstance(properties, dict) and len(path) < 16:
            stack += (((*path, name), inner) for name, inner in properties.items())
    return found


def _check_param(message: McpMessage, token: str, value: str | None, declared: Declared | None) -> None:
    """Compare one `Mcp-Param-...` header with its argument.

    If the declarations are unknown, because the list of tools did not pass here, the argument is that of the same name.
    A header without an argument cannot be compared, and is refused.
    """
    path = declared.get(token) if declared is not None else None
    if path is None:
        same = (
            [name for name in message.arguments if _plain(name) == _plain(token)] if declared is None else []
        )
        if len(same) != 1:
            text = (
                f"the header {_PARAM}{token} cannot be compared with an argument: list the tools through this gateway "
                "first, or leave it out"
            )
            raise _refused(text, message)
        path = (same[0],)
    given: Any = message.arguments
    for name in path:
        given = given.get(name) if isinstance(given, Mapping) else None
    if value is None or not _is_same(given, value):
        raise _refused(
            f"the header {_PARAM}{token} says another thing than the argument {'.'.join(path)}", message
        )


def _is_same(given: Any, value: str) -> bool:
    if isinstance(given, bool):
        return value == ("true" if given else "false")
    if isinstance(given, int):
        return _DECIMAL.fullmatch(value) is not None and int(value.partition(".")[0]) == given
    return isinstance(given, str) and given == value


def _plain(name: str) -> str:
    return case_folded(name).replace("-", "").replace("_", "")


def _decoded(value: str) -> str | None:
    """The value of a header, which is base64 where it would not be plain ASCII; None if that is malformed."""
    match = _BASE64.fullmatch(value)
    if match is None:
        return value
    try:
        raw = base64.b64decode(match[1], validate=True)
        return raw.decode("utf-8") if base64.b64encode(raw).decode("ascii") == match[1] else None
    except (binascii.Error, ValueError):
        return None


def _compare(message: McpMessage, name: str, value: str | None, expected: str | None) -> None:
    if value is None or value != expected:
        raise _refused(f"the header {name} says another thing than the message does", message)


def _refused(text: str, message: McpMessage) -> McpMessageError:
    return McpMessageError(Code.MCP_HEADER, text, id=message.id)
