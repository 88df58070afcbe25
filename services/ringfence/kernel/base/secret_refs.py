"""Where a secret stands, as `env:NAME` or `file:PATH`, and how it is read: never from Kafka, never kept."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ringfence.kernel.base.errors import RingfenceError

SecretRef = Annotated[str, Field(pattern=r"^(env|file):.+$")]
"""`env:NAME` or `file:PATH`."""


class PlaceError(RingfenceError):
    """A secret is not where it is said to be, or others can read it. Never quotes it."""

    code = "secret_missing"


def read_secret(place: str, what: str) -> str:
    """What stands at a place, without blanks around it; `what` names it in errors. Raises PlaceError."""
    kind, _, where = place.partition(":")
    if kind == "file":
        return _file(Path(where), what)
    return read_variable(where, what)


def read_variable(name: str, what: str) -> str:
    """The same for `env:NAME`."""
    value = os.environ.get(name, "").strip()
    if not value:
        raise PlaceError(f"{name} is not set, where {what} should be")
    return value


def _file(path: Path, what: str) -> str:
    try:
        mode = path.stat().st_mode & 0o777
        value = path.read_text().strip()
    except (OSError, ValueError):
        raise PlaceError(f"cannot read {path}, where {what} should be") from None
    if mode & 0o077:
        raise PlaceError(f"{path} can be read by others (mode {mode:o}); run: chmod 600 {path}")
    if not value:
        raise PlaceError(f"{path} is empty, where {what} should be")
    return value
