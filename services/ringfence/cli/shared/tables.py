"""Lists for people: a table if it fits the terminal, else one block per row.

A terminal folds a table that is too wide, and a name that is folded is misread. So no value is ever cut: a table is
printed only if every name and id fits on one line. Otherwise each row becomes a block. A word that is longer than the
terminal goes on in the next line, and a backslash marks where.

Every text is shown on one line, with its line feeds as code points, except `Lines`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from rich.cells import cell_len
from rich.text import Text

from ringfence.cli.shared import styles
from ringfence.kernel.base.text import shown, visible

SHORT_ID: Final = 8
"""How many characters of an id a terminal shows, where they are enough to tell the listed ids apart."""
CONTINUED: Final = "\\"
"""Ends a line whose last word goes on in the next line."""
_PROSE_WIDTH: Final = 24
"""The least width of a column of prose in a table. Narrower ones are hard to read."""
_GAP: Final = "  "
_BETWEEN_FIELDS: Final = "   "
_WORDS = re.compile(r" *[^ ]+| +")


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a list. See `names`, `ids` and `prose`."""

    title: str
    kind: Literal["name", "id", "prose"] = "name"
    only_wide: bool = False
    meaning: Callable[[str], str] | None = None
    """Returns the style of a cell, by its text."""


def ids(title: str, *, only_wide: bool = False) -> Column:
    """A column of ids, which a terminal shows shortened."""
    return Column(title, "id", only_wide)


def prose(title: str, *, only_wide: bool = False) -> Column:
    """A column of sentences, which may be wrapped between words."""
    return Column(title, "prose", only_wide)


def state(title: str) -> Column:
    """A column of states, such as `active` and `suspended`, coloured by what they mean."""
    return Column(title, meaning=styles.state)


def ending(title: str) -> Column:
    """A column of when something ends. What ends soon stands out."""
    return Column(title, meaning=styles.ending)


def extra(title: str) -> Column:
    """A column of names that only `--wide` shows."""
    return Column(title, only_wide=True)


def list_lines(
    columns: Sequence[str | Column], rows: Iterable[Sequence[str]], *, width: int | None
) -> list[Text]:
    """Return the lines of a list, without any line longer than `width`, which may be None: no limit.

    A column that is a text holds names: words that are never wrapped. Without a limit, ids are whole and the columns of
    `--wide` are there.
    """
    all_columns = [Column(one) if isinstance(one, str) else one for one in columns]
    kept = [number for number, one in enumerate(all_columns) if width is None or not one.only_wide]
    cells = [[shown(row[number]) for number in kept] for row in rows]
    listed = [all_columns[number] for number in kept]
    if not cells:
        return []
    if width is not None:
        for number, column in enumerate(listed):
            if column.kind == "id":
                short = short_ids(row[number] for row in cells)
                for row in cells:
                    row[number] = short.get(row[number], row[number])
    widths = _table_widths(listed, cells, width)
    if widths is not None:
        return list(_table(listed, cells, widths))
    assert width is not None  # without a limit every table fits
    return list(_blocks(listed, cells, width))


def short_ids(whole: Iterable[str]) -> dict[str, str]:
    """Return what to show for each id: its first eight characters, or as many more as tell it from the others."""
    known = sorted({one for one in whole if one})
    short = {}
    for number, one in enumerate(known):
        others = known[max(number - 1, 0) : number] + known[number + 1 : number + 2]
        length = SHORT_ID
        while length < len(one) and any(other.startswith(one[:length]) for other in others):
            length += 1
        short[one] = one[:length]
    return short


def wrapped(text: str, width: int) -> list[str]:
    """Return the lines of a text, none wider than `width` cells. Breaks between words, and marks a broken word."""
    return [line for whole in text.split("\n") for line in _wrapped_line(whole, width)]


def _wrapped_line(text: str, width: int) -> Iterator[str]:
    if cell_len(text) <= width:
        yield text
        return
    line = ""
    for word in _WORDS.findall(text):
        if cell_len(line + word) <= width:
            line += word
            continue
        if line:
            yield line
            word = word.lstrip(" ")
        while cell_len(word) > width:
            piece = _beginning(word, width - len(CONTINUED))
            yield piece + CONTINUED
            word = word[len(piece) :]
        line = word
    if line:
        yield line


def _beginning(word: str, width: int) -> str:
    """Return as many characters as fill `width` cells, one at least."""
    end = 1
    while end < len(word) and cell_len(word[: end + 1]) <= width:
        end += 1
    return word[:end]


def _cell_width(cell: str) -> int:
    return max(map(cell_len, cell.split("\n")))


def _table_widths(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int | None
) -> list[int] | None:
    """Return the width of each column; None if the table does not fit."""
    natural = [
        max(cell_len(visible(column.title)), *(_cell_width(row[number]) for row in cells))
        for number, column in enumerate(columns)
    ]
    if width is None:
        return natural
    left = width - len(_GAP) * (len(columns) - 1)
    left -= sum(need for need, column in zip(natural, columns, strict=True) if column.kind != "prose")
    wrapping = [number for number, column in enumerate(columns) if column.kind == "prose"]
    if left < sum(min(natural[number], _PROSE_WIDTH) for number in wrapping):
        return None
    # The narrowest first: what it leaves is for the others.
    for done, number in enumerate(sorted(wrapping, key=natural.__getitem__)):
        share = max(left // (len(wrapping) - done), min(natural[number], _PROSE_WIDTH))
        natural[number] = min(natural[number], share)
        left -= natural[number]
    return natural


def _table(
    columns: Sequence[Column], cells: Sequence[Sequence[str]], widths: Sequence[int]
) -> Iterator[Text]:
    heads = (_padded(visible(column.title), width) for column, width in zip(columns, widths, strict=True))
    yield Text(_GAP.join(heads).rstrip(), style="heading")
    yield Text("-" * (sum(widths) + len(_GAP) * (len(widths) - 1)), style="aside")
    for row in cells:
        parts = [wrapped(cell, width) for cell, width in zip(row, widths, strict=True)]
        looks = [_style(column, cell) for column, cell in zip(columns, row, strict=True)]
        for number in range(max(map(len, parts))):
            line = Text()
            for part, width, style in zip(parts, widths, looks, strict=True):
                text = part[number] if number < len(part) else ""
                line.append(text, style).append(" " * (width - cell_len(text)) + _GAP)
            line.rstrip()
            yield line


def _style(column: Column, cell: str) -> str:
    return column.meaning(cell) if column.meaning else ""


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cell_len(text))


def _blocks(columns: Sequence[Column], cells: Sequence[Sequence[str]], width: int) -> Iterator[Text]:
    """Yield a block per row. Names share lines, in order; prose and what has several lines starts a line of its own.

    Nothing in a value can pass for another field: a line of a value begins deeper than every title.
    """
    titles = [visible(column.title) for column in columns]
    depth = len(_GAP) + max(map(cell_len, titles)) + len(_GAP)
    for number, row in enumerate(cells):
        if number:
            yield Text("")
        line, first = Text(), True
        for column, title, cell in zip(columns, titles, row, strict=True):
            if not cell:
                continue
            need = len(_BETWEEN_FIELDS) + cell_len(title) + 1 + cell_len(cell)
            alone = column.kind == "prose" or "\n" in cell or _BETWEEN_FIELDS in cell
            if line and not alone and line.cell_len + need <= width:
                line.append(_BETWEEN_FIELDS).append(title, "aside").append(" ").append(
                    cell, _style(column, cell)
                )
                continue
            if line:
                yield line
            head = f"{title} " if first and not alone else _padded(_GAP + title, depth)
            first = False
            *before, rest = wrapped(cell, width - depth)
            line = Text().append(head, "aside")
            for part in before:
                yield line.append(part, _style(column, cell))
                line = Text(" " * depth)
            line.append(rest, _style(column, cell) or ("" if head.startswith(_GAP) else "heading"))
            if alone or before:
                yield line
                line = Text()
        if line:
            yield line
