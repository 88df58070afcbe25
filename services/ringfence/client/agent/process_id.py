"""A random id of this process, which tells processes with the same key apart. A forked child gets its own."""

from __future__ import annotations

import os
import secrets

_process_id = secrets.token_urlsafe(12)


def process_id() -> str:
    """The id of this process."""
    return _process_id


def _renew_process_id() -> None:
    global _process_id
    _process_id = secrets.token_urlsafe(12)


os.register_at_fork(after_in_child=_renew_process_id)
