"""The tree of `ringfence audit trace`: who, for whom, why, and when each step was."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Final

from rich.text import Text

from ringfence.cli.shared.tables import short_ids, wrapped
from ringfence.kernel.base.clock import utc_text
from ringfence.kernel.base.text import visible

_STYLES = {
    "user": "heading",
    "task": "heading",
    "lease": "ok",
    "decision": "decision",
    "approval": "approval",
}
_ENDS = {"cut": "warning", "end": "warning", "revocation": "warning"}
FAILED: Final = "denied"
"""The style of what failed or was refused."""
_WITH_ID = ("task", "request", "lease")
_LEAST_WIDTH = 30
"""The least columns for the text of a node, however deep it stands."""


def trace_lines(story: Mapping[str, Any], *, width: int | None) -> list[Text]:
    """Return the answer of `GET /v1/trace/{id}` as lines of at most `width` columns; None is no limit.

    With a limit, ids are shortened. Siblings are in the order of time.
    """
    nodes = [node for root in story["roots"] for node in _all_nodes(root)]
    shown = short_ids(str(node["id"]) for node in nodes if node["kind"] in _WITH_ID) if width else {}
    lines = [Text(visible(f"{story['kind']} {story['id']}"), style="heading")]
    for number, root in enumerate(story["roots"]):
        lines += _node_lines(root, "", number == len(story["roots"]) - 1, None, width, shown)
    return lines


def clock(at_ms: int | None, *, date: bool) -> str:
    """Return a time in UTC to the millisecond, with its date or without."""
    if at_ms is None:
        return ""
    return utc_text(at_ms / 1000, f"{'%Y-%m-%d ' if date else ''}%H:%M:%S.{at_ms % 1000:03}Z")


def _all_nodes(node: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    yield node
    for child in node["children"]:
        yield from _all_nodes(child)


def _node_lines(
    node: Mapping[str, Any],
    above: str,
    last: bool,
    day: str | None,
    width: int | None,
    shown: Mapping[str, str],
) -> Iterator[Text]:
    """Yield the lines of a node and of what is below it. `above`: what stands before its branch."""
    at_ms = node.get("at_ms")
    here = clock(at_ms, date=True)[:10] if at_ms is not None else day
    # The date is printed where it changes, which is rare within one trace.
    when = f"{clock(at_ms, date=here != day)} " if at_ms is not None else ""
    title = visible(str(node["title"]))
    after = f"  +{_after(node['duration_ms'])}" if node.get("duration_ms") is not None else ""
    id = str(node["id"])
    after += f"  {node['kind']} {visible(shown.get(id, id))}" if node["kind"] in _WITH_ID else ""
    text = f"{when}{title}{after}"
    branch, below = _guides(last)
    lines = (
        [text] if width is None else wrapped(text, max(width - len(above) - 2 * len(branch), _LEAST_WIDTH))
    )
    style = FAILED if node["kind"] == "decision" and "refused" in title else ""
    style = style or _STYLES.get(node["kind"]) or _ENDS.get(node["kind"], "")
    further = above + below + (_guides(last=False)[1] if node["children"] else "    ")
    for number, line in enumerate(lines):
        shown_line = Text().append(above + branch if not number else further, "aside")
        body = Text(line, style=style)
        if not number:
            body.stylize("not bold dim", 0, len(when))
        if number == len(lines) - 1 and after and line.endswith(after.strip()):
            body.stylize("not bold dim", len(line) - len(after.strip()))
        yield shown_line.append_text(body)
    for number, child in enumerate(node["children"]):
        yield from _node_lines(child, above + below, number == len(node["children"]) - 1, here, width, shown)


def _guides(last: bool) -> tuple[str, str]:
    """Return what leads to a node, and what stands below that: drawn, or plain where the encoding has no lines."""
    if (sys.stdout.encoding or "utf-8").lower().replace("-", "") != "utf8":
        return ("`-- ", "    ") if last else ("+-- ", "|   ")
    return ("└── ", "    ") if last else ("├── ", "│   ")


def _after(ms: int) -> str:
    if ms < 1000:
        return f"{ms} ms"
    return f"{ms / 1000:.1f} s" if ms < 60_000 else f"{ms // 60_000} min {ms // 1000 % 60} s"
