"""Refused records in a command's output: one line with their number, at its end, instead of a line for each.

Anybody with Write on a topic can fill it with records that count for nothing. They must not hide other warnings.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from ringfence.kernel.base.terminal import StderrHandler

_LOGGERS = frozenset({"ringfence.model.records.directory", "ringfence.model.records.runs"})


class _RefusedRecords(logging.Filter):
    """A filter that counts log lines about refused records, and drops them."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0
        self.last = ""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether to print the line."""
        if record.name not in _LOGGERS:
            return True
        self.count += 1
        self.last = record.getMessage()
        return False


@contextmanager
def summarised_refusals() -> Iterator[None]:
    """While a command runs, count refused records; then log how many there were. For the handler of this terminal."""
    handlers = [one for one in logging.getLogger().handlers if isinstance(one, StderrHandler)]
    refused = _RefusedRecords()
    for handler in handlers:
        handler.addFilter(refused)
    try:
        yield
    finally:
        for handler in handlers:
            handler.removeFilter(refused)
        if refused.count:
            noun = "record" if refused.count == 1 else "records"
            logging.getLogger(__name__).warning(
                "refused %d %s on Kafka, which change nothing; services log them. The last: %s",
                refused.count, noun, refused.last,
            )  # fmt: skip
