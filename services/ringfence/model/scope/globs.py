"""The grammar of resource globs, and exact comparison of one glob with others.

A *name* is the name of one resource at a target: segments separated by `/`, for example
`env/staging/deploy`. A *glob* stands for a set of names:

    *     any run of characters inside one segment, also an empty one
    **    only as a whole segment: any number of whole segments, also none, so `a/**` contains `a`
    else  itself, code point by code point; case matters

Text outside this grammar is refused, never repaired, and accepted text is its own canonical form: the
characters that a human signed are the characters that are compared. A name is a glob without wildcards, so
both have one grammar. Refused are:

- an empty text, a leading, trailing or double `/`, and the segments `.` and `..`. No such names exist, so no
  wildcard stands for them either: `*` is every segment except `.` and `..`;
- `***`, `**` as a part of a segment, and `**/**` (it is `**`);
- `%` (names are compared decoded: a percent sign means that somebody did not decode), `\\`, `?`, `[`, `]`,
  `{`, `}` (wildcards or escapes in other glob dialects), `#` and `;` (they end a path, or a segment of one,
  for readers of URLs);
- text that is not in Unicode NFC, or that NFKC would change: fullwidth, ligature and superscript forms,
  `U+2024 ONE DOT LEADER` and the like are a second spelling of something else;
- signs that look like `/`, `*`, `.` or a refused one without being it (`U+2215 DIVISION SLASH`), and
  characters that are invisible: control, format, surrogate, private-use, unassigned, default-ignorable, and
  any white space except U+0020, which in turn may not begin or end a segment;
- a combining mark at the start of a segment or after a wildcard, where it would join what it does not belong
  to;
- more than 512 characters or 8 wildcards.

Letters of other scripts that resemble Latin ones (Cyrillic `а`) are letters and are accepted. They never
compare equal; whoever shows a scope to a human has to make them visible.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.codes import Code

MAX_GLOB_CHARS: Final = 512
MAX_WILDCARDS: Final = 8
STEP_LIMIT: Final = 4096
"""The most states that one inclusion check visits. Beyond that the result is False, which denies."""

_REFUSED: Final = {
    "%": "names are compared decoded: decode it",
    "\\": "separate segments with '/'",
    "?": "'*' is the only wildcard inside a segment",
    "[": "'*' is the only wildcard inside a segment",
    "]": "'*' is the only wildcard inside a segment",
    "{": "write one glob for each alternative",
    "}": "write one glob for each alternative",
    "#": "readers of URLs cut a name there: use another name",
    ";": "readers of URLs cut a segment there: use another name",
}
_PLAIN: Final = re.compile(r"[ -~]*")
_REFUSED_ASCII: Final = re.compile(r"[%\\?\[\]{}#;]")

# Signs, not letters, that a human would read as a sign of the grammar and that NFKC leaves alone (compare the
# confusables of UTS 39). The list serves the reader only: comparison is by code point and needs no such help.
_LOOKALIKES: Final = frozenset(
    "\u1735\u2041\u2044\u2215\u2571\u27cb\u29f8\u2cc6"  # /
    "\u066d\u204e\u2217\u2731\U0001031f"  # *
    "\u06d4\u0701\u0702\ua4f8\ua60e\U00010a50"  # .
    "\u2216\u2572\u27cd\u29f5\u29f9"  # \
    "\u0609\u060a\u066a\u2030\u2031\u2052"  # %
    "\u037e\u061b\u204f\u266f"  # ; and #
)
# Invisible although their category says letter, mark or symbol: Default_Ignorable_Code_Point of UAX 44, and
# the empty Braille pattern, U+2800.
_INVISIBLE: Final = frozenset(
    [
        *(0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2800, 0x3164, 0xFFA0),
        *range(0x180B, 0x1810),
        *range(0xFE00, 0xFE10),
        *range(0xE0100, 0xE01F0),
    ]
)
_REFUSED_CATEGORIES: Final = frozenset(["Cc", "Cf", "Cs", "Co", "Cn", "Zs", "Zl", "Zp"])


class ScopeError(RingfenceError):
    """A glob, verb, target id or scope is outside the grammar. The message says where, and what to write instead."""

    code = Code.SCOPE_INVALID


@dataclass(frozen=True, slots=True)
class Glob:
    """A resource glob within the grammar. Creating one from any other text raises `ScopeError`."""

    text: str
    segments: tuple[str, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "segments", _segments(self.text))

    def __str__(self) -> str:
        return self.text

    @property
    def is_name(self) -> bool:
        """Whether it has no wildcard, and so matches only itself."""
        return "*" not in self.text

    def reaches(self, depth: int) -> bool:
        """Whether it can match a name with `depth` segments."""
        loops = self.segments.count("**")
        fixed = len(self.segments) - loops
        return depth == fixed if not loops else depth >= fixed

    def matches(self, name: str) -> bool:
        """Whether the glob matches `name`. A text that is not a valid name never matches."""
        try:
            return is_within(parse_name(name), (self,))
        except ScopeError:
            return False


@lru_cache(maxsize=4096)
def parse_glob(text: str) -> Glob:
    """Parse a glob. Raises `ScopeError` if the text is outside the grammar."""
    return Glob(text)


@lru_cache(maxsize=16384)
def is_glob(text: str) -> bool:
    """Whether the text is within the grammar."""
    try:
        parse_glob(text)
    except ScopeError:
        return False
    return True


def parse_name(text: str) -> Glob:
    """Parse the name of one resource. Raises `ScopeError` as `parse_glob` does, and for wildcards."""
    glob = parse_glob(text)
    if not glob.is_name:
        raise ScopeError(
            f"{quoted(text)} has a wildcard where one name is needed: write the resource's full name"
        )
    return glob


def _segments(text: str) -> tuple[str, ...]:
    if not text:
        raise ScopeError("a resource is empty: write a name, or '**' for every resource of the target")
    if len(text) > MAX_GLOB_CHARS:
        raise ScopeError(
            f"{quoted(text)} is {len(text)} characters long: write at most {MAX_GLOB_CHARS}, or a wildcard"
        )
    _check_characters(text)
    segments = tuple(text.split("/"))
    before = ""
    for segment in segments:
        _check_segment(text, segment)
        if segment == before == "**":
            raise ScopeError(f"{quoted(text)} has '**/**': write '**', which is the same")
        before = segment
    wildcards = text.count("*") - text.count("**")
    if wildcards > MAX_WILDCARDS:
        raise ScopeError(f"{quoted(text)} has {wildcards} wildcards: write at most {MAX_WILDCARDS}")
    return segments


def _check_segment(text: str, segment: str) -> None:
    if not segment:
        raise ScopeError(f"{quoted(text)} has an empty segment: remove the leading, trailing or double '/'")
    if segment in (".", ".."):
        raise ScopeError(f"{quoted(text)} has the segment {segment!r}: write the name that it leads to")
    if "**" in segment and segment != "**":
        raise ScopeError(
            f"{quoted(text)} has '**' in the segment {quoted(segment)}: '**' must be a whole segment"
        )
    if segment[0] == " " or segment[-1] == " ":
        raise ScopeError(f"{quoted(text)} has a space at the start or end of a segment: remove it")


def _check_characters(text: str) -> None:
    if found := _REFUSED_ASCII.search(text):
        raise ScopeError(f"{quoted(text)} has {found[0]!r}: {_REFUSED[found[0]]}")
    if _PLAIN.fullmatch(text):
        return
    for character in text:
        code = ord(character)
        if character == " " or (code < 0x7F and code > 0x20):
            continue
        if unicodedata.category(character) in _REFUSED_CATEGORIES or code in _INVISIBLE:
            raise ScopeError(
                f"{quoted(text)} has the invisible or unassigned character U+{code:04X}: remove it"
            )
        if character in _LOOKALIKES:
            raise ScopeError(
                f"{quoted(text)} has U+{code:04X}, which only looks like a sign of the grammar: replace it"
            )
    if not unicodedata.is_normalized("NFC", text):
        raise ScopeError(f"{quoted(text)} is not in Unicode NFC: normalise it before it is signed")
    if not unicodedata.is_normalized("NFKC", text):
        raise ScopeError(
            f"{quoted(text)} has a Unicode compatibility form: write {quoted(_nfkc(text))} if that is meant"
        )
    before = "/"
    for character in text:
        if before in "/*" and unicodedata.category(character)[0] == "M":
            raise ScopeError(
                f"{quoted(text)} has the combining mark U+{ord(character):04X} after no letter: remove it"
            )
        before = character


def _nfkc(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


def quoted(text: str) -> str:
    """`text` in ASCII and shortened, for messages: it must not hide or reorder anything in a terminal or a log."""
    return ascii(text if len(text) <= 80 else text[:77] + "...")


# Inclusion --------------------------------------------------------------------------------------------------
#
# Is every name of the glob P a name of one of the globs Q1..Qn? Let x be a character that no Q and no P
# contains, and call a word of P *generic* if each `*` in it was replaced by one x and each `**` by some
# number of segments `x`.
#
#   P is within the union of the Qi  <=>  every generic word of P is.
#
# "=>" holds because generic words are names of P (x makes no segment empty, `.` or `..`). "<=": take a name
# of P, and the generic word with as many segments for each `**`. Some Qi accepts it. No literal character of
# Qi is x, so each x stands under a wildcard of Qi, and each segment that is only x under `**` or under a
# segment `*`. A wildcard that accepts x accepts any run of characters in its place, `**` and `*` accept any
# legal segment for a segment x: Qi accepts the name too.
#
# So segments can be treated as the letters of an alphabet: P is a chain of letters with a loop of the letter
# x for each `**`, and the Qi together are a chain automaton whose states are the bits of an integer. The
# search below walks P together with the *set* of states that the Qi can be in (the subset construction, made
# on the fly); P is not within them exactly if it reaches P's end with a set that has no final state.
#
# In code the x of a segment is its `*` itself, which indeed is in no literal piece of any glob.
#
# The empty name is the one word that is not legal, and only a lone `**` could stand for it: there it reads as
# `*/**`.


@dataclass(frozen=True, slots=True)
class _Union:
    """Several globs as one automaton over segments, each with a bit per segment and one for its end."""

    start: int
    final: int
    loops: int
    """The states at a `**`."""
    whatever_follows: int
    """The states at a `**` that ends its glob: in one of them, nothing that follows can leave the union."""
    any_segment: int
    """The states whose segment is `*`."""
    literal: dict[str, int]
    """The states by the literal segment that they want."""
    partial: tuple[tuple[tuple[str, ...], int], ...]
    """For each other segment with wildcards: its pieces between them, and the states that want it."""

    def accepting(self, segment: str) -> int:
        """The states whose segment accepts the generic word of `segment`."""
        states = self.any_segment | self.literal.get(segment, 0)
        for pieces, mask in self.partial:
            if accepts(pieces, segment):
                states |= mask
        return states

    def close(self, states: int) -> int:
        """`states`, and those reached by letting a `**` stand for no (further) segment. No two `**` are
        neighbours."""
        return states | (states & self.loops) << 1


@lru_cache(maxsize=1024)
def _union(texts: tuple[str, ...]) -> _Union:
    start = final = loops = whatever_follows = any_segment = 0
    literal: dict[str, int] = {}
    partial: dict[str, int] = {}
    bit = 1
    for text in texts:
        start |= bit
        for segment in parse_glob(text).segments:
            if segment == "**":
                loops |= bit
            elif segment == "*":
                any_segment |= bit
            elif "*" in segment:
                partial[segment] = partial.get(segment, 0) | bit
            else:
                literal[segment] = literal.get(segment, 0) | bit
            bit <<= 1
        if loops & bit >> 1:
            whatever_follows |= bit >> 1
        final |= bit
        bit <<= 1
    pieces = tuple((tuple(segment.split("*")), mask) for segment, mask in partial.items())
    return _Union(start, final, loops, whatever_follows, any_segment, literal, pieces)


def accepts(pieces: tuple[str, ...], segment: str) -> bool:
    """Whether `segment` is the pieces (two or more) in order with any runs between. Leftmost first is exact."""
    head, tail = pieces[0], pieces[-1]
    at, end = len(head), len(segment) - len(tail)
    if end < at or not (segment.startswith(head) and segment.endswith(tail)):
        return False
    for piece in pieces[1:-1]:
        at = segment.find(piece, at, end)
        if at < 0:
            return False
        at += len(piece)
    return True


def _search(text: str, texts: tuple[str, ...]) -> tuple[bool, int]:
    """Whether the glob `text` is within the union of `texts`, and how many states it took to tell."""
    union = _union(texts)
    segments = parse_glob(text).segments
    if segments == ("**",):
        segments = ("*", "**")
    end = len(segments)
    moves = [union.any_segment if segment == "**" else union.accepting(segment) for segment in segments]
    first = (0, union.close(union.start))
    seen = {first}
    todo = [first]
    steps = 0
    while todo:
        steps += 1
        if steps > STEP_LIMIT:
            return False, steps
        at, states = todo.pop()
        if states & union.whatever_follows:
            continue
        if at == end:
            if not states & union.final:
                return False, steps
            continue
        moved = union.close((states & moves[at]) << 1 | states & union.loops)
        following = [(at + 1, moved)]
        if segments[at] == "**":
            following = [(at, moved), (at + 1, states)]
        for state in following:
            if not state[1]:
                # The union is left behind, and what remains of `text` can always be completed to a name.
                return False, steps
            if state not in seen:
                seen.add(state)
                todo.append(state)
    return True, steps


@lru_cache(maxsize=16384)
def within(text: str, texts: tuple[str, ...]) -> bool:
    """`is_within` on texts, whose hashes Python keeps. All must obey the grammar."""
    return text in texts or "**" in texts or (bool(texts) and _search(text, texts)[0])


def is_within(glob: Glob, globs: tuple[Glob, ...]) -> bool:
    """Whether every name of `glob` is a name of at least one of `globs`.

    Exact, with one exception: after `STEP_LIMIT` states the answer is False, which denies. Globs that someone
    would write take a few dozen at most.
    """
    return within(glob.text, tuple([other.text for other in globs]))
