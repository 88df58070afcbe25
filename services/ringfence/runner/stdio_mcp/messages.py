"""The part of a JSON-RPC message that both bridges read: whose answer it is. The gateway interprets the rest. Pure."""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from ringfence.kernel.base.strict_json import json_object

VERSION: Final = "io.modelcontextprotocol/protocolVersion"
SUBSCRIPTION: Final = "io.modelcontextprotocol/subscriptionId"
INITIALIZE: Final = "initialize"
INITIALIZED: Final = "notifications/initialized"
CANCELLED: Final = "notifications/cancelled"
_PROGRESS: Final = "notifications/progress"
_NAMES: Final = ("name", "uri", "taskId")
_PLAIN: Final = re.compile(r"[!-~]([ -~]*[!-~])?")

Id = str | int


@dataclass(frozen=True, slots=True)
class Outline:
    """The outline of one message."""

    method: str | None
    """None for a response."""
    id: Id | None
    version: str | None
    """The revision that a request states in `_meta`, from 2026-07-28 on."""
    name: str | None
    """What a request names: its tool, prompt, resource or task."""
    progress_token: Id | None
    """Of a request: the token that its progress is told by. Of a progress notification: that token."""
    about: Id | None
    """The id of the request that a notification belongs to: a subscription's, or a cancelled one's."""
    negotiated: str | None = None
    """The revision in the result of `initialize`."""

    @property
    def is_request(self) -> bool:
        return self.method is not None and self.id is not None

    @property
    def is_response(self) -> bool:
        return self.method is None and self.id is not None


def outline_of(line: bytes) -> Outline:
    """Read a message. Raises ValueError if it is no JSON object."""
    document = json_object(line)
    method = document.get("method")
    params, result = _object(document.get("params")), _object(document.get("result"))
    meta = _object(params.get("_meta"))
    is_progress = method == _PROGRESS
    about = params.get("requestId") if method == CANCELLED else meta.get(SUBSCRIPTION)
    return Outline(
        method=method if isinstance(method, str) else None,
        id=_id(document.get("id")),
        version=_text(meta.get(VERSION)),
        name=next((text for name in _NAMES if (text := _text(params.get(name))) is not None), None),
        progress_token=_id(params.get("progressToken") if is_progress else meta.get("progressToken")),
        about=_id(about),
        negotiated=_text(result.get("protocolVersion")),
    )


def header_value(text: str) -> str:
    """A text as the value of `Mcp-Name`: as it is, or in base64 if it is not plain ASCII (2026-07-28, SEP-2243)."""
    if _PLAIN.fullmatch(text) and not text.startswith("=?"):
        return text
    return f"=?base64?{base64.b64encode(text.encode()).decode()}?="


def _object(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _id(value: Any) -> Id | None:
    return value if isinstance(value, str | int) and not isinstance(value, bool) else None
