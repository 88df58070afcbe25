"""Output: tables and sentences for people, JSON for programs.

Much of it was written by agents and strangers, and people decide by what they see. So no control character reaches the
terminal, nothing is read as markup, and look-alike characters are made visible. Only `Lines` have several lines.

Output paths of commands: the callbacks that mark options and arguments as such, and the one writer.

Each option or argument that names a file or folder to write has one of the three callbacks. They check the path before
the command does anything; the writers of `private_files` check it again.
"""

from __future__ import annotations

import json
import re
import stat
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import orjson
from rich.cells import cell_len
from rich.console import Console, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.theme import Theme

from ringfence.cli.shared import styles
from ringfence.cli.shared.progress import hidden
from ringfence.cli.shared.tables import Column, list_lines, wrapped
from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.private_files import OutputFileError, check_output, write_private, write_public
from ringfence.kernel.base.text import shown, span, visible, visible_lines, visible_name, visible_resource


def is_stdout(path: Path) -> bool:
    return str(path) in ("-", "/dev/stdout")


def output_file(path: Path | None) -> Path | None:
    """Callback of an output file that may be stdout (`-`). Raises OutputFileError."""
    return path if path is None or is_stdout(path) else kept_file(path)


def kept_file(path: Path | None) -> Path | None:
    """Callback of an output file that Ringfence reads again, such as a key: never stdout. Raises OutputFileError."""
    if path is not None:
        if is_stdout(path):
            raise OutputFileError(f"{path} is stdout, and this must be a file: name one")
        check_output(path)
    return path


def output_folder(path: Path | None) -> Path | None:
    """Callback of an output folder. Raises OutputFileError if it is a symbolic link or no folder."""
    if path is not None and (path.is_symlink() or path.exists()) and not stat.S_ISDIR(path.lstat().st_mode):
        kind = "a symbolic link, which is not followed" if path.is_symlink() else "no folder"
        raise OutputFileError(f"{path} is {kind}: name the folder itself")
    return path


def write_output(path: Path, content: str | bytes, *, public: bool = False) -> None:
    """Write a whole output file, or to stdout. `public`: with the mode that the umask gives.

    Raises OSError, OutputFileError.
    """
    if is_stdout(path):
        sys.stdout.flush()
        sys.stdout.buffer.write(content.encode() if isinstance(content, str) else content)
        sys.stdout.buffer.flush()
    elif public:
        write_public(path, content)
    else:
        write_private(path, content)


__all__ = [
    "console", "escaped_json", "line_width", "moment", "note", "print_fields", "print_json", "print_json_line",
    "print_table", "say", "span", "until", "visible", "visible_lines", "visible_name", "visible_resource",
]  # fmt: skip
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
_NOT_PLAIN = re.compile(r"[^\x20-\x7e\n]")
_ESCAPED = frozenset({"Cc", "Cf", "Zl", "Zp"})
"""Unicode categories that act on a terminal or on programs that split lines: controls, format characters (direction
marks, zero width, tags), and line separators.
"""
_PIPE_WIDTH = 200
"""Columns if stdout is no terminal: lines that programs split should not be folded."""
_AROUND_A_TITLE = 6
"""Cells of a panel beside its title: two corners, two lines and two spaces."""
_AROUND_A_VALUE = 6
"""Columns that a frame and the space beside a title take."""
_FIELD_STYLES: Mapping[str, Callable[[str], str]] = {
    "status": styles.state,
    "compared": lambda value: "warning" if "UNUSUAL" in value else "",
    "overdue": lambda value: "late",
    "BREAK GLASS": lambda value: "error",
}
"""The meaning of a value, by the name of the field."""
_NARROWEST = 80
"""The least columns. On a narrower terminal the terminal folds the lines; a table would drop what does not fit."""


def console(*, stderr: bool = False, markup: bool = False) -> Console:
    """Return a console for people. No markup, no emoji, no automatic colours for values.

    Styles are the meanings of `styles.STYLES`. `markup`: for text of ours alone.
    """
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    coloured, terminal = styles.colours(stream), styles.is_terminal(stream)
    console = Console(
        stderr=stderr,
        width=width,
        markup=markup,
        emoji=False,
        highlight=False,
        theme=Theme(dict(styles.STYLES)),
        force_terminal=terminal or coloured,
        color_system=("auto" if terminal else "standard") if coloured else None,
        no_color=False,  # decided above
    )
    console.width = max(console.width, _NARROWEST)
    return console


def print_json(document: Any) -> None:
    _write(_json_of(document, orjson.OPT_INDENT_2))


def print_json_line(document: Any) -> None:
    """Print one JSON object on its own line at once, for output without an end."""
    _write(_json_of(document, 0))
    sys.stdout.flush()


def escaped_json(text: str) -> str:
    """Return equivalent JSON in which characters that move the cursor or are invisible are written as Unicode escapes.

    Lines in the text end with a line feed alone.
    """
    return _NOT_PLAIN.sub(
        lambda match: json.dumps(match[0])[1:-1] if unicodedata.category(match[0]) in _ESCAPED else match[0],
        text,
    )


def _write(text: str) -> None:
    """Write JSON as UTF-8 (RFC 8259 8.1).

    On a stdout with another encoding it is escaped so that every reader can read it.
    """
    text = escaped_json(text)
    if (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8":
        text = _NOT_ASCII.sub(lambda match: json.dumps(match[0])[1:-1], text)
    sys.stdout.write(text + "\n")


def _json_of(document: Any, option: int) -> str:
    try:
        return orjson.dumps(document, option=option, default=_plain).decode()
    except TypeError:
        # File names and the environment can have bytes that are not UTF-8, which Python represents as lone surrogates.
        indent = 2 if option & orjson.OPT_INDENT_2 else None
        return json.dumps(document, indent=indent, default=_plain)


def _plain(value: Any) -> Any:
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json", exclude_none=True)
    raise TypeError(f"not JSON: {type(value).__name__}")


def say(text: str, style: str = "") -> None:
    """Print a sentence, or `Lines`, for people on stdout."""
    with hidden():
        console().print(Text(shown(text), style=style), soft_wrap=True)


def note(text: str, style: str = "") -> None:
    """Print a sentence, or `Lines`, for people on stderr: it is not part of the result."""
    with hidden():
        console(stderr=True).print(Text(shown(text), style=style), soft_wrap=True)


def print_table(
    columns: Sequence[str | Column], rows: Iterable[Sequence[str]], *, empty: str, wide: bool = False
) -> None:
    """Print a list for people, or `empty` if it has no rows: a table, or a block per row where that is too wide.

    `wide`: always a table, with whole ids and all columns; also if stdout is no terminal.
    """
    screen = console()
    if lines := list_lines(columns, rows, width=line_width(wide=wide)):
        for line in lines:
            screen.print(line, soft_wrap=True)
    elif empty:
        say(empty)


def line_width(*, wide: bool = False) -> int | None:
    """Return the columns that a list may fill. None, no limit: with `--wide`, and where stdout is no terminal."""
    return None if wide or not sys.stdout.isatty() else console().width


def print_fields(fields: Mapping[str, str], *, title: str | None = None) -> None:
    """Print names and values of one thing, for people."""
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="heading", no_wrap=True)
    grid.add_column(overflow="fold")
    screen = console()
    room = screen.width - max(map(cell_len, fields), default=0) - _AROUND_A_VALUE
    for name, value in fields.items():
        style = _FIELD_STYLES[name](value) if name in _FIELD_STYLES else ""
        grid.add_row(Text(visible(name)), Text("\n".join(wrapped(shown(value), room)), style))
    name = visible(title or "")
    if cell_len(name) + _AROUND_A_TITLE <= screen.width:
        content: RenderableType = Panel.fit(grid, title=Text(name), title_align="left") if name else grid
    else:
        content = Panel.fit(grid)
        for line in wrapped(name, screen.width):  # a panel would cut it without a mark
            screen.print(Text(line, "heading"))
    screen.print(content)


def moment(seconds: float | None) -> str:
    """Return a time in UTC, to the second."""
    return "" if seconds is None else utc_text(seconds)


def until(seconds: float, now_s: float) -> str:
    """Return a time in UTC, and how far away it is."""
    away = seconds - now_s
    return f"{moment(seconds)} ({'in ' + span(away) if away >= 0 else span(away) + ' ago'})"
