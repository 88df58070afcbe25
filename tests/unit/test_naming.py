"""Ids as people write them."""

from __future__ import annotations

import pytest

from ringfence.client.arguments import find_by_prefix

IDS = ["ce60feae-3234", "ce60feae-9999", "5d35cb05-b1f2"]


@pytest.mark.parametrize(
    ("written", "found"),
    [
        ("ce60feae-3234", "ce60feae-3234"),
        ("ce60feae-3", "ce60feae-3234"),
        ("5d35", "5d35cb05-b1f2"),
        ("ce60", None),  # two begin so
        ("5d3", None),  # too short to mean it
        ("zzzz", None),
    ],
)
def test_an_id_or_how_it_begins_names_one_thing(written: str, found: str | None) -> None:
    assert find_by_prefix(written, IDS, str) == found


def test_empty_prefix_names_no_id() -> None:
    assert find_by_prefix("", IDS[:1], str) is None
