"""Secret references: `env:NAME` or `file:PATH`. The secret is read when needed, never from Kafka, and never kept."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Annotated

from pydantic import Field

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import others_can_access

SecretRef = Annotated[str, Field(pattern=r"^(env|file):.+$")]


class PlaceError(RingfenceError):
    """Raised when a secret is not where its reference says, or when others can read it. Never quotes it."""

    code = "secret_missing"


def read_secret(place: str, what: str) -> str:
    """Return the secret at a reference, without surrounding blanks. `what` names it in errors. Raises PlaceError."""
    kind, _, location = place.partition(":")
    if kind == "file":
        return _file(Path(location), what)
    return read_variable(location, what)


def read_variable(name: str, what: str) -> str:
    """Return the same for `env:NAME`. Raises PlaceError."""
    value = os.environ.get(name, "").strip()
    if not value:
        raise PlaceError(f"{name} is not set, where {what} should be")
    return value


def _file(path: Path, what: str) -> str:
    try:
        status = path.stat()
        value = path.read_text().strip()
    except (OSError, ValueError):
        raise PlaceError(f"cannot read {path}, where {what} should be") from None
    if others_can_access(status):
        mode = stat.S_IMODE(status.st_mode)
        raise PlaceError(f"{path} can be read by others (mode {mode:o}); run: chmod 600 {path}")
    if not value:
        raise PlaceError(f"{path} is empty, where {what} should be")
    return value
