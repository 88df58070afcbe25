"""What tells this process from every other that uses the same key: random, and gone with the process."""

from __future__ import annotations

import os
import secrets

_process_id = secrets.token_urlsafe(12)


def process_id() -> str:
    """The mark of this process."""
    return _process_id


def _renew_process_id() -> None:
    global _process_id
    _process_id = secrets.token_urlsafe(12)


os.register_at_fork(after_in_child=_renew_process_id)
