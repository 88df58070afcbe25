"""Safe display of untrusted text, and helpers for sentences with words filled in.

Text of agents and strangers may contain invisible characters or characters that move the cursor. These functions
replace them by their code points. Every `str` is taken for foreign. Only `Lines`, which Ringfence makes, has several
lines.
"""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Callable, Iterable
from typing import Final, Self

_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Me"})
_HIDDEN = frozenset(
    map(chr, (0x34F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x180B, 0x180C, 0x180D, 0x180F, 0x2800, 0x3164, 0xFFA0))
) | frozenset(map(chr, (*range(0xFE00, 0xFE10), *range(0xE0100, 0xE01F0))))
"""Letters and marks that are drawn as nothing: Unicode's `Default_Ignorable_Code_Point`, and the blank Braille pattern.
"""


_MOST_KNOWN: Final = 4096


class Lines(str):
    """Text of several lines, of which Ringfence makes each, so that foreign text within a line begins none.

    What is made of it by `+` or in an f-string is a plain `str` again, and so foreign.
    """

    __slots__ = ()

    def __new__(cls, lines: Iterable[str]) -> Self:
        """Join the lines, each shown by `visible`."""
        return super().__new__(cls, "\n".join(map(visible, lines)))


def visible(text: str) -> str:
    """Untrusted text on one line: invisible characters, also line feeds, become `‹U+XXXX›`."""
    return text.translate(_VISIBLE)


def shown(text: str) -> str:
    """Text as people may see it: `Lines` as they are, all else by `visible`."""
    return text if isinstance(text, Lines) else visible(text)


def visible_lines(text: str) -> str:
    """As `visible`, but line feeds stay: for text whose lines are indented or framed, such as a traceback."""
    return Lines(text.split("\n"))


def visible_name(text: str) -> str:
    """A name that is compared by code points: every character beyond ASCII is shown with its code point."""
    return text.translate(_BY_CODE_POINT)


def visible_resource(text: str) -> str:
    """As `visible_name`, in quotes where the text could pass for words beside it: agents choose resources.

    A resource may have spaces, commas and quotes. It has no backslash (`model.scope.globs`).
    """
    shown = visible_name(text)
    return '"' + shown.replace('"', '\\"') + '"' if set(' ,"') & set(text) else shown


def with_article(word: str) -> str:
    """An English word with its article: `an agent`, `a user`, `an OPTIONS`."""
    return f"an {word}" if word[:1].lower() in set("aeio") else f"a {word}"


def span(seconds: float) -> str:
    """Return a duration in words: `45 s`, `4 min 10 s`, `3 h 5 min`, `2 d 4 h`."""
    remaining_s = int(abs(seconds))
    parts = []
    for unit, size in (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1)):
        count, remaining_s = divmod(remaining_s, size)
        if count:
            parts.append(f"{count} {unit}")
    return " ".join(parts[:2]) or "0 s"


def nearest_name(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str | None:
    """The name in `known` whose spelling is closest to `name`, without regard to case; None if none is close.

    `cutoff` is the least similarity, from 0 to 1. The metric favours names with a common beginning.
    """
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=1, cutoff=cutoff)
    if near:
        return near[0]
    by_lower = {one.lower(): one for one in names}
    near = difflib.get_close_matches(name.lower(), by_lower, n=1, cutoff=cutoff)
    return by_lower[near[0]] if near else None


def did_you_mean(name: str, known: Iterable[str], *, cutoff: float = 0.6) -> str:
    """`; did you mean NAME?` for the closest known name, or an empty string. See `nearest_name`."""
    near = nearest_name(name, known, cutoff=cutoff)
    return f"; did you mean {near}?" if near else ""


class _Marks(dict[int, str]):
    """A table for `str.translate`: what is shown for a code point. It looks up each character once, not each time."""

    def __init__(self, mark: Callable[[str], str]) -> None:
        super().__init__()
        self._mark = mark

    def __missing__(self, code: int) -> str:
        if len(self) >= _MOST_KNOWN:  # text of strangers fills it
            self.clear()
        shown = self[code] = self._mark(chr(code))
        return shown


def _is_hidden(char: str) -> bool:
    return unicodedata.category(char) in _HIDDEN_CATEGORIES or char in _HIDDEN


def _code_point(char: str) -> str:
    return f"‹U+{ord(char):04X}›"


def _by_code_point(char: str) -> str:
    return char if " " <= char <= "~" else ("" if _is_hidden(char) else char) + _code_point(char)


_VISIBLE: Final = _Marks(lambda char: _code_point(char) if _is_hidden(char) else char)
_BY_CODE_POINT: Final = _Marks(_by_code_point)
