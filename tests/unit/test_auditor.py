"""What `audit verify` works out by itself."""

from __future__ import annotations

import random

import pytest

from ringfence.client.reports.auditor import offset_gaps


@pytest.mark.parametrize(
    ("told", "begin", "until", "missing"),
    [
        ((), 0, 0, []),
        ((), 3, 6, [(3, 5)]),
        ((3, 4, 5), 3, 6, []),
        ((4,), 3, 6, [(3, 3), (5, 5)]),
        ((0, 1, 9), 3, 6, [(3, 5)]),  # what is told of besides
        ((), 6, 3, []),
    ],
)
def test_holes_are_runs_of_what_is_not_told(
    told: tuple[int, ...], begin: int, until: int, missing: list[tuple[int, int]]
) -> None:
    assert list(offset_gaps(told, begin, until)) == missing


def test_holes_are_what_is_left() -> None:
    chance = random.Random(1)
    for _ in range(200):
        told, begin, until = (
            {chance.randrange(40) for _ in range(20)},
            chance.randrange(20),
            chance.randrange(40),
        )
        found = [n for first, last in offset_gaps(told, begin, until) for n in range(first, last + 1)]
        assert found == [n for n in range(begin, until) if n not in told]


def test_a_long_hole_is_one_thing() -> None:
    assert list(offset_gaps((), 0, 10**15)) == [(0, 10**15 - 1)]
