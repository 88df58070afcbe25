"""Global options, given before the command: the caller's identity, and the output format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code


class WrongUseError(RingfenceError):
    """Raised when a command line cannot be executed, which shows only after the options were parsed: exit 2."""

    code = Code.WRONG_USE


@dataclass(slots=True)
class GlobalOptions:
    identity: Path | None = None
    json: bool = False


_said = GlobalOptions()


def remember(identity: Path | None, as_json: bool) -> None:
    """Store the options given before the command."""
    _said.identity, _said.json = identity, as_json


def identity(of_command: Path | None) -> Path | None:
    """Return the key file named after the command or before it."""
    return of_command or _said.identity


def wants_json(of_command: bool) -> bool:
    return of_command or _said.json
