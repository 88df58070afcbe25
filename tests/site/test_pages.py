"""Every command of every page runs somewhere, or the page says why it cannot."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.site.dev_folder import inherited
from tests.site.dev_stack import linked_clone
from tests.site.page_commands import ROOT, SHELLS, Block, blocks_of, page_mark, run_page, script_of
from tests.site.stories import GROUPS

OTHERS = ["docs/operators/README.md", "docs/tracing.md", "docs/benchmarks.md"]
"""Pages whose commands run in this file; those of `stories.py` run in test_dev_pages.py."""
RUN_HERE = {*OTHERS, *(page for pages in GROUPS.values() for page in pages)}
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
            rf"^.*\b(?:suite \w+ +\"[^\"]+\" +|make (?:\S+ )*){re.escape(words[1])}\b", re.MULTILINE
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


def test_a_page_that_says_nothing_would_be_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("# It is\n\n```console\n$ true\n$ false\n```\n")
    assert page_mark(page) is None
    assert [one.commands() for one in blocks_of(page)] == [["true", "false"]]
    done = subprocess.run(["bash", "-c", script_of(page)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "exit 1: false" in done.stderr
    page.write_text("<!-- not run: it would end the world -->\n\n```console\n$ false\n```\n")
    assert [one.not_run for one in blocks_of(page)] == ["it would end the world"]
