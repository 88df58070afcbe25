"""The limits that readers reached in the file that this process reads. Each becomes a note of that file."""

from __future__ import annotations

_reached: dict[str, None] = {}


def limit_reached(reason: str) -> None:
    """Note that something of the file was not read. The reason quotes nothing of the file."""
    _reached[reason] = None


def taken_limits() -> tuple[str, ...]:
    """Return the reasons since the last call, each once."""
    reasons = tuple(_reached)
    _reached.clear()
    return reasons
