"""What counts as the output that a page shows, and what does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.site import page_commands
from tests.site.page_commands import run_page
from tests.site.shown_output import differs

PRINTED = """\
2 requests
╭─ request 8adcc28b-751a-5a14-991d-963798c1ba27 ─────╮
│ agent         deploy-bot                           │
│ answer until  2026-11-29 23:15:11Z (in 59 min 4 s) │
╰────────────────────────────────────────────────────╯
revision 8e4c0f99a1b2c3d48e4c0f99a1b2c3d4
"""


@pytest.mark.parametrize(
    "shown",
    [
        PRINTED,
        "2 requests\n",
        "╭─ request 00000000-751a-5a14-991d-963798c1ba27 ───╮\n│ agent  deploy-bot │\n",
        "│ answer until  2025-01-01 00:00:00Z (in 2 h) │\n",
        "2 requests\n…\nrevision 0a0a...\n",
        "2 …\n",
        "revision …\n",
    ],
)
def test_an_excerpt_is_as_printed(shown: str) -> None:
    assert differs(shown, ["another\n", PRINTED]) is None


@pytest.mark.parametrize(
    ("shown", "line"),
    [
        ("3 requests\n", "3 requests"),
        ("requests\n", "requests"),
        ("2 requests\nrevision …\n", "revision …"),
        ("2 requests\n\n", None),
        ("│ agent  merger │\n", "│ agent  merger │"),
        ("│ agent │\n", "│ agent │"),
        ("request someone\n", "request someone"),
        ("revision latest\n", "revision latest"),
    ],
)
def test_the_first_line_that_no_command_printed_is_named(shown: str, line: str | None) -> None:
    assert differs(shown, ["another\n", PRINTED]) == line


def test_json_is_compared_without_white_space() -> None:
    printed = '{\n  "allow": false,\n  "at": 1795632219\n}\n'
    assert differs('{"allow": false, "at": 1790000000}\n', [printed], json=True) is None
    assert differs('{"allow": false, …}\n', [printed], json=True) is None
    assert differs('{"allow": true,\n "at": 1}\n', [printed], json=True) == '{"allow": true,'


def page(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(page_commands, "ROOT", folder)
    written = folder / "page.md"
    written.write_text(text)
    return written


@pytest.mark.parametrize(
    "text",
    [
        "```console\n$ echo one; echo two >&2\none\ntwo\n$ echo three\nthree\n```\n",
        "```console\n$ echo one\n$ true\none\n```\n",
        "```console\n$ echo one\n```\n\nIt says\n\n```\none\n```\n",
        "```console\n$ # look at it\n$ echo one\none\n```\n",
        "```console\n$ sleep 0.1 && echo late &\nlate\n$ wait $!\n```\n",
        "<!-- not printed: each run has other numbers -->\n\n```console\n$ echo one\ntwo\n```\n",
        "```console\n$ echo one\n```\n\n<!-- not printed: it is a file -->\n\n```json\n{}\n```\n",
        "```console\n$ echo one\n```\n\n## Another section\n\n```\ntwo\n```\n",
    ],
)
def test_a_page_that_shows_what_is_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    run_page(page(tmp_path, text, monkeypatch), tmp_path, {})


@pytest.mark.parametrize(
    "text",
    [
        "```console\n$ echo one\ntwo\n```\n",
        "```console\n$ echo one\n$ echo two\none\ntwo\n```\n",
        "```console\n$ echo two\n$ echo one\none\n$ true\ntwo\n```\n",
        "```console\n$ echo one\n```\n\n```text\ntwo\n```\n",
        '```console\n$ echo \'{"a": 1}\'\n```\n\n```json\n{"two": 2}\n```\n',
    ],
)
def test_a_page_that_shows_something_else_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    with pytest.raises(AssertionError, match=r"printed this line there:\n.*two"):
        run_page(page(tmp_path, text, monkeypatch), tmp_path, {})
