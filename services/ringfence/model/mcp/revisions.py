"""Revisions of the Model Context Protocol: which one a message is of, and the methods that each one has. Pure.

Up to 2025-11-25 a connection begins with `initialize`, and requests name the negotiated revision in a header, at most.
From 2026-07-28 on each request names its revision in `params._meta`, and over HTTP in `MCP-Protocol-Version` too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from ringfence.model.mcp.messages import (
    CAPABILITIES_KEY,
    RESPONSE,
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
        raise McpMessageError("mcp_meta", f"{VERSION_KEY} in its _meta is no text", id=id)
    if in_meta and always_stated and stated != own:
        text = "MCP-Protocol-Version is missing, or names another revision than _meta does; send the same in both"
        raise McpMessageError("mcp_header", text, id=id)
    revision: str | None = own if in_meta else stated
    offered = message.params.get("protocolVersion") if message.method == "initialize" else None
    if offered is not None and stated is not None and offered != stated:
        text = (
            "MCP-Protocol-Version names another revision than initialize offers; leave the header out of it"
        )
        raise McpMessageError("mcp_header", text, id=id)
    if revision is None:
        _check_method(message, WITH_HANDSHAKE[-1])
    elif revision not in _METHODS:
        text = f"revision {revision[:32]} of MCP is not known here; these are: {', '.join(SUPPORTED)}"
        raise McpMessageError("mcp_version", text, id=id)
    else:
        _check_method(message, revision)
    if revision == STATELESS and message.kind == "request":
        _check_envelope(message)
    elif revision != STATELESS and (message.request_state is not None or message.input_responses is not None):
        text = f"the message is refused: requestState and inputResponses are of {STATELESS}, which it does not state"
        raise McpMessageError("mcp_invalid", text, id=id)
    return revision


def _check_method(message: McpMessage, revision: str) -> None:
    """Refuse methods of other revisions. A method that no revision has is left to the rules, which have to name it."""
    if message.method in _KNOWN and message.method not in _METHODS[revision]:
        text = f"revision {revision} of MCP has no {message.method}"
        raise McpMessageError("mcp_method", text, id=message.id)
    if revision == STATELESS and message.kind == "notification" and message.method not in _METHODS[revision]:
        text = f"a client of revision {revision} sends no {message.method}"
        raise McpMessageError("mcp_method", text, id=message.id)


def _check_envelope(message: McpMessage) -> None:
    if VERSION_KEY not in message.meta or not isinstance(message.meta.get(CAPABILITIES_KEY), dict):
        text = f"a request of {STATELESS} names {VERSION_KEY} and {CAPABILITIES_KEY} in params._meta"
        raise McpMessageError("mcp_meta", text, id=message.id)
    if message.method not in INPUT_REQUIRED and message.request_state is not None:
        raise McpMessageError(
            "mcp_invalid",
            f"the message is refused: {message.method} is never retried with a requestState",
            id=message.id,
        )
    if (
        message.method not in INPUT_REQUIRED
        and message.method != "tasks/update"
        and message.input_responses is not None
    ):
        raise McpMessageError(
            "mcp_invalid", f"the message is refused: {message.method} takes no inputResponses", id=message.id
        )
