"""Which key a message names, of those that were verified before: without taking it apart once more."""

from __future__ import annotations

from functools import lru_cache

import orjson

from ringfence.kernel.errors import InvalidMessageError
from ringfence.kernel.keys import b64decode

_MAX_REMEMBERED = 512
"""A longer header is not Ringfence's: it is read, and not kept."""


def kid_of(compact: str) -> str:
    """The `kid` in the header of a JWS that somebody verified. Raises InvalidMessageError where it has none."""
    head = compact.partition(".")[0]
    return _remembered(head) if len(head) <= _MAX_REMEMBERED else _kid(head)


def _kid(head: str) -> str:
    try:
        return str(orjson.loads(b64decode(head))["kid"])
    except (ValueError, TypeError, KeyError):
        raise InvalidMessageError("a JWS whose header names no key", code="not_a_jws") from None


_remembered = lru_cache(maxsize=4096)(_kid)
