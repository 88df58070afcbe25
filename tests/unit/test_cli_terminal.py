"""Lists on a real terminal: nothing decisive is missing, no name is cut without a mark, no line is too long."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest
from rich.cells import cell_len

from ringfence.cli.shared.output import print_fields
from ringfence.cli.shared.tables import Column, ids, list_lines, prose, short_ids, wrapped
from tests.support.terminal_lists import COMMANDS, IDS, WIDTHS

_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture(scope="module")
def screens() -> dict[str, list[str]]:
    """The lines that a terminal got, by width and command."""
    ours, theirs = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    program = subprocess.Popen(
        [sys.executable, "-m", "tests.support.terminal_lists"],
        stdin=theirs, stdout=theirs, stderr=subprocess.STDOUT, env={**environment, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    told = b""
    while True:
        try:
            part = os.read(ours, 65_536)
        except OSError:  # the program has ended, and closed the terminal
            break
        if not part:
            break
        told += part
    os.close(ours)
    assert program.wait() == 0, told.decode()
    _, *parts = _ESCAPES.sub("", told.decode()).replace("\r", "").split("## ")
    return {part.partition("\n")[0]: part.partition("\n")[2].splitlines() for part in parts}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_list_fits_the_terminal_and_has_all_that_decides(
    width: int, command: str, screens: dict[str, list[str]]
) -> None:
    lines = [
        line for line in screens[f"{width} {command}"] if not line.startswith("counting")
    ]  # a progress bar
    assert [line for line in lines if cell_len(line) > width] == []
    # A marked line goes on in the next one; a text goes on after a space.
    whole = " ".join("\n".join(line.lstrip(" │") for line in lines).replace("\\\n", "").split())
    for word in COMMANDS[command]:
        assert word in whole, lines


@pytest.mark.parametrize("command", COMMANDS)
def test_wide_lists_have_whole_ids(command: str, screens: dict[str, list[str]]) -> None:
    told = "\n".join(screens[f"80 {command} --wide"])
    # No id is shown that is shorter than a whole one.
    assert re.findall(r"\b(?:3f2a9c1d|7{8})(?!-[0-9a-f-]{27})", told) == []
    assert "inventory" in command or any(id in told for id in IDS)


def test_ids_that_begin_alike_are_told_apart() -> None:
    alike = ["77777777-1111", "77777777-2222", "3f2a9c1d-1111"]
    assert short_ids(alike) == {
        "77777777-1111": "77777777-1", "77777777-2222": "77777777-2", "3f2a9c1d-1111": "3f2a9c1d",
    }  # fmt: skip
    assert short_ids(["abcdefgh", "abcdefgh-more"]) == {"abcdefgh": "abcdefgh", "abcdefgh-more": "abcdefgh-"}


@pytest.mark.parametrize(
    "text", ["a" * 100, "two words", "字" * 50, "x " + "y" * 70 + " z", "", "  indented"]
)
def test_wrapped_text_is_all_there_and_marked_where_a_word_is_broken(text: str) -> None:
    lines = wrapped(text, 20)
    assert all(cell_len(line) <= 20 for line in lines)
    whole = "".join(line.removesuffix("\\") if line.endswith("\\") else f"{line} " for line in lines)
    assert whole.split() == text.split()


def test_hostile_cell_text_cannot_imitate_another_field() -> None:
    columns: list[str | Column] = ["agent", prose("reason"), "ends"]
    hostile = "fine\n  ends     never\n" + "x" * 200 + "   ends never"
    lines = [line.plain for line in list_lines(columns, [["b" * 60, hostile, "in 4 min"]], width=80)]
    ends = [line for line in lines if re.match(r" {0,2}ends", line)]
    assert len(ends) == 1
    assert "in 4 min" in ends[0]


def test_only_the_first_field_of_a_block_stands_at_the_margin() -> None:
    rows = [
        ("agent-1", "reads what is deployed", "platform:read:env/**", "a\nb"),
        ("agent-2", "", "x" * 30, ""),
    ]
    lines = list_lines(["agent", prose("for"), "ceiling", "more"], rows, width=34)
    at_margin = [line.plain for line in lines if line.plain and not line.plain.startswith(" ")]
    assert at_margin == ["agent agent-1", "agent agent-2"]
    assert "  ceiling  platform:read:env/**" in [line.plain for line in lines]


def test_a_title_is_not_cut_where_a_panel_has_no_room(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ringfence.cli.shared.output._PIPE_WIDTH", 80)
    title = f"agent {'long-' * 12}bot, revision 12"
    print_fields({"status": "active"}, title=title)
    print_fields({"status": "active"}, title="agent bot, revision 12")
    said = capsys.readouterr().out
    assert title in " ".join(said.split())
    assert "─ agent bot, revision 12 ─" in said
    assert max(map(cell_len, said.splitlines())) <= 80


def test_columns_of_names_are_never_folded_in_a_table() -> None:
    columns: list[str | Column] = [ids("lease"), "agent", prose("reason")]
    row = [IDS[0], "deploy-bot", "because " * 12]
    table = [line.plain for line in list_lines(columns, [row], width=80)]
    assert table[0].split() == ["lease", "agent", "reason"]
    blocks = [line.plain for line in list_lines(columns, [[*row[:1], "b" * 60, row[2]]], width=80)]
    assert blocks[0] == f"lease {IDS[0][:8]}"
    assert f"  agent   {'b' * 60}" in blocks[1]
