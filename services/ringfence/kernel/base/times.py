"""Moments as UTC dates and as text. Both functions are total: records and tokens of others may hold any number.

Nothing else converts a moment to a date (`tests/contract/test_times.py`).
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Final

LAST_MOMENT_S: Final = 253_402_300_799
"""The last second of the year 9999, in seconds since 1970: the last that `datetime` knows."""
END_OF_TIME: Final = "the end of time"
TO_THE_SECOND: Final = "%Y-%m-%d %H:%M:%SZ"


def utc_datetime(seconds: float) -> datetime:
    """A moment in seconds since 1970 as a date.

    A moment beyond the year 9999 is its last second. One before the year 1, and no number, is 1970.
    """
    try:
        return datetime.fromtimestamp(seconds, UTC)
    except (ValueError, OverflowError, OSError):
        return datetime.fromtimestamp(LAST_MOMENT_S if seconds > 0 else 0, UTC)


def utc_text(seconds: float, form: str = TO_THE_SECOND) -> str:
    """A moment in seconds since 1970 as text; `END_OF_TIME` for one beyond the year 9999. `form`: as of `strftime`."""
    return END_OF_TIME if seconds > LAST_MOMENT_S else utc_datetime(seconds).strftime(form)
