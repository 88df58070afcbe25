"""Globs and scopes against two oracles: names enumerated and matched by `re`, and an automaton over characters.

Neither oracle shares an idea with the code under test, which compares segments by generic words.

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

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ringfence.messages.permission import Permission, Scope
from ringfence.model import scope as module
from ringfence.model.scope import (
    MAX_GLOB_CHARS,
    MAX_WILDCARDS,
    STEP_LIMIT,
    Glob,
    ScopeError,
    intersect,
    is_within,
    missing,
    parse_glob,
    parse_name,
    validate_scope,
)

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


# Grammar ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "a",
        "*",
        "**",
        "prod/*",
        "a/**",
        "**/a",
        "a/**/b",
        "a/**/*",
        "*/**",
        "a*b*c",
        ".env",
        "...",
        "..a",
        ".*",
        "a b/c d",
        "arn:aws:s3:::bucket/key",
        "user@example.org/~/x+y=z,(1)!$&'\"^`<>|",
        f"caf{E_NFC}",
        "\u0441\u0442\u0435\u043d\u0434/\u6771\u4eac/\U0001f680",
        "Pl\u00e4ne \u2013 2025",
        "q\u0301",  # a mark for which there is no composed letter is NFC
        "a" * MAX_GLOB_CHARS,
        "/".join("*" * MAX_WILDCARDS),
        "/".join(["**", "a"] * MAX_WILDCARDS),
    ],
)
def test_accepted_text_is_its_own_canonical_form(text: str) -> None:
    assert parse_glob(text).text == text
    assert "/".join(parse_glob(text).segments) == text
    assert parse_glob(text) == Glob(text)
    assert within(text, text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "empty"),
        ("/", "empty segment"),
        ("/a", "empty segment"),
        ("a/", "empty segment"),
        ("a//b", "empty segment"),
        (".", "segment '.'"),
        ("..", "segment '..'"),
        ("a/../b", "segment '..'"),
        ("*/.", "segment '.'"),
        ("**/..", "segment '..'"),
        ("***", "whole segment"),
        ("a**", "whole segment"),
        ("**a", "whole segment"),
        ("a/b**c/d", "whole segment"),
        ("****", "whole segment"),
        ("**/**", "which is the same"),
        ("a/**/**/b", "which is the same"),
        ("a%2Fb", "decode"),
        ("%2e%2e", "decode"),
        ("100%", "decode"),
        ("a\\b", "separate segments"),
        ("a?", "only wildcard"),
        ("[ab]", "only wildcard"),
        ("a]", "only wildcard"),
        ("{a,b}", "one glob for each"),
        ("a}", "one glob for each"),
        ("a#b", "URL"),
        ("a/..;/b", "URL"),
        ("a\x00b", "U+0000"),
        ("a\nb", "U+000A"),
        ("a\n", "U+000A"),
        ("a\tb", "U+0009"),
        ("a\x7f", "U+007F"),
        ("a\x85b", "U+0085"),
        ("a\u00a0b", "U+00A0"),
        ("a\u00adb", "U+00AD"),  # soft hyphen
        ("a\u200bb", "U+200B"),
        ("a\u200db", "U+200D"),
        ("a\u202eb", "U+202E"),  # right-to-left override
        ("a\u2028b", "U+2028"),
        ("a\u3000b", "U+3000"),
        ("a\ufeff", "U+FEFF"),
        ("a\ud800", "U+D800"),
        ("a\ue000", "U+E000"),
        ("a\u0378", "U+0378"),  # unassigned
        ("a\uffff", "U+FFFF"),
        ("a\ufe0f", "U+FE0F"),  # variation selector
        ("a\u034f", "U+034F"),  # combining grapheme joiner
        ("a\u115f", "U+115F"),  # Hangul filler
        ("a\u2800", "U+2800"),
        (" a", "space"),
        ("a ", "space"),
        ("a /b", "space"),
        (" ", "space"),
        ("* ", "space"),
        (f"caf{E_NFD}", "NFC"),
        ("\u212b", "NFC"),  # angstrom sign
        ("a\uff0fb", "compatibility"),  # fullwidth solidus
        ("\uff0e\uff0e", "compatibility"),
        ("\u2024\u2024", "compatibility"),  # one dot leader
        ("\u2025", "compatibility"),  # two dot leader
        ("\uff0a", "compatibility"),
        ("\uff21", "compatibility"),
        ("\uff05" + "2f", "compatibility"),
        ("\ufb01le", "compatibility"),
        ("x\u00b2", "compatibility"),
        ("a\u2215b", "looks like"),
        ("a\u2044b", "looks like"),
        ("a\u29f8b", "looks like"),
        ("\u2217", "looks like"),
        ("\u204e", "looks like"),
        ("\u2216", "looks like"),
        ("\u0301a", "combining mark"),
        ("a/\u0301", "combining mark"),
        ("a*\u0301", "combining mark"),
        ("a" * (MAX_GLOB_CHARS + 1), "characters long"),
        ("/".join("*" * (MAX_WILDCARDS + 1)), "wildcards"),
        ("/".join(["**", "a"] * (MAX_WILDCARDS + 1)), "wildcards"),
    ],
)
def test_text_outside_the_grammar_is_refused_with_a_remedy(text: str, why: str) -> None:
    with pytest.raises(ScopeError, match=re.escape(why)) as caught:
        parse_glob(text)
    assert ": " in caught.value.message
    assert caught.value.message.isprintable()
    assert caught.value.message.isascii()
    assert caught.value.code == "scope_invalid"
    with pytest.raises(ScopeError):
        Glob(text)
    assert not parse_glob("**").matches(text)


@given(st.lists(st.sampled_from(["a", ".", "/", "*", "**"]), min_size=1, max_size=8).map("".join))
def test_the_grammar_takes_what_it_says(text: str) -> None:
    assert module._is_glob(text) == well_formed(text)


@given(st.text(max_size=12))
def test_any_text_is_taken_as_it_is_or_refused(text: str) -> None:
    if module._is_glob(text):
        assert parse_glob(text).text == text
    else:
        with pytest.raises(ScopeError) as caught:
            parse_glob(text)
        assert caught.value.message.isprintable()


def test_a_name_is_a_glob_without_wildcards() -> None:
    assert parse_name("a/b").is_name
    for text in ("*", "a/**", "a*"):
        assert not parse_glob(text).is_name
        with pytest.raises(ScopeError, match="wildcard"):
            parse_name(text)


# Matching --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("glob", "names", "not_names"),
    [
        ("a", ["a"], ["A", "b", "aa", "a/a"]),
        ("*", ["a", ".a", "a.", "..."], [".", "..", "", "a/b", "*"]),
        ("**", ["a", "a/b", "a/b/c", "..."], ["", ".", "..", "a/..", "../a", "a/./b", "a//b", "/a", "a/"]),
        ("a*", ["a", "ab", "abc", "a."], ["A", "b", "ba", "a/b", "a/"]),
        ("*a", ["a", "ba", ".a"], ["ab", "b/a"]),
        (".*", [".a", "..a", "..."], [".", "..", "a"]),
        ("a*a", ["aa", "aba", "aaa"], ["a", "ab", "a/a"]),
        ("*a*b*", ["ab", "xaybz", "aab"], ["ba", "a", "b"]),
        ("a/**", ["a", "a/b", "a/b/c"], ["b", "ab", "b/a", "a/.."]),
        ("**/a", ["a", "b/a", "a/a", "b/b/a"], ["b", "a/b", "ba"]),
        ("a/**/b", ["a/b", "a/b/b", "a/x/y/b"], ["a", "b", "ab", "a/bb", "a/b/x"]),
        ("a/**/*", ["a/b", "a/b/c"], ["a", "b/a"]),
        (f"caf{E_NFC}", [f"caf{E_NFC}"], ["cafe", f"caf{E_NFD}", "CAF\u00c9"]),
        ("caf*", [f"caf{E_NFC}"], [f"caf{E_NFD}"]),
        ("**", [], ["a%2fb", "a\\b", "a?b", "a\uff0fb", "a\u200b"]),
    ],
)
def test_matching(glob: str, names: list[str], not_names: list[str]) -> None:
    assert [name for name in names if not parse_glob(glob).matches(name)] == []
    assert [name for name in not_names if parse_glob(glob).matches(name)] == []


@given(globs, st.text("abA.x/" + E_NFC, min_size=1, max_size=8))
def test_matching_agrees_with_re(glob: str, name: str) -> None:
    assert parse_glob(glob).matches(name) == (legal(name) and bool(pattern(glob).fullmatch(name + "/")))


# Inclusion -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("prod/*", ["prod/a*"], False),
        ("prod/a*", ["prod/*"], True),
        ("prod/a*", ["prod/b*", "prod/*a"], False),
        ("prod", ["prod/*"], False),
        ("prod/*", ["prod"], False),
        ("prod/x", ["prod/*"], True),
        ("prod/x", ["Prod/*"], False),
        ("PROD/x", ["prod/*"], False),
        ("prod/x/y", ["prod/*"], False),
        ("prod/**", ["prod/*"], False),
        ("prod/**", ["prod"], False),
        ("prod*", ["prod/**"], False),
        ("production/x", ["prod/**"], False),
        ("**", ["**"], True),
        ("*", ["**"], True),
        ("**", ["*"], False),
        ("**", ["*/**"], True),
        ("**", ["**/*"], True),
        ("**", ["*", "*/**/*"], True),
        ("**", ["*", "*/*/*/**"], False),
        ("**", [], False),
        ("a", [], False),
        ("a", ["a/**"], True),
        ("a/**", ["a"], False),
        ("a/**", ["a/*"], False),
        ("a/**", ["a", "a/*/**"], True),
        ("a/**", ["a", "a/*", "a/*/*/**"], True),
        ("a/**", ["a", "a/*", "a/*/*"], False),
        ("a/**/b", ["a/b"], False),
        ("a/b", ["a/**/b"], True),
        ("a/x/y/b", ["a/**/b"], True),
        ("a/**/b", ["a/**"], True),
        ("a/**/b", ["**/b"], True),
        ("a/**/b", ["a/b", "a/*/**/b"], True),
        ("a/**/b", ["a/b", "a/**/*/b"], True),
        ("a/**/b", ["a/b", "a/*/b", "a/*/**/*/b"], True),
        ("a/**/b", ["a/b", "a/*/*/b"], False),
        ("a/**/b", ["a/b", "a", "b", "a/*/*/**/b"], False),
        ("a/**/b", ["a/b", "a/*/b", "b", "a/*/*/*/**/b"], False),
        ("a/**/*", ["a/*/**"], True),
        ("a/*/**", ["a/**/*"], True),
        ("**/a/**", ["**/a/**/a/**"], False),
        ("**/a/**/a/**", ["**/a/**"], True),
        ("a*", ["a", "a*b"], False),
        ("a*", ["*"], True),
        ("*a*", ["a*", "*a"], False),
        ("ab*", ["a*b*"], True),
        ("a*b*", ["ab*"], False),
        ("a*a", ["a*"], True),
        ("a*a", ["aa*"], False),
        ("*a*", ["*a*a*"], False),
        ("*ab*", ["*a*b*"], True),
        ("*aa*", ["*a*a*"], True),
        ("*aba*", ["*ab*ba*"], False),
        ("a*b", ["a*b*b"], False),
        ("*.txt", ["*.*"], True),
        ("*.*", ["*.txt"], False),
        (".*", ["..*"], False),
        ("..*", [".*"], True),
        (".*", ["*"], True),
        (f"caf{E_NFC}", ["caf*"], True),
        (f"caf{E_NFC}", ["cafe*"], False),
        ("\u0430", ["a"], False),  # Cyrillic
        ("a/b", ["x", "y/**", "a/*"], True),
    ],
)
def test_inclusion(left: str, right: list[str], expected: bool) -> None:
    assert within(left, *right) is expected
    assert (separated(left, tuple(right)) is None) is expected


def test_every_pair_of_short_globs_agrees_with_enumeration() -> None:
    wrong = [
        (left, right)
        for left, right in itertools.product(SHORT, repeat=2)
        if module._search(left, (right,))[0] != (not names_of(left) & ~names_of(right))
    ]
    assert wrong == []
    assert len(SHORT) > 200


@settings(max_examples=400)
@given(short_globs, st.lists(short_globs, max_size=6))
def test_unions_of_short_globs_agree_with_enumeration(left: str, right: list[str]) -> None:
    assert within(left, *right) == (not names_of(left) & ~union_of(right))


@settings(max_examples=600)
@given(globs, st.lists(globs, max_size=4))
@example("**", ["*", "*/*/**"])
@example("**/a", ["a", "*/a", "*/*/**/a"])
def test_inclusion_agrees_with_the_automaton_and_never_widens(left: str, right: list[str]) -> None:
    witness = separated(left, tuple(right))
    assert within(left, *right) == (witness is None)
    if witness is not None:
        assert parse_glob(left).matches(witness)
        assert not any(parse_glob(text).matches(witness) for text in right)
    else:
        assert not names_of(left) & ~union_of(right)


@settings(max_examples=400)
@given(starry_globs, st.lists(starry_globs, min_size=1, max_size=3))
def test_inclusion_of_segments_with_many_wildcards(left: str, right: list[str]) -> None:
    assert within(left, *right) == (separated(left, tuple(right)) is None)


@st.composite
def nearly_covered(draw: st.DrawFn) -> tuple[str, tuple[str, ...]]:
    """A glob, and the cases that its `**` fall into, perhaps but for one, of which there are the parts."""
    left = draw(globs.map(lambda text: text if "**" in text else f"{text}/**"))
    cases = [tuple(left.split("/"))]
    for _ in range(draw(st.integers(1, 4))):
        case = draw(st.sampled_from([case for case in cases if "**" in case]))
        at = draw(st.sampled_from([at for at, segment in enumerate(case) if segment == "**"]))
        cases.remove(case)
        more = draw(st.sampled_from([("*", "**"), ("**", "*")]))
        cases += [case[:at] + case[at + 1 :], case[:at] + more + case[at + 1 :]]
    decoys: list[tuple[str, ...]] = []
    if draw(st.booleans()):
        gap = draw(st.sampled_from(cases))
        cases.remove(gap)
        # The two parts of the gap, one after the other: together they would close it, but do not.
        at = draw(st.integers(0, len(gap)))
        skip = draw(st.integers(0, 1))
        decoys = [
            tuple(segment for segment in part if segment != "**") for part in (gap[:at], gap[at + skip :])
        ]
    right = ["/".join(case) for case in [*draw(st.permutations(cases)), *decoys]]
    return left, tuple(text for text in right if text and well_formed(text))


@settings(max_examples=400)
@given(nearly_covered())
def test_unions_that_cover_a_glob_but_for_a_gap(pair: tuple[str, tuple[str, ...]]) -> None:
    left, right = pair
    assert within(left, *right) == (separated(left, right) is None)


@st.composite
def narrowed(draw: st.DrawFn) -> tuple[str, str]:
    """A glob, and one made from it by filling its wildcards: inclusions that chance would rarely hit."""
    wide = draw(globs)
    narrow = []
    for segment in wide.split("/"):
        if segment == "**":
            narrow += draw(st.lists(segments, max_size=2))
        else:
            pieces = segment.split("*")
            fills = [draw(st.sampled_from(["", "a", "b.", "*", "*a*"])) for _ in pieces[1:]]
            narrow.append(
                pieces[0] + "".join(fill + piece for fill, piece in zip(fills, pieces[1:], strict=True))
            )
    text = "/".join(narrow)
    assume(text and well_formed(text))
    return wide, text


@given(narrowed(), st.lists(globs, max_size=2))
def test_a_filled_glob_is_within_the_glob_that_it_was_made_from(
    pair: tuple[str, str], more: list[str]
) -> None:
    wide, narrow = pair
    assert within(narrow, *more, wide)
    assert separated(narrow, (wide,)) is None


@given(narrowed())
def test_inclusion_both_ways_means_the_same_names(pair: tuple[str, str]) -> None:
    wide, narrow = pair
    if within(wide, narrow):
        assert names_of(wide) == names_of(narrow)
    else:
        assert separated(wide, (narrow,)) is not None


def test_hostile_inputs_end_within_the_step_limit() -> None:
    stars = "*a" * MAX_WILDCARDS
    deep = "/".join(["**", "a"] * MAX_WILDCARDS)
    shifted = "/".join(["a", "**"] * MAX_WILDCARDS)
    mixed = ["/".join(["**"] + ["*"] * n + ["a", "**", "b"] * 2) for n in range(1, 5)]
    # Every way to say of each `**` whether it stands for nothing: the union is the left side again.
    cases = tuple(
        "/".join(part for some in choice for part in ([*some] if some else []) + ["a"])
        for choice in itertools.product([(), ("*", "**")], repeat=4)
    )
    flat = ["/".join(["*"] * n + ["a"] * m) for n in range(1, 8) for m in range(1, 8)]
    for left, right in [
        (stars, (stars + "b",)),
        ("a" * 500, ("*a*a*a*a*a*a*a*b",)),
        ("/".join("a" * 256), ("**/a/**/a/**/a/**/a/**/a/**/a/**/a/b",)),
        (deep, (shifted,)),
        (deep + "/b", (deep + "/a",)),
        (deep, tuple(mixed)),
        (shifted, tuple(mixed + flat)),
        (deep, tuple(flat)),
        ("/".join(["**", "a"] * 4), cases),
        ("/".join(["**", "a", "a"] * MAX_WILDCARDS), ("/".join(["**", "a", "*"] * 4), *flat)),
    ]:
        for text in (left, *right):
            parse_glob(text)
        _, steps = module._search(left, right)
        assert steps <= STEP_LIMIT + 1


def test_beyond_the_step_limit_the_answer_is_no(monkeypatch: pytest.MonkeyPatch) -> None:
    left, right = "a/**/b/**/c", ("a/**/c", "**/x")
    assert module._search(left, right)[0]
    monkeypatch.setattr(module, "STEP_LIMIT", 2)
    assert not module._search(left, right)[0]


def test_what_someone_would_write_takes_few_steps() -> None:
    right = ("env/*/deploy/**", "env/staging/**", "repo/acme/*/issues/*", "**/public/**")
    for left in ("env/staging/api-*", "env/**/deploy/*", "repo/**/issues/1", "x/public/**", "**"):
        assert module._search(left, right)[1] < 40


# Scopes ----------------------------------------------------------------------------------------------------


def permission(target: str, verbs: str, resources: Iterable[str]) -> Permission:
    return Permission(target=target, verbs=tuple(verbs), resources=tuple(resources))


scopes = st.lists(
    st.builds(
        permission,
        st.sampled_from(["t", "u"]),
        st.sampled_from(["r", "w", "rw", "wr", "rwd"]),
        st.lists(short_globs, min_size=1, max_size=3),
    ),
    max_size=3,
).map(tuple)


def rights(scope: Scope) -> dict[tuple[str, str], int]:
    """The enumerated names that a scope allows, by target and verb."""
    return {
        (target, verb): union_of(
            text for p in scope if p.target == target and verb in p.verbs for text in p.resources
        )
        for target in "tu"
        for verb in "rwd"
    }


def triples(scope: Scope) -> set[tuple[str, str, str]]:
    return {(p.target, verb, text) for p in scope for verb in p.verbs for text in p.resources}


@settings(max_examples=300)
@given(scopes, scopes)
def test_missing_is_exactly_what_is_not_within(wanted: Scope, allowed: Scope) -> None:
    lack = missing(wanted, allowed)
    allows = rights(allowed)
    assert triples(lack) == {
        (target, verb, text)
        for target, verb, text in triples(wanted)
        if names_of(text) & ~allows[target, verb]
    }
    if not lack:
        assert all(not names & ~allows[key] for key, names in rights(wanted).items())
    assert missing(wanted, allowed) == lack
    assert missing(lack, allowed) == lack


@given(scopes)
def test_a_scope_lacks_nothing_of_itself_and_nothing_allows_nothing(scope: Scope) -> None:
    assert missing(scope, scope) == ()
    assert triples(missing(scope, ())) == triples(scope)


def test_missing_names_only_what_lacks() -> None:
    allowed = (permission("t", "r", ["prod/*", "dev/**"]), permission("t", "w", ["dev/**"]))
    wanted = (
        permission("t", "rw", ["dev/x", "prod/x"]),
        permission("t", "r", ["prod/*", "prod/a*"]),
        permission("u", "r", ["dev/x"]),
        permission("t", "d", ["dev/x"]),
    )
    assert missing(wanted, allowed) == (
        permission("t", "w", ["prod/x"]),
        permission("u", "r", ["dev/x"]),
        permission("t", "d", ["dev/x"]),
    )


def test_missing_splits_a_permission_only_where_its_lack_is_no_product() -> None:
    allowed = (permission("t", "r", ["a"]), permission("t", "w", ["b"]))
    assert missing((permission("t", "rw", ["a", "b"]),), allowed) == (
        permission("t", "r", ["b"]),
        permission("t", "w", ["a"]),
    )
    assert missing((permission("t", "rwd", ["c", "b"]),), (permission("t", "rwd", ["b"]),)) == (
        permission("t", "rwd", ["c"]),
    )


def test_permissions_of_one_target_and_verb_add_up() -> None:
    allowed = (permission("t", "r", ["a"]), permission("t", "rw", ["a/*/**"]))
    assert missing((permission("t", "r", ["a/**"]),), allowed) == ()
    assert missing((permission("t", "w", ["a/**"]),), allowed) == (permission("t", "w", ["a/**"]),)


def test_what_breaks_the_grammar_is_lacking_and_grants_nothing() -> None:
    everything = (permission("t", "rw", ["**"]),)
    for text in ("a/../b", "a%2Fb", "a//b", "\u2024\u2024", "***"):
        bad = (permission("t", "r", [text, "a"]),)
        assert missing(bad, everything) == (permission("t", "r", [text]),)
        assert missing(bad, bad) == (permission("t", "r", [text]),)
        assert missing((permission("t", "r", ["a"]),), bad) == ()
        assert intersect(bad, everything) == (permission("t", "r", ["a"]),)
    # Straight past the checks of the message model, as a careless caller could.
    for target, verb in (
        ("*", "r"),
        ("t", "*"),
        ("T", "r"),
        ("t", "R"),
        ("t\n", "r"),
        ("t", "r\n"),
        ("t", ""),
    ):
        odd = (Permission.model_construct(target=target, verbs=(verb,), resources=("a",)),)
        assert missing(odd, odd) == odd
        assert intersect(odd, odd) == ()
    for verbs, resources in (((), ("a",)), (("r",), ())):
        hollow = (Permission.model_construct(target="t", verbs=verbs, resources=resources),)
        assert missing(hollow, everything) == hollow


def test_a_field_from_a_newer_version_never_widens() -> None:
    newer = Permission.model_validate_json(
        '{"target":"t","verbs":["r"],"resources":["a"],"only_before":"noon"}'
    )
    plain = permission("t", "r", ["a"])
    assert missing((plain,), (newer,)) == (plain,)
    assert missing((newer,), (plain,)) == (newer,)
    assert intersect((newer,), (plain,)) == ()
    with pytest.raises(ScopeError, match="only_before"):
        validate_scope((newer,))


def test_validate_scope_names_the_offender() -> None:
    good = permission("t", "r", ["a"])
    validate_scope((good,))
    validate_scope((), allow_empty=True)
    with pytest.raises(ScopeError, match="empty"):
        validate_scope(())
    for bad, why in [
        (permission("u", "r", ["a", "b/../c"]), "segment '..'"),
        (Permission.model_construct(target="u*", verbs=("r",), resources=("a",)), "target id"),
        (Permission.model_construct(target="u", verbs=("r*",), resources=("a",)), "verb 'r*'"),
        (Permission.model_construct(target="u", verbs=("r\n",), resources=("a",)), "verb"),
        (Permission.model_construct(target="u", verbs=(), resources=("a",)), "at least one verb"),
        (Permission.model_construct(target="u", verbs=("r",), resources=()), "at least one verb"),
    ]:
        with pytest.raises(ScopeError, match=re.escape(why)) as caught:
            validate_scope((good, bad))
        assert caught.value.message.startswith(f"permission 2 (target '{bad.target}'): ")
    many = Permission.model_construct(
        target="t", verbs=tuple(f"v{n}" for n in range(65)), resources=tuple(f"r{n}" for n in range(64))
    )
    with pytest.raises(ScopeError, match="4160 pairs"):
        validate_scope((many,))


# Intersection ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("left", "right", "expected"),
    [
        ("prod/*", "prod/a*", ["prod/a*"]),
        ("prod/*", "dev/*", []),
        ("a*", "*b", ["a*b"]),
        ("ab*", "*bc", ["ab*bc", "abc"]),
        ("*a*", "*b*", ["*a*b*", "*b*a*"]),
        (".*", "*.", [".*."]),
        ("a/**", "**/b", ["a/**/b"]),
        ("a/**", "**/a", ["a", "a/**/a"]),
        ("*/x", "a/*", ["a/x"]),
        ("a*/**", "*/b*", ["a*/b*"]),
        ("a", "A", []),
        ("**/a/**", "**/b/**", ["**/a/**/b/**", "**/b/**/a/**"]),
    ],
)
def test_intersection_of_two_globs(left: str, right: str, expected: list[str]) -> None:
    a, b = (permission("t", "r", [left]),), (permission("t", "r", [right]),)
    assert [text for p in intersect(a, b) for text in p.resources] == expected
    assert intersect(a, b) == intersect(b, a)


def test_every_pair_of_short_globs_meets_exactly() -> None:
    # Up to 3 characters, as every pair of the longer ones takes a quarter of a minute.
    few = [text for text in SHORT if len(text) <= 3]
    wrong = [
        (left, right)
        for left, right in itertools.combinations_with_replacement(few, 2)
        if union_of(module._meet(left, right)) != names_of(left) & names_of(right)
    ]
    assert wrong == []


@given(short_globs, short_globs)
def test_a_meeting_of_short_globs_is_exact(left: str, right: str) -> None:
    assert union_of(module._meet(left, right)) == names_of(left) & names_of(right)


@settings(max_examples=300)
@given(globs, globs)
def test_a_meeting_is_within_both(left: str, right: str) -> None:
    for text in module._meet(left, right):
        assert separated(text, (left,)) is None
        assert separated(text, (right,)) is None


@settings(max_examples=200)
@given(scopes, scopes)
def test_intersect_is_what_both_allow(a: Scope, b: Scope) -> None:
    both = intersect(a, b)
    allows_a, allows_b = rights(a), rights(b)
    assert rights(both) == {key: allows_a[key] & allows_b[key] for key in allows_a}
    assert missing(both, a) == missing(both, b) == ()
    assert both == tuple(sorted(both, key=lambda p: (p.target, p.verbs)))
    if both:
        validate_scope(both)


def test_intersect_beyond_its_limits_leaves_out_and_never_adds(monkeypatch: pytest.MonkeyPatch) -> None:
    a = tuple(permission("t", "r", ["*a*b*c*d*", "*".join("abcdefgh")]) for _ in range(2))
    b = tuple(permission("t", "r", ["*d*c*b*a*", "**/x"]) for _ in range(2))
    both = intersect(a, b)
    assert missing(both, a) == missing(both, b) == ()
    wide = (permission("t", "r", [f"*{n}a/*" for n in range(64)]),) * 8
    deep = (permission("t", "r", [f"*/{n}b*" for n in range(64)]),) * 8
    both = intersect(wide, deep)
    assert missing(both, wide) == missing(both, deep) == ()
    a, b = (permission("t", "r", ["*a*b*", "x"]),), (permission("t", "r", ["*b*a*", "x"]),)
    whole = rights(intersect(a, b))["t", "r"]
    for limit, value in (("_MEET_PAIRS", 1), ("_MEET_CELLS", 12), ("_MEET_GLOBS", 1)):
        module._meet.cache_clear()
        module._meet_segments.cache_clear()
        monkeypatch.setattr(module, limit, value)
        part = rights(intersect(a, b))["t", "r"]
        assert part != whole
        assert not part & ~whole
        monkeypatch.undo()
    module._meet.cache_clear()
    module._meet_segments.cache_clear()
