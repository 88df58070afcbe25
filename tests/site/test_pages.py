"""Every command of every page runs somewhere, or the page says why it cannot."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.site import page_commands
from tests.site.dev_folder import inherited
from tests.site.dev_stack import linked_clone
from tests.site.page_commands import ROOT, SHELLS, Block, blocks_of, page_mark, run_page, shown_of
from tests.site.stories import GROUPS

OTHERS = ["docs/operators/README.md", "docs/tracing.md", "docs/benchmarks.md"]
"""Pages whose commands run in this file; those of `stories.py` run in test_dev_pages.py."""
RUN_HERE = {*OTHERS, *(page for pages in GROUPS.values() for page in pages)}
COMPARE = {"tests/mcp_sdks/test_page.py", "tests/integration/test_examples.py"}
"""Tests that compare the output on their pages themselves. All others do so by `run_page`."""
ALL = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"), *ROOT.glob("*.md")])


@pytest.mark.timeout(600)
def test_an_installation_from_nothing(tmp_path: Path, kafka: Kafka, redis_server: RedisServer) -> None:
    """The page for operators, in an empty folder, with the broker and the Redis of this run."""
    environment = inherited() | {
        "RINGFENCE_TOPIC_PREFIX": "installation",
        "RINGFENCE_REDIS_PREFIX": "installation",
        "RINGFENCE_EMBEDDED_BROKER": str(kafka.embedded).lower(),
    }
    replaced = {"127.0.0.1:9092": kafka.bootstrap, "redis://127.0.0.1:6379/0": redis_server.url}
    run_page(ROOT / "docs/operators/README.md", tmp_path, environment, replaced)


def runs_it(path: str, page: Path, blocks: list[Block]) -> None:
    """A file that is said to run these blocks of a page does so, as far as can be seen from here."""
    text = (ROOT / path).read_text()
    if path != ".ci/run":
        assert page.stem in text, f"{path} does not name {page.name}"
        return
    for command in (line for block in blocks for line in block.commands()):
        words = command.partition("#")[0].split()
        assert words[0] == "make", f"{command}: the gate runs targets of make"
        stage = re.compile(
            rf"^.*\b(?:(?:suite|foreign) \w+ +\"[^\"]+\" +|make (?:\S+ )*){re.escape(words[1])}\b",
            re.MULTILINE,
        )
        assert stage.search(text), f"{command}: the gate has no such stage"


@pytest.mark.timeout(600)
def test_a_benchmark() -> None:
    run_page(ROOT / "docs/benchmarks.md", ROOT, os.environ)


@pytest.mark.timeout(600)
def test_the_traces_of_the_demo(tmp_path: Path) -> None:
    """Spans are shown once no more came for a while, which may be after the demo has ended."""
    shown = "until grep -q 'process credential.request' traces.txt; do sleep 0.2; done; cat traces.txt"
    run_page(
        ROOT / "docs/tracing.md", linked_clone(tmp_path / "clone"), inherited(), {"cat traces.txt": shown}
    )


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_runs_or_the_page_says_why_not(page: Path) -> None:
    commands = [one for one in blocks_of(page) if one.language in SHELLS and one.not_run is None]
    for one in commands:
        if one.run_by is not None:
            runs_it(one.run_by, page, [one])
    blocks = [one for one in commands if one.run_by is None]
    assert all(one.commands() for one in blocks), "a block without a command for a user runs nowhere"
    mark = page_mark(page)
    if str(page.relative_to(ROOT)) in RUN_HERE or not blocks:
        assert mark is None, "its commands run, or it has none"
        return
    assert mark is not None, (
        f"{len(blocks)} blocks without a test and without a reason, the first at line {blocks[0].line}"
    )
    kind, _, rest = mark.partition(" ")
    if kind == "run":
        for path in rest.removeprefix("by ").split(", "):
            runs_it(path, page, blocks)
    else:
        assert mark.startswith("not run: "), mark
        assert len(mark.split()) > 4, "say why"


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_output_is_compared_or_the_page_says_why_not(page: Path) -> None:
    blocks = list(blocks_of(page))
    mark = page_mark(page) or ""
    on_the_page = str(page.relative_to(ROOT)) in RUN_HERE or compares(mark.removeprefix("run by "))
    shown = [one.block for one in shown_of(blocks)]
    elsewhere = [one for one in blocks if one.run_by is not None and any(lines for _, lines in one.steps())]
    for block in [*shown, *elsewhere]:
        compared = on_the_page if block.run_by is None else compares(block.run_by)
        assert compared or block.not_printed, f"no test compares the output at line {block.line}: say why"
    for block in blocks:
        if block.not_printed is not None:
            assert block in shown or block in elsewhere, f"line {block.line} shows no output of a command"
            assert len(block.not_printed.split()) > 3, f"line {block.line}: say why"


def compares(paths: str) -> bool:
    """Whether one of these files compares the output that its page shows."""
    files = [path for path in paths.split(", ") if path.endswith(".py")]
    return any(path in COMPARE or "run_page(" in (ROOT / path).read_text() for path in files)


def test_a_page_that_says_nothing_would_be_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text("# It is\n\n```console\n$ true\n$ false\n```\n")
    monkeypatch.setattr(page_commands, "ROOT", tmp_path)
    assert page_mark(page) is None
    assert [one.commands() for one in blocks_of(page)] == [["true", "false"]]
    with pytest.raises(AssertionError, match="exit 1: false"):
        run_page(page, tmp_path, {})
    page.write_text("<!-- not run: it would end the world -->\n\n```console\n$ false\n```\n")
    assert [one.not_run for one in blocks_of(page)] == ["it would end the world"]
