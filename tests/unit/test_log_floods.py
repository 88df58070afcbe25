"""A flood of bad records is a few lines in the log, and says how many there were."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any, cast

import pytest

from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.log_limiter import EVERY_S, FIRST, QUIET_S, LogLimiter, rate_limited
from ringfence.kernel.kafka.batch_handlers import sequential
from ringfence.kernel.kafka.dead_letters import DeadLetters
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.service.process import configure
from ringfence.messages.codes import Code
from ringfence.messages.topics import HEARTBEAT, REGISTRY_COMMAND

LOG = logging.getLogger("ringfence.test")


class Lines:
    """What a service writes, with a clock of its own."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.floods = LogLimiter(lambda: self.now_s)
        self.out = io.StringIO()

    def new(self) -> list[dict[str, Any]]:
        text = self.out.getvalue()
        self.out.seek(0)
        self.out.truncate()
        return [json.loads(line) for line in text.splitlines()]

    def said(self) -> list[str]:
        return [line["event"] for line in self.new()]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Iterator[Lines]:
    """The logs of this process as a service has them."""
    made, root = Lines(), logging.getLogger()
    before, level = root.handlers[:], root.level
    monkeypatch.setattr("sys.stderr", made.out)
    configure("test", filters=[made.floods])
    yield made
    root.handlers[:] = before
    root.setLevel(level)


def complain(times: int, code: str = "not_a_jws", topic: str = "commands") -> None:
    for number in range(times):
        LOG.warning("ignored %d of %s (%s)", number, topic, code, extra=rate_limited(topic, code))


def test_the_first_few_are_told_each_and_then_how_many_there_were(lines: Lines) -> None:
    complain(100)
    assert lines.said() == [f"ignored {number} of commands (not_a_jws)" for number in range(FIRST)]
    lines.now_s += EVERY_S - 1
    lines.floods.report()
    assert lines.said() == []
    lines.now_s += 1
    lines.floods.report()
    (told,) = lines.new()
    assert told["event"] == (
        f"left out {100 - FIRST} like these in the last {EVERY_S:.0f} s, the last: ignored 99 of commands (not_a_jws)"
    )
    assert told["level"] == "warning"
    lines.floods.report()
    complain(10)
    assert lines.said() == []
    lines.now_s += EVERY_S
    lines.floods.report()
    (again,) = lines.said()
    assert again.startswith("left out 10 like these")
    lines.now_s += EVERY_S
    lines.floods.report()
    assert lines.said() == [], "there is nothing to say"


def test_each_topic_and_each_reason_is_a_kind_of_its_own(lines: Lines) -> None:
    complain(50)
    complain(1, code="key_unknown")
    complain(1, topic="heartbeat")
    LOG.warning("another line, about the same", extra=rate_limited("commands", "not_a_jws"))
    LOG.warning("a line of no kind")
    assert lines.said()[FIRST:] == [
        "ignored 0 of commands (key_unknown)",
        "ignored 0 of heartbeat (not_a_jws)",
        "another line, about the same",
        "a line of no kind",
    ]


def test_message_after_a_quiet_time_is_logged_again(lines: Lines) -> None:
    complain(FIRST + 1)
    lines.now_s += QUIET_S
    lines.floods.report()
    assert len(lines.said()) == FIRST + 1
    lines.floods.report()
    complain(1)
    assert lines.said() == ["ignored 0 of commands (not_a_jws)"]


def test_suppressed_messages_are_counted_at_exit(lines: Lines) -> None:
    complain(FIRST + 2)
    lines.new()
    lines.floods.report(all=True)
    (told,) = lines.said()
    assert told.startswith("left out 2 like these in the last 0 s")


def test_kinds_beyond_all_that_there_are_take_no_memory(lines: Lines) -> None:
    for number in range(3000):
        complain(1, code=str(number))
    assert len(lines.said()) == 1000 + FIRST
    assert len(lines.floods._counters) == 1001


def test_suppressed_message_is_quoted_briefly(lines: Lines) -> None:
    for _ in range(FIRST + 1):
        LOG.warning("ignored: %s", "x" * 100_000, extra=rate_limited("commands"))
    lines.new()
    lines.floods.report(all=True)
    (told,) = lines.said()
    assert len(told) < 600


class Letters:
    """A broker that takes every letter."""

    def __init__(self) -> None:
        self.values: list[str] = []

    async def send(self, topic: Any, type: str, record: Outbound, **_: Any) -> Any:
        self.values.append(str(record.value))

        async def acknowledged() -> None: ...

        return acknowledged()


async def test_a_flood_of_garbage_is_dead_lettered_and_counted_each_and_told_of_in_a_few_lines(
    lines: Lines,
) -> None:
    broker, secret = Letters(), "what-was-in-it"

    async def refuse(record: Received) -> None:
        raise InvalidMessageError("not a JWS in compact serialisation", code=Code.NOT_A_JWS)

    def counted() -> float:
        return metrics.RECORDS.labels(HEARTBEAT.what, "dead_lettered")._value.get()

    before = counted()
    handle = sequential(refuse, DeadLetters(cast(Any, broker), "test", SystemClock()))
    for start in range(0, 900, 300):
        await handle(
            [
                Received(HEARTBEAT, "heartbeats", 0, start + at, 0, "key", secret.encode(), ())
                for at in range(300)
            ]
        )
        lines.now_s += 1
        lines.floods.report()
    assert len(broker.values) == 900
    assert counted() - before == 900
    lines.now_s += EVERY_S
    lines.floods.report()
    told = lines.new()
    assert len(told) == FIRST + 1
    assert told[-1]["event"].startswith(f"left out {900 - FIRST} like these")
    assert "heartbeats/0@899" in told[-1]["event"]
    assert secret not in json.dumps(told)
    assert not any("kind" in name for line in told for name in line)


async def test_the_reason_is_not_logged_at_length_and_the_letter_has_it(lines: Lines) -> None:
    broker = Letters()
    letters = DeadLetters(cast(Any, broker), "test", SystemClock())
    record = Received(REGISTRY_COMMAND, "commands", 0, 0, 0, "key", b"x", ())
    await letters.send(record, InvalidMessageError("y" * 1500, code=Code.KEY_UNKNOWN))
    (told,) = lines.said()
    assert len(told) < 600
    assert "y" * 1500 in broker.values[0]
