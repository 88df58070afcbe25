"""The `Mcp-...` headers of a request over HTTP, compared with its message (2026-07-28, SEP-2243). Pure.

A proxy may route by them, and a server act on them. So they must say what the body says, and nothing besides.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

from ringfence.kernel.base.strict_json import case_folded
from ringfence.model.mcp.messages import CALL, TASK_METHODS, McpMessage, McpMessageError
from ringfence.model.mcp.revisions import STATELESS

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
    return McpMessageError("mcp_header", text, id=message.id)
