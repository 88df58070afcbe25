"""Candidates of a completion, made safe for a shell.

Ids and descriptions come from records that agents and strangers wrote. A value is put on the command line of whoever
presses TAB, so a value is offered only if it is made of characters that mean nothing to any shell. A description is
shown and never put on the command line: it is one short line without control characters.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from ringfence.kernel.base.text import visible

MAX_DESCRIPTION: Final = 100
"""Characters of a description. A longer one is cut, and marked."""
MAX_CANDIDATES: Final = 500
"""More are no help at a prompt, and a terminal asks before it shows them."""
_SAFE_VALUE = re.compile(r"-{0,2}[A-Za-z0-9][A-Za-z0-9_:./-]{0,127}", re.ASCII)
_SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}", re.ASCII)
"""An id that is no option either: one that began with `-` would change what the command does."""

Kind = Literal["words", "files", "folders"]
"""The completion of a word: the candidates, or the shell's own completion of files or folders."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A word that may be put on the command line, and what it stands for."""

    value: str
    description: str = ""


@dataclass(frozen=True, slots=True)
class Completion:
    """The candidates for the last word, or that the shell completes files or folders there."""

    kind: Kind
    candidates: tuple[Candidate, ...] = ()


FILES: Final = Completion("files")
FOLDERS: Final = Completion("folders")
NOTHING: Final = Completion("words")


def safe(
    candidates: Iterable[Candidate], beginning: str = "", *, only_ids: bool = False
) -> tuple[Candidate, ...]:
    """Return the candidates that begin with `beginning` and mean nothing to a shell, with safe descriptions.

    Each value comes once, in the order given. `only_ids`: they come from records, so that options are no candidates.
    """
    pattern = _SAFE_ID if only_ids else _SAFE_VALUE
    found: dict[str, Candidate] = {}
    for one in candidates:
        if len(found) >= MAX_CANDIDATES:
            break
        if one.value.startswith(beginning) and pattern.fullmatch(one.value):
            found.setdefault(one.value, Candidate(one.value, one_line(one.description)))
    return tuple(found.values())


def one_line(text: str) -> str:
    """Return a description as one short line without characters that act on a terminal."""
    # Each invisible character becomes several visible ones, so it is cut twice: a long text costs no time.
    line = " ".join(visible(" ".join(text[: 4 * MAX_DESCRIPTION].split())).split())
    return line if len(line) <= MAX_DESCRIPTION else line[: MAX_DESCRIPTION - 3] + "..."
