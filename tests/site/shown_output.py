"""The output that a page shows, compared with what the commands printed.

A page shows an excerpt: whole lines, in order, with none left out between them. In it,

- `…` and `...` stand for any text; alone on a line, for any number of lines;
- what differs each time, such as an id or a time, stands for any other of its kind (`KINDS`);
- any white space stands for any other, and so does the length of a rule: both follow the widths of columns.

White space counts for nothing in a block of JSON.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

KINDS: Final = {
    "beginning": r"[0-9a-f]{3,}(?:…|\.\.\.)",
    "id": r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}",
    "hash": r"\b[0-9a-f]{32,}\b",
    "thumbprint": r"(?<![\w-])[\w-]{43}(?![\w-])",
    "time": r"\d{4}-\d\d-\d\d(?:[T ]\d\d:\d\d(?::\d\d(?:\.\d+)?)?Z)?|\b\d\d:\d\d:\d\d\.\d{3}Z",
    "epoch": r"\b1[6-9]\d{8}\b",
    "left": r"\bin(?: \d+ (?:d|h|min|s)\b)+",
    "measured": r"\b\d+\.\d ms",
}
"""By name: the form of what differs each time."""
_STAND_FOR: Final = KINDS | {"beginning": r"[0-9a-f-]{3,}(?:…|\.\.\.)?"}
"""The beginning of an id also stands for the whole of one."""
_PARTS: Final = re.compile(
    "|".join(f"(?P<{name}>{form})" for name, form in KINDS.items())
    + r"|(?P<any>…|\.\.\.)|(?P<rule>(?P<drawn>[─━-])(?P=drawn){2,})|(?P<space>\s+)"
)
_ANY_LINES: Final = r"(?:.*\n)*?"


def differs(shown: str, printed: Iterable[str], *, json: bool = False) -> str | None:
    """Return the first line of `shown` with which it differs from each of `printed`, or None where one has all of it.

    Args:
        shown: the lines on the page.
        printed: the output of each command that may have printed them.
        json: whether the page shows JSON.
    """
    outputs = list(printed)
    if json:
        found = re.compile(_form("".join(shown.split())))
        return None if any(found.search("".join(one.split())) for one in outputs) else shown.splitlines()[0]
    lines = shown.strip("\n").splitlines()
    for count in range(1, len(lines) + 1):
        form = _lines_form(lines[:count])
        if not any(form.search(f"{one}\n") for one in outputs):
            return lines[count - 1]
    return None


def _lines_form(lines: list[str]) -> re.Pattern[str]:
    parts = [
        _ANY_LINES if line.strip() in ("…", "...") else rf"[^\S\n]*{_form(line.strip())}[^\S\n]*\n"
        for line in lines
    ]
    return re.compile("^" + "".join(parts), re.MULTILINE)


def _form(line: str) -> str:
    form, at = "", 0
    for part in _PARTS.finditer(line):
        form += re.escape(line[at : part.start()])
        at = part.end()
        match part.lastgroup:
            case "any":
                form += ".*"
            case "rule":
                form += f"{re.escape(part[0][0])}+"
            case "space":
                form += r"[^\S\n]+"
            case name:
                assert name is not None
                form += _STAND_FOR[name]
    return form + re.escape(line[at:])
