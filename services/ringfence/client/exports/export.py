"""A resumable export of audit events to a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Final

from pydantic import BaseModel, ConfigDict, ValidationError

from ringfence.client.exports.writers import ExportWriter, Format, writer_of
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.private_files import check_output, open_private, write_private
from ringfence.messages.codes import Code

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
        """Whether a page is complete."""
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
