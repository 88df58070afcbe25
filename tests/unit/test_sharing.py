"""Two that use one key at once are noticed; one that starts again is not taken for two."""

from __future__ import annotations

import os

from ringfence.client.process_mark import process_mark
from ringfence.model.sharing import WINDOW_MS, KeyUses

MINUTE_MS = 60_000


def told(uses: KeyUses, *marks: str | None, step_ms: int = MINUTE_MS, since_ms: int = 0) -> list[str | None]:
    return [uses.saw("bot", "kid", mark, since_ms + step_ms * n) for n, mark in enumerate(marks, start=1)]


def test_one_process_is_one() -> None:
    assert told(KeyUses(), "a", "a", "a", None, "a") == [None] * 5


def test_a_restart_is_no_sharing() -> None:
    assert told(KeyUses(), "a", "a", "b", "b", "c", "c") == [None] * 6


def test_two_at_once_are_told_by_the_other() -> None:
    assert told(KeyUses(), "a", "b", "a") == [None, None, "b"]


def test_what_lies_far_apart_is_not_at_once() -> None:
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
    assert uses.last_seen("bot") == {"k1": 5, "k2": 2}
    assert uses.last_seen("nobody") == {}


def test_memory_is_bounded() -> None:
    uses = KeyUses(most_keys=2)
    for n in range(1, 4):
        uses.saw("bot", f"k{n}", "a", n)
    assert uses.last_seen("bot") == {"k2": 2, "k3": 3}
    many = KeyUses()
    assert not any(told(many, *(f"m{n}" for n in range(50))))


def test_a_process_has_one_mark_and_its_child_another() -> None:
    assert process_mark() == process_mark()
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, process_mark().encode())
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 100).decode() not in ("", process_mark())
    os.close(reader)
    os.close(writer)
