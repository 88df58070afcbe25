"""Junk on a topic is one line of a command's output, however much there is."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from ringfence.cli.shared.refused_records import summarised_refusals
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.terminal import StderrHandler
from ringfence.messages.topics import TASK, USER
from tests.support.in_memory_registry import InMemoryRegistry


@pytest.fixture(autouse=True)
def terminal() -> Iterator[None]:
    """The handler of a command, as `ringfence.kernel.base.terminal.filter_stderr` installs it."""
    handler = StderrHandler()
    logging.getLogger().addHandler(handler)
    yield
    logging.getLogger().removeHandler(handler)


def test_refused_records_are_one_line_and_other_warnings_stay(capsys: pytest.CaptureFixture[str]) -> None:
    ledger = InMemoryRegistry()
    ledger.organisation()
    with summarised_refusals():
        for number in range(10):
            topic = USER if number % 2 else TASK
            ledger.directory.on_records([ledger.received(topic, f"stray-{number}", b"junk")])
        logging.getLogger("ringfence.other").warning("no broker", extra=rate_limited("kafka"))
    warning, summary = capsys.readouterr().err.splitlines()
    assert warning == "no broker"
    assert summary.startswith("refused 10 records on Kafka, which change nothing; services log them.")
    assert "The last: refused a user record at " in summary


def test_no_refused_record_is_no_line(capsys: pytest.CaptureFixture[str]) -> None:
    with summarised_refusals():
        pass
    assert capsys.readouterr().err == ""
