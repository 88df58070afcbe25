"""What was said before the command: who is calling, and how to print."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ringfence.kernel.base.errors import RingfenceError


class WrongUseError(RingfenceError):
    """A command line that cannot be carried out as it stands, which shows only after the options were read: exit 2."""

    code = "wrong_use"


@dataclass(slots=True)
class GlobalOptions:
    identity: Path | None = None
    json: bool = False


_said = GlobalOptions()


def remember(identity: Path | None, as_json: bool) -> None:
    """Keep the options that stood before the command."""
    _said.identity, _said.json = identity, as_json


def identity(of_command: Path | None) -> Path | None:
    """The key file that was named, after the command or before it."""
    return of_command or _said.identity


def wants_json(of_command: bool) -> bool:
    """Whether JSON was asked for, after the command or before it."""
    return of_command or _said.json
