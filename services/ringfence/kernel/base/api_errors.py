"""Errors of the HTTP APIs that several services answer with. The SDK has errors of its own."""

from __future__ import annotations

from ringfence.kernel.base.errors import RingfenceError


class NotFoundError(RingfenceError):
    """Raised when an HTTP API has nothing with this id that the caller may see (status 404)."""

    code = "not_found"


class WrongQueryError(RingfenceError):
    """Raised when a query parameter of an HTTP API is malformed or out of range (status 400)."""

    code = "query_invalid"


class CursorLostError(RingfenceError):
    """Raised when the index or table behind a cursor was rebuilt, or the cursor is another replica's: start the
    listing again.
    """

    code = "cursor_lost"
