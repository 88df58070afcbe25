"""The grammar of globs, and their inclusion, against two oracles (`tests.support.glob_oracles`)."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from ringfence.model.scope import globs as module
from ringfence.model.scope.globs import (
    MAX_GLOB_CHARS,
    MAX_WILDCARDS,
    STEP_LIMIT,
    Glob,
    ScopeError,
    parse_glob,
    parse_name,
    quoted,
)
from tests.support.glob_oracles import (
    E_NFC,
    E_NFD,
    SHORT,
    globs,
    legal,
    names_of,
    pattern,
    segments,
    separated,
    short_globs,
    starry_globs,
    union_of,
    well_formed,
    within,
)

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
    assert module.is_glob(text) == well_formed(text)


@given(st.text(max_size=12))
def test_any_text_is_taken_as_it_is_or_refused(text: str) -> None:
    if module.is_glob(text):
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
    left = draw(globs.map(lambda text: text if "**" in text else f"{text}/**").filter(well_formed))
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


def test_common_globs_take_few_steps() -> None:
    right = ("env/*/deploy/**", "env/staging/**", "repo/acme/*/issues/*", "**/public/**")
    for left in ("env/staging/api-*", "env/**/deploy/*", "repo/**/issues/1", "x/public/**", "**"):
        assert module._search(left, right)[1] < 40


# To the last character ----------------------------------------------------------------------------------------


def test_limits_are_those_that_are_documented() -> None:
    assert (MAX_GLOB_CHARS, MAX_WILDCARDS, STEP_LIMIT) == (512, 8, 4096)


@pytest.mark.parametrize(
    "character",
    [
        "\u1160", "\u17b4", "\u17b5", "\u3164", "\uffa0", "\u180b", "\u180f", "\ufe00", "\ufe0f", "\U000e0100",
        "\U000e01ef", "\u2029",
    ],
)  # fmt: skip
def test_each_invisible_character_is_refused_as_one(character: str) -> None:
    with pytest.raises(
        ScopeError, match=f"invisible or unassigned character U\\+{ord(character):04X}"
    ) as caught:
        parse_glob(f"a{character}b")
    assert caught.value.code == "scope_invalid"


@pytest.mark.parametrize("text", ["a\u1161", "a\u1810b", "X\u0301", "a\u17b6"])
def test_their_neighbours_are_accepted(text: str) -> None:
    assert parse_glob(text).text == text


def test_compatibility_form_next_to_variation_selectors_is_rejected() -> None:
    with pytest.raises(ScopeError, match="compatibility"):
        parse_glob("a\ufe10")


@pytest.mark.parametrize(
    ("glob", "depths"),
    [
        ("a", {1}),
        ("a/*", {2}),
        ("**", {0, 1, 2, 3, 4, 5}),
        ("a/**", {1, 2, 3, 4, 5}),
        ("**/b/*", {2, 3, 4, 5}),
    ],
)
def test_a_glob_reaches_as_deep_as_it_has_segments(glob: str, depths: set[int]) -> None:
    assert {depth for depth in range(6) if Glob(glob).reaches(depth)} == depths


@pytest.mark.parametrize(
    ("length", "shown"), [(80, "'" + "a" * 80 + "'"), (81, "'" + "a" * 77 + "...'"), (0, "''")]
)
def test_a_message_shows_so_much_of_a_text(length: int, shown: str) -> None:
    assert quoted("a" * length) == shown
    assert quoted("\u202e\x1b") == "'\\u202e\\x1b'"


def test_a_glob_is_shown_and_compared_by_its_text() -> None:
    assert repr(Glob("a/b")) == "Glob(text='a/b')"
    assert str(Glob("a/b")) == "a/b"


@pytest.mark.parametrize(
    ("glob", "union"),
    [
        # One branch of the search ends at a `**` of the union; what remains of the others still counts.
        ("**/a", ("*", "a/**")),
        ("**/a", ("a/**", "*/a")),
        ("**/a", ("a/**", "**/b")),
        ("**/a", ("*/b", "a*/**")),
        # A letter that no glob has stands for any segment, whatever the globs begin or end with.
        ("**", ("X*", "X*/**")),
        ("**", ("*X", "*X/**")),
        ("**", ("*", "a/**")),
        ("a/**", ("a", "a/b/**")),
    ],
)
def test_no_union_covers_what_one_branch_leaves_open(glob: str, union: tuple[str, ...]) -> None:
    assert not module.within(glob, union)
    assert module.within(glob, (*union, "**/*" if glob != "a/**" else "a/*/**"))
