"""Two oracles of what a glob stands for: names enumerated and matched by `re`, and an automaton over characters.

Neither shares an idea with the code under test, which compares segments by generic words.

Why enumeration to a certain length is enough. If a glob is not within a union, one of its *generic* names is
outside: `*` as one letter `x` that no glob contains, `**` as some segments `x`. So the alphabet needs one letter
more than the globs, and no `*` more than one character. `SHORT` globs have up to 4 characters. Without `**` their
generic names have up to 4 as well. With `**` there is room for one other segment of one character; and those
names of 3 segments or more that a `SHORT` glob accepts, it accepts by its `**`, whatever the number, because
without `**` it has at most 2 segments. So 3 segments of one character, 5 characters, suffice; `NAMES` go to 6.
Longer globs are left to the automaton, which needs no bound.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

from hypothesis import strategies as st

from ringfence.model.scope.globs import MAX_WILDCARDS, is_within, parse_glob

# Oracle 1: enumeration -------------------------------------------------------------------------------------


def legal(name: str) -> bool:
    return all(segment not in ("", ".", "..") for segment in name.split("/"))


def texts(alphabet: str, length: int) -> list[str]:
    return ["".join(t) for n in range(1, length + 1) for t in itertools.product(alphabet, repeat=n)]


NAMES = [name for name in texts("ab.x/", 6) if legal(name)]
EVERY_NAME = (1 << len(NAMES)) - 1


def pattern(glob: str) -> re.Pattern[str]:
    """The glob as a regular expression for a legal name that ends in `/`."""
    parts = []
    for segment in glob.split("/"):
        if segment == "**":
            parts.append("(?:[^/]+/)*")
        else:
            parts.append("[^/]*".join(re.escape(piece) for piece in segment.split("*")) + "/")
    return re.compile("".join(parts))


def names_of(glob: str) -> int:
    """The enumerated names of a glob, a bit each."""
    if glob not in _names:
        match = pattern(glob).fullmatch
        _names[glob] = sum(1 << n for n, name in enumerate(NAMES) if match(name + "/"))
    return _names[glob]


_names: dict[str, int] = {}


def union_of(globs: Iterable[str]) -> int:
    names = 0
    for glob in globs:
        names |= names_of(glob)
    return names


def well_formed(text: str) -> bool:
    """The grammar again, for the small alphabet of these tests."""
    stars = re.findall(r"\*+", text)
    return (
        legal(text)
        and all(segment == "**" or "**" not in segment for segment in text.split("/"))
        and "**/**" not in text
        and len(stars) <= MAX_WILDCARDS
    )


SHORT = [text for text in texts("ab./*", 4) if well_formed(text)]

# Oracle 2: an automaton over characters --------------------------------------------------------------------

Tokens = tuple[str, ...]


def tokens_of(glob: str) -> Tokens:
    found: list[str] = []
    for segment in glob.split("/"):
        found += ["**"] if segment == "**" else [*segment, "/"]
    return tuple(found)


def closed(tokens: Tokens, places: Iterable[tuple[int, bool]]) -> frozenset[tuple[int, bool]]:
    """Places in a glob, with those behind wildcards that may stand for nothing. True: inside a segment of `**`."""
    todo, found = list(places), set()
    while todo:
        place = todo.pop()
        found.add(place)
        at, inside = place
        if at < len(tokens) and tokens[at] in ("*", "**") and not inside:
            todo.append((at + 1, False))
    return frozenset(found)


def after(tokens: Tokens, places: frozenset[tuple[int, bool]], character: str) -> frozenset[tuple[int, bool]]:
    found: list[tuple[int, bool]] = []
    for at, inside in places:
        if at == len(tokens):
            continue
        if tokens[at] == "**":
            if character != "/":
                found.append((at, True))
            elif inside:
                found.append((at, False))
        elif tokens[at] == "*":
            if character != "/":
                found.append((at, False))
        elif tokens[at] == character:
            found.append((at + 1, False))
    return closed(tokens, found)


def separated(left: str, right: tuple[str, ...]) -> str | None:
    """A shortest legal name of `left` that none of `right` has, or None. Breadth first over sets of places."""
    globs = [tokens_of(glob) for glob in (left, *right)]
    alphabet = sorted(
        {character for glob in globs for character in glob if len(character) == 1} - {"*"} | {"x", "/"}
    )
    start = tuple(closed(glob, [(0, False)]) for glob in globs)
    todo = [(start, "", "")]
    seen = {(start, "")}
    for states, segment, name in todo:
        for character in alphabet:
            if character == "/" and segment in ("", ".", ".."):
                continue
            # Of a segment only matters whether it is empty, `.`, `..` or anything else.
            grown = "" if character == "/" else segment + character
            grown = grown if grown in ("", ".", "..") else "other"
            moved = tuple(after(glob, places, character) for glob, places in zip(globs, states, strict=True))
            if not moved[0]:
                continue
            if character == "/":
                ends = [(len(glob), False) in places for glob, places in zip(globs, moved, strict=True)]
                if ends[0] and not any(ends[1:]):
                    return name
            if (moved, grown) not in seen:
                seen.add((moved, grown))
                todo.append((moved, grown, name + character))
    return None


# Generated globs -------------------------------------------------------------------------------------------

E_NFC = "\u00e9"
E_NFD = "e\u0301"

segments = st.one_of(
    st.sampled_from(["a", "b", "*", "**", "a*", "*a", ".a", ".*", "*.", "...", E_NFC]),
    st.lists(st.sampled_from(["a", "b", "A", ".", "*", E_NFC]), min_size=1, max_size=5).map("".join),
)
globs = st.lists(segments, min_size=1, max_size=4).map("/".join).filter(well_formed)
short_globs = st.sampled_from(SHORT)
starry_globs = st.tuples(
    st.sampled_from(["", "a", "b"]),
    st.lists(st.sampled_from(["a", "b", "ab", "aa", "."]), max_size=3),
    st.sampled_from(["", "a", "b"]),
).map(lambda parts: "*".join([parts[0], *parts[1], parts[2]]))


def within(left: str, *right: str) -> bool:
    return is_within(parse_glob(left), tuple(parse_glob(text) for text in right))
