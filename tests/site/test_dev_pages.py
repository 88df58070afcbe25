"""Pages whose commands run on `ringfence dev`, in order, on a stack that several pages share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.site.dev_stack import DevStack, dev_stack
from tests.site.page_commands import ROOT
from tests.site.stories import GROUPS, Story

_PAGES = [(group, page, story) for group, pages in GROUPS.items() for page, story in pages.items()]


@pytest.fixture(scope="module")
def stack(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevStack]:
    with dev_stack(tmp_path_factory.mktemp("dev")) as running:
        yield running


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("stack", "page", "story"),
    _PAGES,
    indirect=["stack"],
    ids=[page for _, page, _ in _PAGES],
    scope="module",
)
def test_the_commands_of_the_page(stack: DevStack, page: str, story: Story) -> None:
    stack.read(ROOT / page, story)
