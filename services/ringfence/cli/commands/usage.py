"""What an agent used of what it may hold, for `ringfence agent show`, and a ceiling that would do."""

from __future__ import annotations

import shlex
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ringfence.cli.shared.output import note, print_table, say, span, until, visible_name
from ringfence.cli.shared.scopes import show_permission, write_permission
from ringfence.messages.permission import Permission

_MONTH_S = 30 * 86_400


def set_ceiling_command(
    agent_id: str, narrower: Sequence[Mapping[str, Any]] | None, me: Path | None
) -> str | None:
    """The command line that narrows the agent's ceiling to what it used, for a shell; None where it used all of it.

    Args:
        narrower: what policy says would do.
        me: the key file that was named on this command line, and has to be on that one.
    """
    if narrower is None:
        return None
    words = ["ringfence", *(["--identity", str(me)] if me else []), "agent", "set-ceiling", agent_id]
    for permission in map(_permission, narrower):
        words += ["--allow", write_permission(permission)]
    return shlex.join(words if narrower else [*words, "--allow-nothing"])


def print_usage(usage: Mapping[str, Any], command: str | None) -> None:
    """What was used of what is granted, what is held now, and the narrower ceiling, for people."""
    now_s = time.time()
    print_table(
        ["!target", "!verb", "in its ceiling", "used on", "first", "last"],
        _rows(usage),
        empty="it may hold nothing, and used nothing",
    )
    for lease in usage["held"]:
        what = "; ".join(show_permission(_permission(permission)) for permission in lease["scope"])
        say(f"holds {what} by lease {lease['lease_id']}, until {until(lease['deadline'], now_s)}")
    if command is None:
        return
    count = len(usage["never_used"])
    say(
        f"{count} of these it did not use since {_day(usage['since'])}. To narrow its ceiling to what it used:"
    )
    say(command)
    if (age_s := now_s - usage["registered_at"]) < _MONTH_S:
        note(f"it was registered {span(age_s)} ago: what it needs may be still to come", "yellow")


def _rows(usage: Mapping[str, Any]) -> list[Sequence[str]]:
    granted = {(p["target"], verb) for p in usage["ceiling"] for verb in p["verbs"]}
    used = {(one["target"], one["verb"]): one for one in usage["used"]}
    rows: list[Sequence[str]] = []
    for target, verb in sorted(granted | used.keys()):
        one = used.get((target, verb))
        days = f"{one['days']} day{'s' if one['days'] > 1 else ''}" if one else "no day"
        times = (_day(one["first_used"]), _day(one["last_used"])) if one else ("", "")
        inside = "yes" if (target, verb) in granted else "no more"
        rows.append((visible_name(target), visible_name(verb), inside, days, *times))
    return rows


def _permission(document: Mapping[str, Any]) -> Permission:
    # Not strict: JSON has no tuples.
    return Permission.model_validate(document, strict=False)


def _day(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d")
