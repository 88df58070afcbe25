"""The first screen, colours and progress, as a terminal gets them."""

from __future__ import annotations

import io
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

import pytest
from rich.style import Style
from rich.text import Text

from ringfence.cli.commands.dev import write_config
from ringfence.cli.main import COMMANDS, main
from ringfence.cli.shared import styles
from ringfence.cli.shared.output import console
from ringfence.cli.shared.tables import Column, ending, list_lines, state
from ringfence.kernel.crypto.keys import SigningKey
from tests.support.terminal import ESCAPES, Terminal

COLOUR = re.compile(r"\x1b\[[0-9;]*m")
PLAIN = {"NO_COLOR", "FORCE_COLOR", "CLICOLOR", "CLICOLOR_FORCE", "COLUMNS", "TERM"}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No settings of whoever runs the tests."""
    for name in list(os.environ):
        if name.startswith("RINGFENCE_") or name in PLAIN:
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.chdir(tmp_path)


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **more}


def in_terminal(code: str, variables: Mapping[str, str] = MappingProxyType({}), *, width: int = 80) -> str:
    """All that a terminal gets from a program."""
    with Terminal([sys.executable, "-c", code], environment(**variables), width=width) as terminal:
        status, seen = terminal.to_the_end()
    assert status == 0, seen
    return seen


# `ringfence` alone.


def test_alone_it_says_where_to_start(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    told = capsys.readouterr()
    assert told.err == ""
    for command in (
        "ringfence demo", "ringfence dev", "ringfence approvals list", "ringfence init", "ringfence doctor",
        "ringfence inventory", "ringfence request", "from ringfence import Agent", "ringfence audit who",
        "ringfence audit trace", "ringfence --help",
    ):  # fmt: skip
        assert command in told.out
    assert max(map(len, told.out.splitlines())) <= 80
    assert len(told.out.splitlines()) <= 22
    assert "Nothing is set up in this folder yet" in told.out
    named = set(re.findall(r"ringfence ([a-z-]+)", told.out)) - {"import", "--help"}
    assert named <= COMMANDS.keys(), "commands that there are"


def test_alone_it_says_who_is_calling_by_which_settings(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "sam.json"
    SigningKey.generate("spiffe://ringfence.local/user/sam").save(file)
    write_config({"RINGFENCE_IDENTITY": "sam.json"}, tmp_path / "ringfence.toml")
    monkeypatch.setenv("RINGFENCE_CONFIG", "ringfence.toml")
    assert main([]) == 0
    told = capsys.readouterr().out
    assert "Settings: ringfence.toml" in told
    assert "You are user sam (sam.json)." in told
    assert file.read_text()[-60:-4] not in told
    monkeypatch.setenv("RINGFENCE_IDENTITY", "nowhere.json")
    assert main([]) == 0
    assert "nowhere.json, which is no key file" in capsys.readouterr().out
    bot = tmp_path / "bot.json"
    SigningKey.generate("spiffe://ringfence.local/agent/bot").save(bot)
    assert main(["--identity", "bot.json"]) == 0
    assert "You are agent bot (bot.json)." in capsys.readouterr().out


def test_alone_it_says_of_settings_that_cannot_be_read(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "ringfence.toml").write_text("broken = [")
    monkeypatch.setenv("RINGFENCE_CONFIG", "ringfence.toml")
    assert main([]) == 0
    assert "cannot be read" in capsys.readouterr().out


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"id": 5}', '{"id": "\\u001b[31m/user/x\\u001b[2J"}', "\xff"]
)
def test_no_key_file_moves_the_cursor(
    content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "k\x1b[31m.json").write_text(content, encoding="latin-1")
    assert main(["--identity", "k\x1b[31m.json"]) == 0
    told = capsys.readouterr().out
    assert "\x1b" not in told
    assert max(map(len, told.splitlines())) <= 80


# Colours.


class _Tty(io.StringIO):
    def __init__(self, tty: bool) -> None:
        super().__init__()
        self._tty = tty

    def isatty(self) -> bool:
        return self._tty


@pytest.mark.parametrize(
    ("tty", "variables", "coloured"),
    [
        (True, {}, True),
        (False, {}, False),
        (True, {"NO_COLOR": "1"}, False),
        (True, {"NO_COLOR": "0"}, False),
        (True, {"NO_COLOR": ""}, True),
        (True, {"TERM": "dumb"}, False),
        (True, {"CLICOLOR": "0"}, False),
        (True, {"CLICOLOR": "1"}, True),
        (False, {"CLICOLOR": "1"}, False),
        (False, {"FORCE_COLOR": "1"}, True),
        (False, {"FORCE_COLOR": "0"}, False),
        (False, {"FORCE_COLOR": ""}, False),
        (False, {"CLICOLOR_FORCE": "1"}, True),
        (True, {"CLICOLOR": "0", "CLICOLOR_FORCE": "1"}, True),
        (True, {"TERM": "dumb", "FORCE_COLOR": "1"}, True),
        (True, {"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colours_depend_on_terminal_and_environment(
    tty: bool, variables: dict[str, str], coloured: bool
) -> None:
    assert styles.colours(_Tty(tty), {"TERM": "xterm", **variables}) is coloured


_PAGE = """
from ringfence.cli.shared.output import note, print_fields, print_table, say
from ringfence.cli.shared.tables import state
from ringfence.cli.main import main
print_table(["agent", state("status")], [["a", "active"], ["b", "suspended"], ["c", "decommissioned"]], empty="")
print_fields({"status": "revoked", "agent": "x"}, title="lease")
say("approved: request x", "approved")
note("warning: of it", "warning")
assert main(["user", "list"]) == 1
"""


@pytest.mark.parametrize(
    "variables",
    [{"NO_COLOR": "1"}, {"NO_COLOR": "yes", "FORCE_COLOR": "1"}, {"TERM": "dumb"}, {"CLICOLOR": "0"}],
)
def test_without_colours_a_terminal_gets_the_same_words(variables: dict[str, str]) -> None:
    coloured, plain = in_terminal(_PAGE), in_terminal(_PAGE, variables)
    assert "\x1b" not in plain
    assert COLOUR.search(coloured)
    assert COLOUR.sub("", coloured) == plain


def test_a_terminal_gets_states_warnings_and_errors_in_colour() -> None:
    seen = in_terminal(_PAGE)
    assert "\x1b[32mactive\x1b[0m" in seen
    assert "\x1b[33msuspended\x1b[0m" in seen
    assert "\x1b[2mdecommissioned\x1b[0m" in seen
    assert "\x1b[31mrevoked\x1b[0m" in seen
    assert "\x1b[32mapproved: request x\x1b[0m" in seen
    assert "\x1b[33mwarning: of it\x1b[0m" in seen
    assert "\x1b[31merror:\x1b[0m nobody said who is calling" in seen


def test_a_pipe_gets_no_colours_unless_they_are_forced() -> None:
    def piped(**more: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", _PAGE], env=environment(**more), capture_output=True, text=True, check=True
        )
        return done.stdout + done.stderr

    assert "\x1b" not in piped()
    assert "\x1b[31merror:\x1b[0m" in piped(FORCE_COLOR="1")
    assert "\x1b[32mactive\x1b[0m" in piped(CLICOLOR_FORCE="1")
    assert "\x1b" not in piped(FORCE_COLOR="1", NO_COLOR="1")


def test_help_has_no_colour_where_none_is_wanted() -> None:
    code = "from ringfence.cli.main import main; main(['lease', '--help'])"
    assert not re.search(r"\x1b\[(\d+;)*(3|4|9|10)\d", in_terminal(code, {"NO_COLOR": "1"}))
    assert not re.search(r"\x1b\[(\d+;)*(3|4|9|10)\d", in_terminal(code, {"CLICOLOR": "0"}))


@pytest.mark.parametrize(
    ("cell", "meaning"),
    [
        ("active", "active"),
        ("active, a key ends in 3 d", "soon"),
        ("suspended (by an operator)", "suspended"),
        ("decommissioned", "ended"),
        ("over", "ended"),
        ("revoked by sam", "denied"),
        ("ok", "ok"),
        ("WRONG", "error"),
        ("?", "warning"),
        ("", ""),
        ("whatever", ""),
        ("inactive", ""),
    ],
)
def test_the_meaning_of_a_state(cell: str, meaning: str) -> None:
    assert styles.state(cell) == meaning


@pytest.mark.parametrize(
    ("cell", "meaning"),
    [
        ("in 45 s", "soon"),
        ("in 1 min 59 s", "soon"),
        ("in 1 min", "soon"),
        ("in 2 min", ""),
        ("in 10 min", ""),
        ("in 1 h", ""),
        ("due", "late"),
        ("overdue for 3 min", "late"),
    ],
)
def test_ending_marks_times_that_are_soon_or_past(cell: str, meaning: str) -> None:
    assert styles.ending(cell) == meaning


def test_every_meaning_has_a_style_that_rich_and_plain_code_know() -> None:
    for meaning, style in styles.STYLES.items():
        Style.parse(style)
        assert styles.painted("x", meaning, _Tty(tty=False)) == "x"
        assert console().get_style(meaning) == Style.parse(style)
    assert set(styles._STATES.values()) <= styles.STYLES.keys()
    assert {word for style in styles.STYLES.values() for word in style.split()} <= styles._CODES.keys()


@pytest.mark.parametrize("width", [None, 40])
def test_a_cell_is_coloured_and_nothing_beside_it(width: int | None) -> None:
    columns: list[str | Column] = ["agent", state("status"), ending("ends")]
    lines = list_lines(columns, [["active" * 5, "active", "in 5 s"]], width=width)
    spans = [(line.plain[span.start : span.end], str(span.style)) for line in lines for span in line.spans]
    assert ("active", "active") in spans
    assert ("in 5 s", "soon") in spans
    assert ("active" * 5, "active") not in spans
    assert all(isinstance(line, Text) for line in lines)


# Progress.

_WORK = """
import sys, time
from ringfence.cli.shared import context
from ringfence.cli.shared.output import note, say
from ringfence.cli.shared.progress import progress
context.remember(None, {as_json})
with progress("reading the trail") as line:
    line.count(1234, 40000)
    time.sleep(0.6)
    note("something else")
    line.say("waiting for \\x1b[31mKafka" + "x" * 200)
    time.sleep(0.6)
say("done")
"""


def test_a_terminal_sees_how_far_long_work_is_and_nothing_stays() -> None:
    seen = in_terminal(_WORK.format(as_json=False))
    assert "reading the trail: 1,234 of 40,000" in seen
    assert "waiting for ‹U+001B›[31mKafkaxxx" in seen
    # What the terminal shows in the end: each line is what stands after its last clearing.
    printed = seen.replace("\r\n", "\n").removesuffix("\n").split("\n")
    lines = [line.rpartition("\r\x1b[K")[2] for line in printed]
    assert [ESCAPES.sub("", line) for line in lines] == ["something else", "done"]
    # No line is wider than the terminal, since a line that is folded cannot be taken away.
    assert all(len(part) < 80 for line in printed for part in line.split("\r\x1b[K"))


@pytest.mark.parametrize("variables", [{"TERM": "dumb"}, {}])
def test_progress_is_hidden_with_json_or_on_a_dumb_terminal(variables: dict[str, str]) -> None:
    seen = in_terminal(_WORK.format(as_json=not variables), variables)
    assert "reading" not in seen
    assert "waiting" not in seen


def test_progress_is_hidden_when_stderr_is_no_terminal(tmp_path: Path) -> None:
    with (tmp_path / "stderr").open("wb") as file:
        code = [sys.executable, "-c", _WORK.format(as_json=False)]
        with Terminal(code, environment(FORCE_COLOR="1"), stderr=file.fileno()) as terminal:
            status, seen = terminal.to_the_end()
    assert (status, "reading" in seen) == (0, False)
    assert "reading" not in (tmp_path / "stderr").read_text()


def test_doctor_says_what_it_waits_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        code = "from ringfence.cli.main import main; main(['doctor'])"
        nowhere = {"RINGFENCE_KAFKA": "127.0.0.1:9", "RINGFENCE_REGISTRY_URL": url}
        seen = in_terminal(code, nowhere, width=120)
    assert f"waiting for the registry at {url}: " in seen
    assert "WRONG" in ESCAPES.sub("", seen.rpartition("\r\x1b[K")[2])
