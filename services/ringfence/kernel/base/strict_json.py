"""JSON of others that can be read in one way only (I-JSON, RFC 7493, 2.1 and 2.3)."""

from __future__ import annotations

import json
from typing import Any

import orjson


def json_object(body: bytes) -> dict[str, Any]:
    """The members of a JSON object in UTF-8.

    Raises ValueError where it is anything else, is nested too deeply, has half of a surrogate pair in a text, or a name
    twice in an object: one reader would take the first, another the last.
    """
    try:
        found = orjson.loads(body)  # the strict one, which does not say what comes twice
        json.loads(body.decode("utf-8"), object_pairs_hook=once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(found, dict):
        raise ValueError("no JSON object")
    return found


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """For `object_pairs_hook` of `json`: raises ValueError where a name comes twice in an object."""
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name comes twice")
    return found
