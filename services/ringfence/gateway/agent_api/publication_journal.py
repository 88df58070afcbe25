"""The journal of posted requests on disk. After a restart, it shows the gateway which agent may fetch which replies.

It is a cache of this gateway: a file of JSON lines, without anything secret. What it lacks, an agent proves by posting
the same bytes again. A line is written once Kafka has acknowledged the request.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import orjson

from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.private_files import NotPrivateError, open_private, write_private

log = logging.getLogger(__name__)

KEPT_S: Final = 24 * 3600
"""As long as replies are on Kafka."""
MAX_LINES: Final = 100_000
"""Beyond it the file is written anew, with what is still remembered."""


@dataclass(frozen=True, slots=True)
class JournalEntry:
    """One request that was published."""

    id: str
    digest: str
    agent_id: str
    kid: str
    task_id: str | None
    at_s: int


class PublicationJournal:
    """An append-only file. An error is logged only: agents then post again after a restart."""

    def __init__(self, path: Path, *, now_s: Callable[[], int], max_lines: int = MAX_LINES) -> None:
        """`path`: in a folder that this process alone uses. `now_s`: seconds since 1970."""
        self._path = path
        self._now_s = now_s
        self._max_lines = max_lines
        self._file: int | None = None
        self._lines = 0

    def open(self) -> list[JournalEntry]:
        """Open the file, and return the entries of the last day, oldest first. Malformed lines are dropped."""
        since_s, entries = self._now_s() - KEPT_S, dict[str, JournalEntry]()
        with contextlib.suppress(OSError):
            for line in self._path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, TypeError):
                    entry = JournalEntry(**orjson.loads(line))
                    if entry.at_s >= since_s:
                        entries[entry.id] = entry
        self.rewrite(entries.values())
        return list(entries.values())

    def add(self, entry: JournalEntry) -> bool:
        """Append an entry. Returns whether the file has so many lines that it is time to `rewrite` it."""
        if self._file is None:
            return False
        try:
            os.write(self._file, orjson.dumps(entry) + b"\n")
        except OSError as error:
            self._failed(error)
        self._lines += 1
        return self._lines > self._max_lines

    def rewrite(self, entries: Iterable[JournalEntry]) -> None:
        """Replace the file by one with these entries alone."""
        self.close()
        lines = [orjson.dumps(entry) + b"\n" for entry in entries]
        try:
            write_private(self._path, b"".join(lines))
            self._file = open_private(self._path, os.O_WRONLY | os.O_APPEND)
            self._lines = len(lines)
        except (OSError, NotPrivateError) as error:
            self._failed(error)

    def close(self) -> None:
        """Close the file. Idempotent."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def _failed(self, error: Exception) -> None:
        log.warning(
            "after a restart agents have to post their requests again: %s cannot be written: %s",
            self._path,
            error,
            extra=rate_limited("journal", type(error).__name__),
        )
