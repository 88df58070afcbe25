"""What agents and strangers wrote, as a person may see it: nothing in it is invisible, or moves a cursor."""

from __future__ import annotations

import unicodedata

_HIDDEN_CATEGORIES = frozenset({"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"})


def visible(text: str) -> str:
    """Prose as it may be shown: what is invisible, or moves the cursor, stands as its code point."""
    return "".join(
        f"‹U+{ord(char):04X}›" if unicodedata.category(char) in _HIDDEN_CATEGORIES and char != "\n" else char
        for char in text
    ).replace("\n", " ")


def visible_name(text: str) -> str:
    """A name that is compared code point by code point: every sign beyond ASCII carries its code point."""
    return "".join(
        char if " " <= char <= "~"
        else f"{'' if unicodedata.category(char) in _HIDDEN_CATEGORIES else char}‹U+{ord(char):04X}›"
        for char in text
    )  # fmt: skip
