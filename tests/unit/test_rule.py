"""The rule against an oracle that enumerates names, and the deadline at its edges."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.messages.base import Permission, Scope
from ringfence.messages.registry import Entitlements
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.rule import (
    NO_LIMIT,
    DeadlineError,
    Excess,
    Limit,
    are_in_force,
    deadline_ms,
    effective,
    exceeding,
    limits_of,
)
from ringfence.model.scope.scope import missing

# Enough to tell the globs below apart: no `*` needs more than one character, no `**` more than two segments (no
# glob has more than one segment `*`), and `x` stands for all that no glob names.
LETTERS = ("a", "b", "ab", "x", "ax", "xa")
NAMES = ["/".join(t) for n in range(1, 5) for t in itertools.product(LETTERS, repeat=n)]
GLOBS = (
    "a",
    "b",
    "ab",
    "*",
    "**",
    "a*",
    "*a",
    "a/b",
    "a/*",
    "*/a",
    "a/**",
    "**/a",
    "a/**/b",
    "a*/**",
    "*/**",
)


def permission(verbs: str, *resources: str, target: str = "t") -> Permission:
    return Permission(target=target, verbs=tuple(verbs), resources=resources)


def matches(glob: str, name: str) -> bool:
    expression = "".join(
        "(?:[^/]+/)*" if segment == "**" else segment.replace("*", "[^/]*") + "/"
        for segment in glob.split("/")
    )
    return re.fullmatch(expression, name + "/") is not None


MATCHED = {glob: frozenset(name for name in NAMES if matches(glob, name)) for glob in GLOBS}


def allowed(scope: Scope) -> set[tuple[str, str, str]]:
    """Every single thing that a scope allows, of the enumerated names."""
    return {
        (p.target, verb, name)
        for p in scope
        for verb in p.verbs
        for text in p.resources
        for name in MATCHED.get(text) or (name for name in NAMES if matches(text, name))
    }


scopes = st.lists(
    st.builds(
        lambda target, verbs, resources: permission(verbs, *resources, target=target),
        st.sampled_from("tu"),
        st.sampled_from(["r", "w", "rw"]),
        st.lists(st.sampled_from(GLOBS), min_size=1, max_size=3),
    ),
    min_size=1,
    max_size=3,
).map(tuple)


def named(scopes: Iterable[Scope]) -> tuple[Limit, ...]:
    return tuple(Limit(f"side {number}", scope) for number, scope in enumerate(scopes))


@given(scopes, st.lists(scopes, min_size=1, max_size=3))
def test_a_wish_is_allowed_exactly_within_every_side(wanted: Scope, scopes: list[Scope]) -> None:
    lacks = exceeding(wanted, named(scopes))
    everything = set.intersection(*(allowed(scope) for scope in scopes))
    assert (not lacks) == (allowed(wanted) <= everything)
    for side in named(scopes):
        named_here = tuple(lack.permission for lack in lacks if lack.limit == side.name)
        assert named_here == missing(wanted, side.scope)
        assert bool(named_here) == (not allowed(wanted) <= allowed(side.scope))
        # What is named as lacking really lacks, glob by glob.
        for p in named_here:
            for verb, text in itertools.product(p.verbs, p.resources):
                assert not allowed((permission(verb, text, target=p.target),)) <= allowed(side.scope)


@given(scopes, st.lists(scopes, max_size=3), scopes)
def test_another_side_never_widens(wanted: Scope, scopes: list[Scope], more: Scope) -> None:
    without, withal = exceeding(wanted, named(scopes)), exceeding(wanted, named([*scopes, more]))
    if without and scopes:
        assert withal[: len(without)] == without
    assert (
        without
        or not scopes
        or withal == tuple(Excess(p, f"side {len(scopes)}") for p in missing(wanted, more))
    )
    assert allowed(effective(named([*scopes, more]))) <= allowed(more)


@given(st.lists(scopes, min_size=1, max_size=3))
def test_effective_is_what_all_sides_allow(scopes: list[Scope]) -> None:
    shown = effective(named(scopes))
    assert allowed(shown) == set.intersection(*(allowed(scope) for scope in scopes))
    if shown:
        assert exceeding(shown, named(scopes)) == ()


def test_the_refusal_names_each_permission_and_its_side() -> None:
    task = (permission("rw", "env/staging/**"), permission("r", "env/prod/*"))
    ceiling = (permission("rw", "env/**"),)
    entitled = (permission("r", "env/**"), permission("w", "env/staging/api"))
    sides = limits_of(task, [("deployer", ceiling), ("helper", ceiling)], "alice", entitled)
    assert [side.name for side in sides] == [
        "task",
        "ceiling:deployer",
        "ceiling:helper",
        "entitlements:alice",
    ]
    assert exceeding((permission("rw", "env/staging/api"),), sides) == ()
    assert exceeding((permission("rw", "env/staging/api", "env/prod/api"),), sides) == (
        Excess(permission("w", "env/prod/api"), "task"),
        Excess(permission("w", "env/prod/api"), "entitlements:alice"),
    )
    assert exceeding((permission("r", "env/prod/api", "db/users"),), sides) == (
        Excess(permission("r", "db/users"), "task"),
        Excess(permission("r", "db/users"), "ceiling:deployer"),
        Excess(permission("r", "db/users"), "ceiling:helper"),
        Excess(permission("r", "db/users"), "entitlements:alice"),
    )
    assert effective(sides) == (
        permission("r", "env/prod/*", "env/staging/**"),
        permission("w", "env/staging/api"),
    )


def test_empty_limits_allow_nothing() -> None:
    wanted = (permission("r", "a"), permission("w", "b"))
    assert NO_LIMIT == "none"  # refusals show it
    assert exceeding(wanted, ()) == tuple(Excess(p, NO_LIMIT) for p in wanted)
    assert exceeding(wanted, iter([Limit.task(())])) == tuple(Excess(p, "task") for p in wanted)
    everything = (permission("rw", "**"),)
    assert exceeding(wanted, limits_of(everything, [], "alice", everything)) == tuple(
        Excess(p, "ceiling") for p in wanted
    )
    assert exceeding(wanted, limits_of(everything, [("x", everything)], "alice", ())) == tuple(
        Excess(p, "entitlements:alice") for p in wanted
    )
    assert effective(()) == ()
    assert effective(limits_of(everything, [], "alice", everything)) == ()
    for sides in ((), (Limit.task(everything),)):
        with pytest.raises(ScopeError, match="at least one"):
            exceeding((), sides)


def test_one_side_alone_is_checked_as_well() -> None:
    side = Limit.task((permission("r", "a/../b", "a", "a/**"),))
    assert effective((side,)) == (permission("r", "a/**"),)
    assert exceeding(side.scope, (side,)) == (Excess(permission("r", "a/../b"), "task"),)


@pytest.mark.parametrize(
    ("appended_ms", "ttl_s", "task_end_ms", "expected"),
    [
        (10_000, 60, 1_000_000, 70_000),
        (10_001, 60, 1_000_000, 70_000),
        (10_999, 60, 1_000_000, 70_000),
        (11_000, 60, 1_000_000, 71_000),
        (10_000, 60, 70_000, 70_000),
        (10_000, 60, 69_999, 69_000),
        (10_000, 60, 30_500, 30_000),
        (10_000, 1, 1_000_000, 11_000),
        (10_999, 2, 1_000_000, 12_000),
        (10_000, 60, 11_000, 11_000),
    ],
)
def test_deadline(appended_ms: int, ttl_s: int, task_end_ms: int, expected: int) -> None:
    assert deadline_ms(appended_ms, ttl_s, task_end_ms) == expected


@pytest.mark.parametrize(
    ("appended_ms", "ttl_s", "task_end_ms", "why"),
    [
        (10_001, 1, 1_000_000, "at least 2 s"),
        (10_000, 0, 1_000_000, "at least 2 s"),
        (10_000, -5, 1_000_000, "at least 2 s"),
        (10_000, 60, 10_999, "new task"),
        (10_001, 60, 11_999, "new task"),
        (10_000, 60, 10_000, "new task"),
        (10_000, 60, 5_000, "new task"),
        (10_000, 60, 0, "new task"),
        (1_000_000, 60, 1_000_500, "new task"),
        (10_001, 1, 11_001, "at least 2 s"),
    ],
)
def test_no_deadline_without_a_second_left(appended_ms: int, ttl_s: int, task_end_ms: int, why: str) -> None:
    with pytest.raises(DeadlineError, match=why) as caught:
        deadline_ms(appended_ms, ttl_s, task_end_ms)
    assert caught.value.code == "deadline_too_close"


moments = st.integers(0, 2**53)


@given(moments, st.integers(-10, 100_000), moments)
def test_a_deadline_is_whole_seconds_within_ttl_and_task(
    appended_ms: int, ttl_s: int, task_end_ms: int
) -> None:
    try:
        deadline = deadline_ms(appended_ms, ttl_s, task_end_ms)
    except DeadlineError:
        latest = min(appended_ms + ttl_s * 1000, task_end_ms)
        assert latest // 1000 * 1000 - appended_ms < 1000
        return
    assert deadline % 1000 == 0
    assert appended_ms + 1000 <= deadline <= min(appended_ms + ttl_s * 1000, task_end_ms)
    assert deadline + 1000 > min(appended_ms + ttl_s * 1000, task_end_ms)


@pytest.mark.parametrize(("now_s", "count"), [(1099.999, True), (1100, False), (1101, False)])
def test_entitlements_count_up_to_their_age(now_s: float, count: bool) -> None:
    assert are_in_force(Entitlements(scope=(), source="test", as_of=1000), now_s, 100) is count
