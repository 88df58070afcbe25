"""The period that a question is about: `--since` and `--until`."""

from __future__ import annotations

import typer

from ringfence.cli.shared.options import duration_s, moment_s


def span_ms(since: str, until: str | None, now_ms: int) -> tuple[int, int]:
    """From when until when, in milliseconds since 1970; until now where nothing is said. Raises typer.BadParameter."""
    since_ms, until_ms = when_ms(since, now_ms), when_ms(until, now_ms) if until else now_ms
    if since_ms >= until_ms:
        raise typer.BadParameter("--since must be before --until")
    return since_ms, until_ms


def when_ms(text: str, now_ms: int) -> int:
    """So long ago, or a moment, in milliseconds since 1970. Raises typer.BadParameter."""
    try:
        return max(now_ms - duration_s(text) * 1000, 0)
    except typer.BadParameter:
        if text[:4].isdecimal() and "-" in text:
            return max(moment_s(text) * 1000, 0)
        raise
