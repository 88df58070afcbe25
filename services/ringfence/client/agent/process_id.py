"""What tells this process from every other that uses the same key: random, and gone with the process."""

from __future__ import annotations

import os
import secrets

_mark = secrets.token_urlsafe(12)


def process_mark() -> str:
    """The mark of this process."""
    return _mark


def _another() -> None:
    global _mark
    _mark = secrets.token_urlsafe(12)


os.register_at_fork(after_in_child=_another)
