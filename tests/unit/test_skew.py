"""A clock that is off says so; a network that is slow is not a clock that is off."""

from __future__ import annotations

import pytest

from ringfence.kernel.base.clock import MAX_SKEW_MS, SkewCheck

NOW = 1_800_000_000_000


def check(*ahead_ms: int) -> SkewCheck:
    skew = SkewCheck("the broker")
    for ahead in ahead_ms:
        skew.observe(NOW, NOW + ahead)
    return skew


def test_clock_without_a_sample_is_ready():
    assert check().unready() is None


@pytest.mark.parametrize("ahead_ms", [MAX_SKEW_MS, -MAX_SKEW_MS, 0])
def test_within_the_bound(ahead_ms: int):
    assert check(ahead_ms).unready() is None


@pytest.mark.parametrize(("ahead_ms", "said"), [(7000, "7.0 s ahead of"), (-1001, "1.0 s behind")])
def test_beyond_it_says_which_way_and_how_far(ahead_ms: int, said: str):
    reason = check(ahead_ms).unready()
    assert reason is not None
    assert said in reason
    assert "the broker" in reason


@pytest.mark.parametrize(
    ("ahead_ms", "behind"), [(7000, False), (-1001, True), (-MAX_SKEW_MS, False), (0, False)]
)
def test_only_a_clock_that_is_behind_is_behind(ahead_ms: int, behind: bool):
    assert (check(ahead_ms).behind() is not None) == behind


def test_delayed_message_is_no_clock_skew():
    assert check(5000, 20, 9000).unready() is None


def test_a_clock_that_was_set_right_is_right_again():
    assert check(*[-8000] * 10, *[5] * 10).unready() is None


@pytest.mark.parametrize("ahead_ms", [-9000, 0, 500, 9000])
def test_past_of_the_other_clock_is_independent_of_our_skew(ahead_ms: int):
    past_ms = check(ahead_ms, ahead_ms + 40).past_ms(NOW + ahead_ms)
    assert past_ms is not None
    assert past_ms <= NOW - MAX_SKEW_MS


def test_clock_without_a_sample_has_no_past():
    assert SkewCheck("the broker").past_ms(NOW) is None
