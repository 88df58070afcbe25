"""Pages that begin on a fresh `ringfence dev`: every command runs, in order."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.site.dev_folder import dev_running, inherited
from tests.site.page_commands import ROOT, SHELLS, Block, blocks_of, page_mark, run_page, script_of
from tests.site.stories import STORIES, Story

PAGES = ["agents/README.md", "sponsors/README.md", "security/README.md", *STORIES]
OTHERS = ["operators/README.md"]
"""Pages whose commands run elsewhere in this file."""
ALL = sorted([*(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md"), *ROOT.glob("*.md")])


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder in which `ringfence dev` runs, as after `make dev` in a clone."""
    with dev_running(tmp_path) as folder:
        yield folder


@pytest.mark.timeout(600)
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_the_page(folder: Path, page: str) -> None:
    story = STORIES.get(page, Story())
    before = f"source .ringfence/dev.sh\n{story.before}" if page in STORIES else ""
    run_page(ROOT / "docs" / page, folder, inherited(), story.replaced, before)


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


@pytest.mark.parametrize("page", ALL, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_command_runs_or_the_page_says_why_not(page: Path) -> None:
    commands = [one for one in blocks_of(page) if one.language in SHELLS and one.not_run is None]
    for one in commands:
        if one.run_by is not None:
            runs_it(one.run_by, page, [one])
    blocks = [one for one in commands if one.run_by is None]
    assert all(one.commands() for one in blocks), "a block without a command for a user runs nowhere"
    mark = page_mark(page)
    runs_here = page.is_relative_to(ROOT / "docs") and str(page.relative_to(ROOT / "docs")) in [
        *PAGES,
        *OTHERS,
    ]
    if runs_here or not blocks:
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
