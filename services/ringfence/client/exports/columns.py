"""Columns of an audit event in CSV. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal, NamedTuple

from ringfence.kernel.base.clock import utc_datetime

Cell = str | int | bool | None
Kind = Literal["text", "number", "truth"]


class ExportColumn(NamedTuple):
    """One column: its name, its type, and its value in an event."""

    name: str
    kind: Kind
    value: Callable[[Mapping[str, Any]], Any]


def _at(path: str, kind: Kind = "text", name: str | None = None) -> ExportColumn:
    parts = path.split(".")

    def value(event: Mapping[str, Any]) -> Any:
        member: Any = event
        for part in parts:
            member = member.get(part) if isinstance(member, Mapping) else None
        return member

    return ExportColumn(name or parts[-1], kind, value)


def _word(word: str, kind: Kind = "text") -> ExportColumn:
    return _at(f"unmapped.{word}", kind, word.replace(".", "_"))


def _timestamp(at_ms: int) -> str:
    """Return a time (ms) as ISO 8601 with milliseconds."""
    return utc_datetime(at_ms / 1000).strftime("%Y-%m-%dT%H:%M:%S.") + f"{at_ms % 1000:03}Z"


def _actor_of(event: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the actor of an event. A finding has it among its evidences; a logon is by its user."""
    holder = event if "actor" in event else next(iter(event.get("evidences", ())), {})
    actor: Mapping[str, Any] = holder.get("actor", {}).get("user") or event.get("user") or {}
    return actor


COLUMNS: Final = (
    ExportColumn("time", "text", lambda event: _timestamp(event["time"])),
    _at("time", "number", "time_ms"),
    _at("metadata.uid"),
    _at("metadata.event_code"),
    _at("class_uid", "number"),
    _at("class_name"),
    _at("activity_name"),
    _at("status"),
    _at("status_code"),
    _at("status_detail"),
    _at("severity"),
    _at("severity_id", "number"),
    _at("is_alert", "truth"),
    _at("message"),
    ExportColumn("actor", "text", lambda event: _actor_of(event).get("name")),
    ExportColumn("actor_uid", "text", lambda event: _actor_of(event).get("uid")),
    _word("agent"),
    _word("act"),
    _word("sponsor"),
    _word("on_behalf_of"),
    _word("task"),
    _word("request"),
    _word("lease"),
    _word("target"),
    _word("verb"),
    _word("resource"),
    _word("outcome"),
    _word("approvers"),
    _word("deadline", "number"),
    _word("policy_revision"),
    _word("trace_id"),
    _word("verified.by"),
    _word("chain.tree"),
    _word("chain.seq", "number"),
    _word("source.topic"),
    _word("source.partition", "number"),
    _word("source.offset", "number"),
)


def row_of(event: Mapping[str, Any]) -> list[Cell]:
    """Return the cells of an event, one a column. A value of another type than its column is left out."""
    return [_cell(column.kind, column.value(event)) for column in COLUMNS]


def _cell(kind: Kind, value: Any) -> Cell:
    if kind == "truth":
        return value if type(value) is bool else None
    if kind == "number":
        return value if type(value) is int else None
    if isinstance(value, list):
        return " ".join(one for one in value if isinstance(one, str))
    return value if isinstance(value, str) else None
