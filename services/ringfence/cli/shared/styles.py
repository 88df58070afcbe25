"""What each colour means, and where colours are shown. The only place that names a colour.

Commands name a meaning (`warning`, `denied`); `STYLES` says how it looks. A colour never stands alone: the word is
always there too, so that everything can be read without colours, aloud, and in a log.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Mapping
from typing import Final, TextIO

STYLES: Final[Mapping[str, str]] = {
    "heading": "bold",
    "aside": "dim",
    "ok": "green",
    "warning": "yellow",
    "error": "red",
    "active": "green",
    "waiting": "yellow",
    "suspended": "yellow",
    "ended": "dim",
    "approved": "green",
    "denied": "red",
    "soon": "yellow",
    "late": "red",
    "step": "cyan",
    "decision": "cyan",
    "approval": "magenta",
}
"""How a meaning looks, as rich writes styles."""

_STATES: Final[Mapping[str, str]] = {
    "active": "active",
    "allowed": "approved",
    "approved": "approved",
    "live": "active",
    "ok": "ok",
    "minting": "waiting",
    "registered": "waiting",
    "pending": "waiting",
    "?": "warning",
    "suspended": "suspended",
    "ending": "suspended",
    "exhausted": "ended",
    "used": "ended",
    "decommissioned": "ended",
    "disabled": "ended",
    "ended": "ended",
    "expired": "ended",
    "over": "ended",
    "released": "ended",
    "removed": "ended",
    "withdrawn": "ended",
    "aborted": "ended",
    "revoked": "denied",
    "blocked": "denied",
    "denied": "denied",
    "refused": "denied",
    "failed": "error",
    "wrong": "error",
    "unusual": "warning",
}
"""The meaning of a cell by its first word."""
_SOON: Final = re.compile(r"in (\d+ s|1 min( \d+ s)?)")
"""Less than two minutes, as `output.span` writes it."""
_CODES: Final[Mapping[str, str]] = {
    "bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "magenta": "35", "cyan": "36",
}  # fmt: skip


def state(text: str) -> str:
    """Return the meaning of a state, by its first word; an empty text where it has none."""
    if "a key ends in" in text or "ends soon" in text:
        return "soon"
    word = re.match(r"\??[\w-]*", text)
    return _STATES.get(word[0].lower(), "") if word else ""


def ending(text: str) -> str:
    """Return the meaning of when something ends: `soon` for less than two minutes."""
    if text.startswith(("overdue", "due")):
        return "late"
    return "soon" if _SOON.fullmatch(text) else ""


def sponsor(text: str) -> str:
    """Return the meaning of who answers for an agent."""
    return "error" if "(orphan" in text else ""


def break_glass(text: str) -> str:
    """Return the meaning of a reason that may begin with `BREAK GLASS`."""
    return "error" if text.startswith("BREAK GLASS: ") else ""


def colours(stream: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Return whether a stream gets colours and other styles.

    `NO_COLOR` with any value switches them off (no-color.org). Otherwise `FORCE_COLOR` or `CLICOLOR_FORCE`, other than
    `0`, switches them on. Otherwise they need a terminal that is not dumb, and `CLICOLOR` other than `0`.
    """
    env = os.environ if environment is None else environment
    if env.get("NO_COLOR"):
        return False
    if any(env.get(name, "0") not in ("", "0") for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return True
    return env.get("CLICOLOR") != "0" and is_terminal(stream, env)


def follow_clicolor() -> None:
    """Tell libraries of `CLICOLOR=0` by `NO_COLOR`, the only one of the two that they know."""
    if os.environ.get("CLICOLOR") == "0" and not colours(sys.stdout):
        os.environ["NO_COLOR"] = "1"


def is_terminal(stream: TextIO, environment: Mapping[str, str] | None = None) -> bool:
    """Return whether a stream is a terminal on which a line can be drawn again."""
    env = os.environ if environment is None else environment
    return stream.isatty() and env.get("TERM", "") not in ("dumb", "unknown")


def painted(text: str, meaning: str, stream: TextIO) -> str:
    """Return a text with its style for a stream, for code that must not import rich. The text is safe already."""
    if not colours(stream):
        return text
    codes = ";".join(_CODES[word] for word in STYLES[meaning].split())
    return f"\x1b[{codes}m{text}\x1b[0m"
