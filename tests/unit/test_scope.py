"""What scopes lack of each other and share, against the oracles of their globs (`tests.support.glob_oracles`)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.messages.base import Permission, Scope
from ringfence.model.scope import glob_intersection
from ringfence.model.scope import scope as module
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.scope import intersect, missing, validate_scope
from tests.support.glob_oracles import SHORT, globs, names_of, separated, short_globs, union_of

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


def test_invalid_glob_is_missing_and_grants_nothing() -> None:
    everything = (permission("t", "rw", ["**"]),)
    for text in ("a/../b", "a%2Fb", "a//b", "\u2024\u2024", "***"):
        bad = (permission("t", "r", [text, "a"]),)
        assert missing(bad, everything) == (permission("t", "r", [text]),)
        assert missing(bad, bad) == (permission("t", "r", [text]),)
        assert missing((permission("t", "r", ["a"]),), bad) == ()
        assert missing((permission("t", "r", ["b"]),), bad) == (permission("t", "r", ["b"]),)
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
    assert intersect((newer,), (plain,)) == intersect((plain,), (newer,)) == ()
    with pytest.raises(ScopeError, match="only_before") as caught:
        validate_scope((plain, newer))
    assert "permission 2 (target " in caught.value.message


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
    most = many.model_copy(update={"verbs": many.verbs[:64]})
    validate_scope((most,))
    with pytest.raises(ScopeError, match="4097 pairs"):
        validate_scope((most, good))


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
        if union_of(glob_intersection.meet(left, right)) != names_of(left) & names_of(right)
    ]
    assert wrong == []


@given(short_globs, short_globs)
def test_a_meeting_of_short_globs_is_exact(left: str, right: str) -> None:
    assert union_of(glob_intersection.meet(left, right)) == names_of(left) & names_of(right)


@settings(max_examples=300)
@given(globs, globs)
def test_a_meeting_is_within_both(left: str, right: str) -> None:
    for text in glob_intersection.meet(left, right):
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


def test_the_limit_of_pairs_is_one_for_all_permissions(monkeypatch: pytest.MonkeyPatch) -> None:
    scope = (permission("t", "r", ["x"]), permission("t", "r", ["y"]))
    monkeypatch.setattr(module, "_MEET_PAIRS", 1)
    assert intersect(scope, scope) == (permission("t", "r", ["x"]),)


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
        glob_intersection.meet.cache_clear()
        glob_intersection._meet_segments.cache_clear()
        monkeypatch.setattr(module if limit == "_MEET_PAIRS" else glob_intersection, limit, value)
        part = rights(intersect(a, b))["t", "r"]
        assert part != whole
        assert not part & ~whole
        monkeypatch.undo()
    glob_intersection.meet.cache_clear()
    glob_intersection._meet_segments.cache_clear()
