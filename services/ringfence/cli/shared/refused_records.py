"""Refused records in a command's output: one line with their number, at its end, instead of a line for each.

Anybody with Write on a topic can fill it with records that count for nothing. They must not hide other warnings.

What to do next after an error that does not say it by itself, by the error's code.

Names options instead of the fields of messages: people do not know the fields.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.terminal import StderrHandler
from ringfence.messages.codes import Code

_OPTIONS: Final[Mapping[str, str]] = {
    "comment": "--comment",
    "count": "--count",
    "delivery": "--delivery",
    "description": "--description",
    "max_ttl_s": "--max-ttl",
    "name": "--name",
    "not_after": "--for or --until",
    "note": "--note",
    "on_behalf_of": "--on-behalf-of",
    "purpose": "--purpose",
    "reason": "--reason",
    "scope": "--allow",
    "sponsor": "--sponsor",
    "ttl_s": "--ttl",
    "verbs": "--verb",
}
"""The option that fills a field, where it has another name than a person would guess."""
_FIELD = re.compile(r"(?<=[:;] )(?:terms\.)?([a-z_]+)(?:\.\d+)*(?:\.[a-z_]+)*(?=: )")


def with_options(error: RingfenceError) -> str:
    """Return the message of an error. Where it is about the arguments of a call, fields are named by their options."""
    if error.code != Code.CALL_INVALID:
        return error.message
    return _FIELD.sub(lambda found: _OPTIONS.get(found[1], found[0]), error.message)


REMEDIES: Final[Mapping[str, str]] = {
    Code.AGENT_UNKNOWN: "ringfence agent list",
    Code.BEYOND_SCOPE: "ask for less, or have the side widened that the reasons name: task, ceiling or entitlements",
    Code.IDENTITY_WRONG: "name the right key file with --identity FILE; make one with: ringfence key new",
    Code.KAFKA_FAILED: "ringfence doctor",
    Code.KEY_FILE_INVALID: "name another key file with --identity FILE; make one with: ringfence key new",
    Code.KEY_LINE_ENDED: "have the agent's sponsor run: ringfence agent rotate-key",
    Code.KEY_REUSED: "find who has a copy of the key file; its sponsor runs: ringfence agent rotate-key",
    Code.LEASE_UNKNOWN: "ringfence lease list",
    Code.NOT_AUDITOR: "name the key file of an auditor with --identity FILE",
    Code.REPORT_UNKNOWN: "list the reports of a user's keys with: ringfence user keys USER",
    Code.RESTS_ON_COMPROMISED: "set anew what is held, or have the report lifted: ringfence user confirm-compromise",
    Code.NOT_OPERATOR: "name the key file of an operator with --identity FILE",
    Code.NOT_SPONSOR: "name the key file of the agent's sponsor with --identity FILE",
    Code.SEVERAL_TARGETS: "ask for each target with its own request",
    Code.TARGET_UNKNOWN: "ringfence target list",
    Code.TASK_UNKNOWN: "ringfence task list",
    Code.TIMEOUT: "wait longer with --timeout DURATION; its sponsor sees it by: ringfence approvals list",
    Code.TTL_TOO_LONG: "ask for a shorter life with --ttl DURATION",
    Code.UNAVAILABLE: "ringfence doctor",
    Code.UNKNOWN_AGENT: "ringfence agent list",
    Code.UNKNOWN_TARGET: "ringfence target list",
    Code.UNKNOWN_TASK: "ringfence task list",
    Code.UNKNOWN_USER: "ringfence user list",
    Code.USER_UNKNOWN: "ringfence user list",
    Code.VERB_UNKNOWN: "ringfence target list",
}
"""Only where the same is right for each error of this code."""


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
