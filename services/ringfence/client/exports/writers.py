"""Text formats of the export: each turns a page of events, as they are on the topic, into bytes."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import BinaryIO, Final, Literal, Protocol

import orjson

from ringfence.client.exports.columns import COLUMNS, Cell, row_of

Format = Literal["ocsf", "csv"]

_FORMULA: Final = re.compile(
    # Where a cell may begin: also after a separator of another locale or import program, and on the next line of a cell
    # whose quotes such a program does not recognise.
    r"(^|[,;|\t\v\f\r\n\x1c-\x1e\x85\u2028\u2029])"
    # Characters that programs skip at the beginning of a cell.
    "(?=(?:(?![\t\v\f\r\n\x1c-\x1e\x85\u2028\u2029])"
    '[\\s"\x00-\x1f\x7f-\x9f\xad\u061c\u180e\u200b-\u200f\u202a-\u202e\u2060-\u206f\ufeff])*'
    # Characters that start a formula, with the variants that some programs treat as the same (Unicode, NFKC).
    r"[=+\-@＝＋－＠﹦﹢﹣﹫⁼⁺⁻₌₊₋−])"
)
"""Where a spreadsheet takes a cell for a formula (OWASP, CSV Injection)."""
_CONTROL: Final = ("\t", "\r", "\n", "\x00")


class ExportWriter(Protocol):
    """Writes events to a file, page by page."""

    def page(self, events: Sequence[str]) -> None:
        """Write a page of events completely."""
        ...


class OcsfWriter:
    """Writes one event per line, byte for byte as on the topic: its hash is the one in the chain."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def page(self, events: Sequence[str]) -> None:
        """Write a page of events. An event with a line break was not written by audit: it is put on one line."""
        whole = (
            event if "\n" not in event else orjson.dumps(orjson.loads(event)).decode() for event in events
        )
        self._file.write("".join(f"{event}\n" for event in whole).encode())


class CsvWriter:
    """Writes one row per event (RFC 4180), with a header.

    No cell begins like a formula, wherever a program splits cells.
    """

    def __init__(self, file: BinaryIO, *, header: bool = True) -> None:
        self._file = file
        if header:
            self._write([[column.name for column in COLUMNS]])

    def page(self, events: Sequence[str]) -> None:
        self._write([[_safe(cell) for cell in row_of(orjson.loads(event))] for event in events])

    def _write(self, rows: Sequence[Sequence[str]]) -> None:
        text = io.StringIO(newline="")
        csv.writer(text).writerows(rows)
        self._file.write(text.getvalue().encode())


def writer_of(format: Format, file: BinaryIO, *, resumed: bool = False) -> ExportWriter:
    """Return the writer of a format. `resumed`: the file has a beginning already."""
    match format:
        case "ocsf":
            return OcsfWriter(file)
        case "csv":
            return CsvWriter(file, header=not resumed)


def _safe(cell: Cell) -> str:
    if cell is None:
        return ""
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, int):
        return str(cell)
    safe = _FORMULA.sub(r"\1'", cell)
    return f"'{safe}" if safe.lstrip(" ").startswith(_CONTROL) else safe
