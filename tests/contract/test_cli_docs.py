"""`docs/cli.md` says what the commands say, and the README uses commands and options that there are."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import chain, takewhile
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.main import COMMANDS, load
from tools.cli_reference import reference

ROOT = Path(__file__).parents[2]
PAGES = sorted([
    *ROOT.glob("*.md"),
    *(page for folder in ("docs", "docs/targets", "docs/how-to") for page in (ROOT / folder).glob("*.md")),
    *ROOT.glob("examples/*/README.md"),
])  # fmt: skip


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs/cli.md").read_text() == reference(), (
        "docs/cli.md differs from the commands: python -m tools.cli_reference docs/cli.md"
    )


def commands_in(page: Path) -> list[str]:
    """The command lines in the code blocks of a page."""
    blocks = re.findall(
        r"^```(?:console|sh|bash|shell)?\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL
    )
    lines = [
        line.strip().removeprefix("$ ")
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return [line for line in lines if re.match(r"(\.venv/bin/)?ringfence ", line)]


@pytest.mark.parametrize("page", PAGES, ids=[str(page.relative_to(ROOT)) for page in PAGES])
def test_pages_use_commands_and_options_that_exist(page: Path) -> None:
    for line in commands_in(page):
        words: Iterator[str] = iter(
            shlex.split(line.split(" #")[0].split(" &")[0].split(" |")[0].split(" >")[0])[1:]
        )
        before: list[str] = []
        for word in words:
            if word == "--identity":
                next(words)
            elif word not in ("--json", "--help"):
                before.append(word)
                break
        if not before:
            continue
        name = before[0]
        assert name in COMMANDS, line
        command: Any = load(name, COMMANDS[name])
        if getattr(command, "commands", None):
            word = next(words, "--help")
            if word == "--help":
                continue
            if word.startswith("-") and command.invoke_without_command:
                words = chain([word], words)  # a group that does something itself: `ringfence run`
            else:
                assert word in command.commands, line
                command = command.commands[word]
        known = {opt for param in command.params for opt in [*param.opts, *param.secondary_opts]} | {"--help"}
        own = takewhile(lambda word: word != "--", words)  # after it stands another program's
        assert {word for word in own if word.startswith("--")} <= known, line


def test_readme_lists_no_existing_command_as_missing() -> None:
    readme = (ROOT / "README.md").read_text()
    [absent] = re.findall(r"^\| not there \| (.+) \|$", readme[readme.index("## Status") :], re.MULTILINE)
    assert not set(re.findall(r"`ringfence (\w+)`", absent)) & set(COMMANDS)
