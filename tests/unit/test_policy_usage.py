"""What an agent used, by the day: held against plain sets of days."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from ringfence.messages.base import Permission
from ringfence.policy.agents.usage import (
    DAY_S,
    MAX_SHOWN,
    MAX_VERBS,
    WINDOW_DAYS,
    Usage,
    Used,
    narrower,
    summary,
    verbs_of,
)

TODAY = 20_000
NOW_S = TODAY * DAY_S + 4711
READ, DEPLOY, ELSEWHERE = ("platform", "read"), ("platform", "deploy"), ("shop", "read")
verbs = st.sampled_from([READ, DEPLOY, ELSEWHERE])
days = st.integers(TODAY - 70, TODAY + 40)


@given(st.lists(st.tuples(verbs, days)), st.integers(TODAY - 40, TODAY + 40))
def test_usage_equals_plain_sets_of_days(uses: list[tuple[tuple[str, str], int]], today: int):
    usage = Usage()
    for verb, day in uses:
        usage.add([verb], day)
    found = {(one.target, one.verb): one for one in usage.within(today * DAY_S)}
    for verb in (READ, DEPLOY, ELSEWHERE):
        used_on = {day for used, day in uses if used == verb}
        # What lies further back than a window from the last use is gone, whoever asks.
        kept = {day for day in used_on if day > max(used_on) - WINDOW_DAYS}
        shown = {day for day in kept if today - WINDOW_DAYS < day <= today}
        if not shown:
            assert verb not in found
            continue
        one = found[verb]
        assert (one.first_s, one.last_s) == (min(shown) * DAY_S, max(shown) * DAY_S)
        assert one.days == len(shown)


@given(st.lists(st.tuples(verbs, days)), st.randoms())
def test_neither_order_nor_repetition_matters(uses: list[tuple[tuple[str, str], int]], random: object):
    once, again = Usage(), Usage()
    for verb, day in uses:
        once.add([verb], day)
    shuffled = uses * 2
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    for verb, day in shuffled:
        again.add([verb], day)
    assert list(sorted_of(once)) == list(sorted_of(again))
    for verb, day in uses:
        assert once.knows([verb], day)


def sorted_of(usage: Usage) -> list[Used]:
    return sorted(usage.within(NOW_S), key=lambda one: (one.target, one.verb))


def test_unknown_days_of_use_are_reported_as_unknown():
    usage = Usage()
    usage.add([READ], TODAY)
    assert usage.knows([READ], TODAY)
    assert not usage.knows([READ], TODAY - 1)
    assert not usage.knows([READ], TODAY + 1)
    assert not usage.knows([READ, DEPLOY], TODAY)
    assert usage.knows([READ], TODAY - WINDOW_DAYS)  # out of every window from now on


def test_use_outside_the_window_is_forgotten():
    usage = Usage()
    usage.add([READ], TODAY)
    usage.add([DEPLOY], TODAY - 5)
    usage.forget(TODAY + WINDOW_DAYS - 3)
    assert [one.verb for one in usage.within(NOW_S)] == ["read"]
    usage.forget(TODAY + WINDOW_DAYS)
    assert not usage


def test_no_agent_takes_more_memory_than_that():
    usage = Usage()
    usage.add([READ], TODAY)
    for number in range(MAX_VERBS):
        usage.add([("platform", f"v{number}")], TODAY - 1)
    found = {one.verb for one in usage.within(NOW_S)}
    assert len(found) == MAX_VERBS
    assert "read" in found


def allow(target: str, *granted: str) -> Permission:
    return Permission(target=target, verbs=granted, resources=("**",))


def used(target: str, verb: str, ago: int = 0) -> Used:
    day_s = (TODAY - ago) * DAY_S
    return Used(target, verb, day_s, day_s, 1)


def test_a_summary():
    ceiling = (allow("platform", "read", "deploy"), allow("shop", "read"))
    found = summary([used("platform", "read", 3), used("gone", "drop")], ceiling, "platform", NOW_S)
    assert found == {
        "since_s": (TODAY - 29) * DAY_S,
        "used": {
            "platform": {"read": {"first_s": (TODAY - 3) * DAY_S, "last_s": (TODAY - 3) * DAY_S, "days": 1}},
            "gone": {"drop": {"first_s": TODAY * DAY_S, "last_s": TODAY * DAY_S, "days": 1}},
        },
        "never_used": {"platform": ["deploy"], "shop": ["read"]},
        "granted": 3,
        "unused": 2,
    }


def test_a_summary_is_small_and_has_what_is_asked_about():
    many = [used(f"t{number}", "read") for number in range(100)]
    asked = used("platform", "read", 29)
    ceiling = [allow(f"u{number}", "read") for number in range(100)]
    found = summary([*many, asked], [*ceiling, allow("platform", "deploy")], "platform", NOW_S)
    assert len(found["used"]) == len(found["never_used"]) == MAX_SHOWN
    assert "read" in found["used"]["platform"]
    assert found["never_used"]["platform"] == ["deploy"]
    assert (found["granted"], found["unused"]) == (101, 101)


def test_a_narrower_ceiling_has_what_was_used_and_no_more():
    ceiling = (allow("platform", "read", "deploy"), allow("shop", "read"))
    kept = {READ, ("gone", "drop")}
    narrowed = narrower(ceiling, kept)
    assert narrowed == (allow("platform", "read"),)
    assert verbs_of(narrowed) <= verbs_of(ceiling) & kept
    assert narrower(ceiling, set()) == ()
    assert narrower(ceiling, verbs_of(ceiling)) == ceiling
