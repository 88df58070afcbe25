"""Two that use one key at once are noticed; one that starts again is not taken for two."""

from __future__ import annotations

import asyncio
import os
from types import SimpleNamespace
from typing import Any, cast

from ringfence.client.agent.http_connection import process_id
from ringfence.gateway.decision.sender import SharedKeys
from ringfence.model.records.agent_keys import WINDOW_MS, KeyUses
from tests.support.in_memory_registry import TD, FixedClock
from tests.support.world import WITHIN_S

MINUTE_MS = 60_000


def told(uses: KeyUses, *marks: str | None, step_ms: int = MINUTE_MS, since_ms: int = 0) -> list[str | None]:
    return [uses.saw("bot", "kid", mark, since_ms + step_ms * n) for n, mark in enumerate(marks, start=1)]


def test_uses_by_one_process_are_no_sharing() -> None:
    assert told(KeyUses(), "a", "a", "a", None, "a") == [None] * 5


def test_a_restart_is_no_sharing() -> None:
    assert told(KeyUses(), "a", "a", "b", "b", "c", "c") == [None] * 6


def test_two_at_once_are_told_by_the_other() -> None:
    assert told(KeyUses(), "a", "b", "a") == [None, None, "b"]


def test_uses_far_apart_are_no_sharing() -> None:
    assert told(KeyUses(), "a", "b", "a", step_ms=WINDOW_MS) == [None] * 3


def test_the_same_key_is_told_of_once_in_a_window() -> None:
    uses = KeyUses()
    assert told(uses, *"abababab") == [None, None, "b", *[None] * 5]
    assert "b" in told(uses, *"abab", since_ms=2 * WINDOW_MS)


def test_a_repeat_of_what_was_seen_is_no_use() -> None:
    uses = KeyUses()
    told(uses, "a", "b")
    assert uses.saw("bot", "kid", "a", MINUTE_MS) is None, "the same requests again, after a crash"
    assert uses.saw("bot", "kid", "b", 2 * MINUTE_MS) is None
    assert uses.saw("bot", "kid", "b", 3 * MINUTE_MS) is None


def test_other_keys_and_agents_are_apart() -> None:
    uses = KeyUses()
    seen = [
        ("bot", "k1", "a"),
        ("bot", "k2", "b"),
        ("bot", "k1", "a"),
        ("two", "k1", "b"),
        ("bot", "k1", "a"),
    ]
    assert not any(uses.saw(agent, kid, mark, n) for n, (agent, kid, mark) in enumerate(seen, start=1))


def test_memory_is_bounded() -> None:
    for most_keys, told_of in ((2, None), (3, "b")):
        uses = KeyUses(most_keys=most_keys)
        for n in range(1, 4):
            uses.saw("bot", f"k{n}", "a", n)
        assert uses.saw("bot", "k1", "b", 4) is None
        assert uses.saw("bot", "k1", "a", 5) == told_of, "whose first use was forgotten is not told of"
    many = KeyUses()
    assert not any(told(many, *(f"m{n}" for n in range(50))))


def test_a_process_has_one_mark_and_its_child_another() -> None:
    assert process_id() == process_id()
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, process_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100).decode() not in ("", process_id())
    os.close(reader)
    os.close(writer)


# --- at a gateway ---


class Heard:
    """What a gateway's runtime is to who tells of shared keys: a clock, a trust domain, events."""

    def __init__(self) -> None:
        self.clock, self.settings = FixedClock(), SimpleNamespace(trust_domain=TD)
        self.events: list[dict[str, Any]] = []
        self.received = asyncio.Event()

    async def event(self, kind: str, subject: str, **fields: Any) -> None:
        self.events.append({"kind": kind, **fields})
        self.received.set()


async def test_two_addresses_at_once_are_told_of_by_the_gateway() -> None:
    heard = Heard()
    shared = SharedKeys(cast(Any, heard), KeyUses())
    telling = asyncio.create_task(shared.report())
    try:
        for address in ("10.0.0.1", "10.0.0.1", None, "10.0.0.2", "10.0.0.1", "10.0.0.2"):
            heard.clock.ms += 1000
            shared.used("bot", "kid", address)
        async with asyncio.timeout(WITHIN_S):
            await heard.received.wait()
    finally:
        telling.cancel()
    (event,) = heard.events
    assert (event["kind"], event["agent_id"], event["reasons"][0].code) == ("finding", "bot", "key_shared")
    assert "10.0.0.1 and 10.0.0.2" in event["reasons"][0].message
