"""What is left of all that the clients of Kafka say while it is away."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator

import pytest
from aiokafka.errors import CommitFailedError, KafkaConnectionError, NodeNotReadyError

from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.kafka.probe import REPORT_EVERY_S, OutageLog

CLIENT = logging.getLogger("aiokafka.client")
REFUSED = ConnectionRefusedError(111, "Connection refused")


class Lines(logging.Handler):
    """Every line that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []
        self.now_s = 0.0
        self.trouble: OutageLog | None = None

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())

    def new(self) -> list[str]:
        told, self.told = self.told, []
        return told


@pytest.fixture
async def listener() -> str:
    server = await asyncio.start_server(lambda reader, writer: writer.close(), "127.0.0.1", 0)
    return f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.fixture
def lines(listener: str) -> Iterator[Lines]:
    made = Lines()
    made.trouble = OutageLog(BusSettings(kafka=listener), lambda: made.now_s)
    made.addFilter(made.trouble)
    clients = logging.getLogger("aiokafka")
    level = clients.level  # a command of another test may have silenced them
    clients.setLevel(logging.WARNING)
    logging.getLogger().addHandler(made)
    yield made
    logging.getLogger().removeHandler(made)
    clients.setLevel(level)


async def look(lines: Lines) -> None:
    assert lines.trouble is not None
    await lines.trouble.report_state()


def complain() -> None:
    CLIENT.error("Unable connect to node with id %s: %s", 0, REFUSED)
    CLIENT.error("Unable to update metadata from %s", [0])
    logging.getLogger("ringfence.kernel.kafka.fetch_control").warning(
        "a fetch failed: %s", NodeNotReadyError("x")
    )


async def test_one_line_at_once_one_now_and_then_and_one_when_it_is_back(lines: Lines, listener: str) -> None:
    for _ in range(100):
        complain()
        await look(lines)
    (told,) = lines.new()
    assert told == (
        f"Kafka at {listener} does not answer as it should, trying again until it does: "
        "Unable connect to node with id 0: [Errno 111] Connection refused"
    )
    lines.now_s = REPORT_EVERY_S
    complain()
    await look(lines)
    (told,) = lines.new()
    assert "for 30 s; left out 302 messages about it, the last: a fetch failed" in told
    await look(lines)
    assert lines.new() == []
    lines.now_s += 1
    await look(lines)
    assert lines.new() == [], "a moment without a word is not yet that it is back"
    lines.now_s += 2
    await look(lines)
    (told,) = lines.new()
    assert told.startswith(f"Kafka at {listener} is back after 30.0 s")
    complain()
    assert len(lines.new()) == 1, "the next time is told anew"


async def test_silence_alone_is_not_that_it_is_back(lines: Lines) -> None:
    assert lines.trouble is not None
    lines.trouble._settings = BusSettings(kafka="127.0.0.1:1")
    complain()
    lines.new()
    lines.now_s = 10
    await look(lines)
    assert lines.new() == []
    lines.now_s = REPORT_EVERY_S
    await look(lines)
    assert "has not answered as it should for 30 s" in lines.new()[0]


async def test_first_connection_error_keeps_the_clients_own_words(lines: Lines) -> None:
    CLIENT.error('Unable connect to "%s:%s": %s', "h", 1, REFUSED)
    assert lines.new() == []
    lines.now_s = REPORT_EVERY_S
    CLIENT.error('Unable connect to "%s:%s": %s', "h", 1, REFUSED)
    await look(lines)
    assert 'the last: Unable connect to "h:1"' in lines.new()[0]


async def test_unrelated_messages_are_logged(lines: Lines) -> None:
    complain()
    lines.new()
    CLIENT.error("Topic %s not found in cluster metadata", "x")
    CLIENT.error("Heartbeat failed: %r", CommitFailedError())
    logging.getLogger("ringfence.kernel.service.runtime").warning("waiting: %s", KafkaConnectionError("x"))
    logging.getLogger("ringfence.revoker").warning("the target does not answer: %s", REFUSED)
    assert len(lines.new()) == 4
    CLIENT.warning("Marking the coordinator dead (node %s)for group %s.", 0, "g")
    assert lines.new() == []


async def test_follow_up_messages_are_logged_without_an_outage(lines: Lines) -> None:
    CLIENT.warning("Marking the coordinator dead (node %s)for group %s.", 0, "g")
    assert len(lines.new()) == 1
