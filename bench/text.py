"""The time to mark hidden characters in a text as long as the longest request."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from ringfence.kernel.base.text import visible, visible_lines, visible_name

_BYTES: Final = 46 * 1024
_TIMES: Final = 20
_TEXTS: Final = {"ASCII": "env/staging/a b ", "other letters": "ümlaut/ж/", "hidden": "a\u202eb\u200d"}


def run(_: str) -> None:
    """Print milliseconds for each function and kind of text."""
    for kind, unit in _TEXTS.items():
        text = (unit * _BYTES).encode()[:_BYTES].decode(errors="ignore")
        took = ", ".join(
            f"{mark.__name__} {_took_ms(mark, text):.2f} ms"
            for mark in (visible, visible_lines, visible_name)
        )
        print(f"46 KB of {kind}: {took}")


def _took_ms(mark: Callable[[str], str], text: str) -> float:
    best = []
    for _ in range(_TIMES):
        began = time.perf_counter()
        mark(text)
        best.append(time.perf_counter() - began)
    return min(best) * 1000
