"""A resumable export of audit events to a file, as JSON lines (OCSF) or CSV."""

from __future__ import annotations

import csv
import io
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Final, Literal, NamedTuple, Protocol

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.clock import utc_datetime
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import check_output, open_private, write_private
from ringfence.messages.codes import Code

Cell = str | int | bool | None
Kind = Literal["text", "number", "truth"]


class ExportColumn(NamedTuple):
    """One column: its name, its type, and its value in an event."""

    name: str
    kind: Kind
    value: Callable[[Mapping[str, Any]], Any]


def _at(path: str, kind: Kind = "text", name: str | None = None) -> ExportColumn:
    parts = path.split(".")

    def value(event: Mapping[str, Any]) -> Any:
        member: Any = event
        for part in parts:
            member = member.get(part) if isinstance(member, Mapping) else None
        return member

    return ExportColumn(name or parts[-1], kind, value)


def _word(word: str, kind: Kind = "text") -> ExportColumn:
    return _at(f"unmapped.{word}", kind, word.replace(".", "_"))


def _timestamp(at_ms: int) -> str:
    """Return a time (ms) as ISO 8601 with milliseconds."""
    return utc_datetime(at_ms / 1000).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at_ms % 1000:03}Z"


def _actor_of(event: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the actor of an event. A finding has it among its evidences; a logon is by its user."""
    holder = event if "actor" in event else next(iter(event.get("evidences", ())), {})
    actor: Mapping[str, Any] = holder.get("actor", {}).get("user") or event.get("user") or {}
    return actor


COLUMNS: Final = (
    ExportColumn("time", "text", lambda event: _timestamp(event["time"])),
    _at("time", "number", "time_ms"),
    _at("metadata.uid"),
    _at("metadata.event_code"),
    _at("class_uid", "number"),
    _at("class_name"),
    _at("activity_name"),
    _at("status"),
    _at("status_code"),
    _at("status_detail"),
    _at("severity"),
    _at("severity_id", "number"),
    _at("is_alert", "truth"),
    _at("message"),
    ExportColumn("actor", "text", lambda event: _actor_of(event).get("name")),
    ExportColumn("actor_uid", "text", lambda event: _actor_of(event).get("uid")),
    _word("agent"),
    _word("act"),
    _word("sponsor"),
    _word("on_behalf_of"),
    _word("task"),
    _word("request"),
    _word("lease"),
    _word("target"),
    _word("verb"),
    _word("resource"),
    _word("outcome"),
    _word("approvers"),
    _word("deadline", "number"),
    _word("policy_revision"),
    _word("trace_id"),
    _word("verified.by"),
    _word("chain.tree"),
    _word("chain.seq", "number"),
    _word("source.topic"),
    _word("source.partition", "number"),
    _word("source.offset", "number"),
)


def row_of(event: Mapping[str, Any]) -> list[Cell]:
    """Return the cells of an event, one a column. A value of another type than its column is left out."""
    return [_cell(column.kind, column.value(event)) for column in COLUMNS]


def _cell(kind: Kind, value: Any) -> Cell:
    if kind == "truth":
        return value if type(value) is bool else None
    if kind == "number":
        return value if type(value) is int else None
    if isinstance(value, list):
        return " ".join(one for one in value if isinstance(one, str))
    return value if isinstance(value, str) else None


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
"""The beginnings of cells that a spreadsheet takes for a formula (OWASP, CSV Injection)."""
_CONTROL: Final = ("\t", "\r", "\n", "\x00")


class ExportWriter(Protocol):
    """Writes events to a file, page by page."""

    def page(self, events: Sequence[str]) -> None: ...


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


PART: Final = ".part"
STATE: Final = ".part.json"


class ExportError(RingfenceError):
    """Raised when an export cannot begin or resume with the files that exist."""

    code = Code.EXPORT_FILES


class ExportQuery(BaseModel):
    """The query of an export. Only an export with the same query can be resumed."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format
    since_ms: int
    until_ms: int
    """Exclusive."""
    filters: dict[str, str | int]


class ExportProgress(BaseModel):
    """The saved position of an export: how much of the file is valid, and where to continue."""

    model_config = ConfigDict(extra="forbid")

    question: ExportQuery
    after: str | None = None
    events: int = 0
    bytes: int = 0


@dataclass(slots=True)
class ExportFile:
    """An unfinished export: its partial file and its progress file, beside the target."""

    target: Path
    file: BinaryIO
    writer: ExportWriter
    state: ExportProgress

    def checkpoint(self) -> None:
        """Save the progress, so that the export can be resumed from here."""
        self.file.flush()
        self.state.bytes = self.file.tell()
        write_private(_sibling(self.target, STATE), self.state.model_dump_json())

    def finish(self) -> None:
        """Close the complete file and give it its final name."""
        self.file.close()
        _sibling(self.target, PART).rename(self.target)
        _sibling(self.target, STATE).unlink(missing_ok=True)

    def abort(self) -> None:
        """Close an incomplete export. Its files stay where it can be resumed, and are deleted otherwise."""
        self.file.close()
        if not self.can_be_resumed:
            for suffix in (PART, STATE):
                _sibling(self.target, suffix).unlink(missing_ok=True)

    @property
    def can_be_resumed(self) -> bool:
        """True if the page is complete."""
        return self.state.after is not None


def begin(target: Path, question: ExportQuery) -> ExportFile:
    """Begin a new export. Raises ExportError if the file, or a partial one, exists; OutputFileError."""
    check_output(target)
    if target.exists():
        raise ExportError(f"{target} is there already; name another file, or delete it")
    try:
        number = open_private(_sibling(target, PART), os.O_WRONLY | os.O_EXCL)
    except FileExistsError:
        raise ExportError(
            f"an export that stopped stands in {_sibling(target, PART)}; go on with --resume, or delete it"
        ) from None
    except OSError as error:
        raise ExportError(f"cannot write {_sibling(target, PART)}: {error.strerror}") from None
    file = os.fdopen(number, "wb")
    one = ExportFile(target, file, writer_of(question.format, file), ExportProgress(question=question))
    one.checkpoint()
    return one


def resume(target: Path) -> ExportFile:
    """Resume an interrupted export. Raises ExportError if there is none, or another user owns it; OutputFileError."""
    check_output(target)
    try:
        with os.fdopen(_open_own(_sibling(target, STATE), os.O_RDONLY), "rb") as saved:
            state = ExportProgress.model_validate_json(saved.read())
        number = _open_own(_sibling(target, PART), os.O_WRONLY)
    except (OSError, ValidationError):
        raise ExportError(
            f"no export that stopped and that can be continued is beside {target}; begin anew without --resume"
        ) from None
    file = os.fdopen(number, "wb")
    # A partly written page after the last complete one is written again.
    file.truncate(state.bytes)
    file.seek(state.bytes)
    return ExportFile(target, file, writer_of(state.question.format, file, resumed=True), state)


async def export_pages(
    api: ReadApi,
    state: ExportProgress,
    writer: ExportWriter,
    progress: Callable[[float], None],
    on_page: Callable[[], None] = lambda: None,
) -> None:
    """Write all events from the saved position on, in order of time and uid.

    `on_page` is called after each page. Raises ApiError; `state` then has the position reached.
    """
    question = state.question
    span_ms = max(question.until_ms - question.since_ms, 1)
    while True:
        page = await api.export(
            question.filters, since_ms=question.since_ms, until_ms=question.until_ms - 1, after=state.after
        )
        writer.page(page["events"])
        state.events += len(page["events"])
        if page["after"] is None:
            progress(1.0)
            return
        state.after = page["after"]
        on_page()
        progress((page["looked_at_ms"] - question.since_ms) / span_ms)


def stopped_at_ms(state: ExportProgress) -> int | None:
    """Return the time of the last event that was read; None before the first page."""
    return int(state.after.partition(".")[0]) if state.after else None


def set_filters(filters: Mapping[str, str | int | None]) -> dict[str, str | int]:
    """The filters that have a value."""
    return {name: value for name, value in filters.items() if value is not None}


def _open_own(path: Path, flags: int) -> int:
    """Open a file of an interrupted export. Raises ExportError if another user owns it, who could read or change it."""
    path.lstat()  # `open_private` would create it
    descriptor = open_private(path, flags)
    if os.fstat(descriptor).st_uid != os.geteuid():
        os.close(descriptor)
        raise ExportError(f"{path} belongs to another user; export to another file")
    return descriptor


def _sibling(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)
