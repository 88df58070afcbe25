"""Strict parser for untrusted JSON: accepts only what all readers understand alike (I-JSON, RFC 7493, 2.1 and 2.3)."""

from __future__ import annotations

import json
from typing import Any, Final

import orjson

MAX_EXACT: Final = 2**53 - 1
"""The largest whole number that all readers understand alike (RFC 7493, 2.2)."""


def json_object(body: bytes) -> dict[str, Any]:
    """Parse a JSON object in UTF-8, and return its members.

    Raises ValueError for any other value, for too deep nesting, for half a surrogate pair in a string, and for
    duplicate names. Of duplicates, one reader would take the first and another the last.
    """
    try:
        document = orjson.loads(body)  # the strict parser, which does not report duplicates
        json.loads(body.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(document, dict):
        raise ValueError("no JSON object")
    return document


def case_folded(text: str) -> str:
    """A text without case. Texts that any reader could call equal without case have the same one.

    Readers compare in upper or in lower case: Java takes a dotless i for I, and I with a dot for i.
    """
    return text.upper().casefold().replace("\u0307", "")


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An `object_pairs_hook` for `json` that refuses duplicate names with ValueError."""
    members = dict(pairs)
    if len(members) != len(pairs):
        raise ValueError("a name comes twice")
    return members
