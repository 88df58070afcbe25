"""Rewrites the indents of lists as Python-Markdown reads them.

Pages are written as GitHub shows them: what belongs to a list item starts where the item's text starts, and a list may
follow a paragraph without an empty line. Python-Markdown wants four spaces for each level, and the empty line.
"""

from __future__ import annotations

import re

_ITEM = re.compile(r"( *)([-*+]|\d+[.)])( +)(?=\S)")
_FENCE = re.compile(r" *(```+|~~~+)")
_LEVEL = 4


def widened(text: str) -> str:
    """The Markdown of a page with four spaces for each level of a list."""
    lines: list[str] = []
    starts: list[int] = []  # of each open item: the column of its text
    fence = ""
    loose = False  # the last item has an empty line in it
    for line in text.splitlines():
        indent = len(line) - len(line.lstrip())
        if fence:
            lines.append(_moved(line, starts))
            if line.strip() == fence:
                fence = ""
            continue
        if not line.strip():
            lines.append("")
            loose = True
            continue
        item = _ITEM.match(line)
        after_blank = not lines or not lines[-1]
        if item or after_blank or not starts:
            while starts and indent < starts[-1]:
                starts.pop()
        if opened := _FENCE.match(line):
            while starts and indent < starts[-1]:
                starts.pop()
            fence = opened[1]
        if item:
            if lines and lines[-1] and (loose if starts or _in_list(lines) else True):
                lines.append("")
            loose = False
            depth = len(starts)
            starts.append(item.end())
            lines.append(" " * _LEVEL * depth + item[2] + " " + line[item.end() :])
        else:
            lines.append(_moved(line, starts))
    return "\n".join(lines) + "\n"


def _moved(line: str, starts: list[int]) -> str:
    """A line of the innermost open item, or of the page."""
    if not starts or not line.strip():
        return line
    indent = len(line) - len(line.lstrip())
    return " " * (_LEVEL * len(starts) + max(0, indent - starts[-1])) + line.lstrip()


def _in_list(lines: list[str]) -> bool:
    """The paragraph that the last line belongs to is part of a list."""
    for line in reversed(lines):
        if not line:
            return False
        if line.startswith(" ") or _ITEM.match(line):
            return True
    return False
