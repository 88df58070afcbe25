"""An export from its first page to its last, and where it stopped."""

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
from ringfence.kernel.base.private_files import open_private, write_private

PART: Final = ".part"
STATE: Final = ".part.json"


class ExportError(RingfenceError):
    """An export cannot begin, or go on, with the files that are there."""

    code = "export_files"


class ExportQuery(BaseModel):
    """What is exported: an export is only gone on with where it is the same."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Format
    since_ms: int
    until_ms: int
    """Not included."""
    filters: dict[str, str | int]


class ExportProgress(BaseModel):
    """How far an export is: what of the file stands, and from where to go on."""

    model_config = ConfigDict(extra="forbid")

    question: ExportQuery
    after: str | None = None
    events: int = 0
    bytes: int = 0


@dataclass(slots=True)
class ExportFile:
    """The files of an export that is not whole yet, beside the one that it will be."""

    target: Path
    file: BinaryIO
    writer: ExportWriter
    state: ExportProgress

    def checkpoint(self) -> None:
        """What is written so far is to be gone on with."""
        self.file.flush()
        self.state.bytes = self.file.tell()
        if self.writer.resumable:
            state_file = _sibling(self.target, STATE)
            new_file = state_file.with_name(f"{state_file.name}.new")
            write_private(new_file, self.state.model_dump_json())
            new_file.replace(state_file)

    def finish(self) -> None:
        """It is whole: it gets its name."""
        self.writer.close()
        self.file.close()
        _sibling(self.target, PART).rename(self.target)
        _sibling(self.target, STATE).unlink(missing_ok=True)

    def abort(self) -> None:
        """It is not whole: what can be gone on with stays, else nothing does."""
        self.file.close()
        if not self.can_be_resumed:
            for suffix in (PART, STATE):
                _sibling(self.target, suffix).unlink(missing_ok=True)

    @property
    def can_be_resumed(self) -> bool:
        """Whether a page of it stands, in a format that more can be written to."""
        return self.writer.resumable and self.state.after is not None


def begin(target: Path, question: ExportQuery) -> ExportFile:
    """A new export to a file. Raises ExportError where it, or a part of it, is there."""
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
    try:
        one = ExportFile(target, file, writer_of(question.format, file), ExportProgress(question=question))
    except ModuleNotFoundError:
        file.close()
        _sibling(target, PART).unlink()
        raise
    one.checkpoint()
    return one


def resume(target: Path) -> ExportFile:
    """Go on with an export that stopped. Raises ExportError where there is none."""
    try:
        state = ExportProgress.model_validate_json(_sibling(target, STATE).read_bytes())
        _sibling(target, PART).stat()
        number = open_private(_sibling(target, PART), os.O_WRONLY)
    except (OSError, ValidationError):
        raise ExportError(
            f"no export that stopped, and can be gone on with, stands beside {target}; begin anew without --resume"
        ) from None
    file = os.fdopen(number, "wb")
    # What was written of a page after the last that counts is written again.
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
    """Write all events of a question from where its state stands, in the order of time and uid.

    `on_page` is told after each page. Raises ApiError; then `state` says how far it came.
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
    """The time of the last event that was looked at; None before the first page."""
    return int(state.after.partition(".")[0]) if state.after else None


def set_filters(filters: Mapping[str, str | int | None]) -> dict[str, str | int]:
    """The filters that are set."""
    return {name: value for name, value in filters.items() if value is not None}


def _sibling(target: Path, suffix: str) -> Path:
    return target.with_name(target.name + suffix)
