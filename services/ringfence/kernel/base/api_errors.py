"""Errors of the HTTP APIs that several services answer with. The SDK has errors of its own."""

from __future__ import annotations

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code


class NotFoundError(RingfenceError):
    """Raised when an HTTP API has nothing with this id that the caller may see (status 404)."""

    code = Code.NOT_FOUND


class WrongQueryError(RingfenceError):
    """Raised when a query parameter of an HTTP API is malformed or out of range (status 400)."""

    code = Code.QUERY_INVALID


class CursorLostError(RingfenceError):
    """Raised when the index or table behind a cursor was rebuilt, or the cursor is another replica's: start the
    listing again.
    """

    code = Code.CURSOR_LOST
