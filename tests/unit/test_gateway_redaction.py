"""The injected secret in answers: one with spaces, whole and in parts, and at a cost that a target cannot raise."""

from __future__ import annotations

import base64
import html
import itertools
import json
import random
import secrets
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any
from urllib.parse import quote, quote_plus

import pytest

from ringfence.gateway.dataplane import secret_redaction
from ringfence.gateway.dataplane.secret_redaction import (
    MAX_UNHELD_BYTES,
    MIN_NEEDLE_BYTES,
    Redactor,
    needles_of,
    redact,
)

PHRASE = "correct horse battery staple of Möbius & sons"
VALUES = {
    "in a header of its own": PHRASE,
    "by bearer": f"Bearer {PHRASE}",
    "with a scheme of their own": f"Splunk {PHRASE}",
    "as a password": "Basic " + base64.b64encode(f"maria:{PHRASE}".encode()).decode(),
}
SPELLINGS: dict[str, Callable[[str], str]] = {
    "as it is": str,
    "JSON": lambda text: json.dumps(text)[1:-1],
    "JSON, UTF-8": lambda text: json.dumps(text, ensure_ascii=False)[1:-1],
    "percent": quote,
    "percent, all": lambda text: quote(text, safe=""),
    "form": quote_plus,
    "HTML": html.escape,
    "base64": lambda text: base64.b64encode(text.encode()).decode().rstrip("="),
    "base64, URL": lambda text: base64.urlsafe_b64encode(text.encode()).decode().rstrip("="),
    "hexadecimal": lambda text: text.encode().hex(),
}


def runs(phrase: str) -> list[str]:
    """Every part of a phrase, of whole words, that is long enough to be searched for."""
    words = phrase.split(" ")
    pairs = itertools.combinations(range(len(words) + 1), 2)
    found = [" ".join(words[start:end]) for start, end in pairs]
    return [part for part in found if len(part.encode()) >= MIN_NEEDLE_BYTES]


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_secret_with_spaces_is_found_whole(value: str, spelled: Callable[[str], str]) -> None:
    needles = needles_of((value,))
    shown = spelled(PHRASE).encode()
    # The last character of base64 depends on what follows.
    hidden = redact(b"<" + shown + b">", needles)[1:-1]
    assert len(hidden) == len(shown)
    assert hidden[:-1].replace(b"*", b"") == b""


@pytest.mark.parametrize("spelled", SPELLINGS.values(), ids=SPELLINGS)
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_a_secret_with_spaces_is_found_in_parts(value: str, spelled: Callable[[str], str]) -> None:
    needles = needles_of((value,))
    assert len(runs(PHRASE)) > 20
    for part in runs(PHRASE):
        shown = spelled(part).encode()
        hidden = redact(b"<" + shown + b">", needles)[1:-1]
        left = max(hidden.split(b"*"), key=len)
        # Spaces between, and of base64 what depends on what stands beside it.
        assert len(left) <= 3, (part, hidden)


def test_the_name_of_a_scheme_is_no_part_of_the_secret() -> None:
    needles = needles_of((f"Bearer {PHRASE}",))
    assert redact(b"WWW-Authenticate: Bearer realm=x", needles) == b"WWW-Authenticate: Bearer realm=x"


def test_a_secret_of_very_many_words_is_searched_for_as_a_whole_and_in_some() -> None:
    words = [f"word{number:04}" for number in range(2000)]
    needles = needles_of((" ".join(words),))
    assert len(needles) < 600
    whole = " ".join(words).encode()
    assert redact(whole, needles) == b"*" * len(whole)
    assert sum(b"*" in redact(word.encode(), needles) for word in words) >= secret_redaction.MAX_PARTS // 2


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50, 1000])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_secret_is_redacted_in_pieces_of_any_size(value: str, size: int) -> None:
    """At most `MAX_UNHELD_BYTES` of a beginning are not held back. Hiding one part hides no beginning of another."""
    needles = needles_of((value,))
    for text in (
        PHRASE,
        f"{PHRASE} {PHRASE}",
        f"correct {PHRASE}",
        f"horse battery horse battery staple {PHRASE}",
    ):
        data = b"<<<<<<" + text.encode() + b">>>>>>"
        redactor, got = Redactor(needles), b""
        for at in range(0, len(data), size):
            got += redactor.feed(data[at : at + size])
        got += redactor.last(b"")
        assert len(got) == len(data)
        for part in runs(PHRASE):
            assert part.encode() not in got
        whole = redact(data, needles)
        shown = [at for at in range(len(data)) if got[at] != whole[at]]
        for at in shown:  # no more than the beginning of something hidden
            assert bytes(data[at : at + 1]) == got[at : at + 1]
            assert at - MAX_UNHELD_BYTES < 0 or any(
                got[near] == whole[near] for near in range(at - MAX_UNHELD_BYTES, at)
            )


def test_prefix_matcher_finds_the_longest_beginning() -> None:
    """The longest beginning, also after another one came to nothing, with needles of two letters."""
    numbers = random.Random(1)
    for _ in range(3000):
        needle = bytes(numbers.choices(b"ab", k=numbers.randint(6, 9)))
        beginning, data = secret_redaction.PrefixMatcher(needle), b""
        for _ in range(6):
            piece = bytes(numbers.choices(b"ab", k=numbers.randint(1, 12)))
            length = beginning.follow(piece)
            data += piece
            assert data.endswith(needle[:length])
            if needle not in data:
                longest = max(k for k in range(len(needle)) if data.endswith(needle[:k]))
                assert length == longest, (needle, data)


# --- what it costs ----------------------------------------------------------------------------------------------------


def lines_run(work: Callable[[], Any]) -> int:
    """How many lines of the module were run, whatever the machine does meanwhile."""
    count = 0

    def in_module(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal count
        count += event == "line"
        return in_module

    def on_call(frame: FrameType, event: str, _: Any) -> Any:
        return in_module if frame.f_code.co_filename == secret_redaction.__file__ else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


TOKEN = b"eyJhbGciOiJFUzI1NiIs" + secrets.token_hex(1000).encode()
HOSTILE = {
    "its first letter": (TOKEN, b"e"),
    "its beginning": (TOKEN, TOKEN[:5]),
    "most of it": (TOKEN, TOKEN[:-1]),
    "half of it": (TOKEN, TOKEN[:1000] + b"!"),
    "all of it": (TOKEN, TOKEN),
    "a secret of one letter": (b"a" * 2000, b"a" * 1999 + b"b"),
    "a secret that repeats itself": (b"ab" * 1000, b"ab" * 999 + b"b"),
    "a secret that nearly does": (b"a" * 1000 + b"b" + b"a" * 999, b"a" * 1999),
}


@pytest.mark.parametrize("size", [1, 3, 64, 1500, 5000])
@pytest.mark.parametrize(("needle", "said"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_answer_costs_no_more_than_its_length(needle: bytes, said: bytes, size: int) -> None:
    """A few lines a byte, whatever a target sends, and however little at a time."""
    data = (said * (6000 // len(said) + 1))[:6000]
    secret_redaction._failure_table(needle)  # once for each secret

    def read() -> None:
        beginning = secret_redaction.PrefixMatcher(needle)
        for at in range(0, len(data), size):
            beginning.follow(data[at : at + size])

    assert lines_run(read) <= 20 * len(data) + 100
