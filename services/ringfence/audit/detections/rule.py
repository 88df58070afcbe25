"""Detection rules: their protocol, input (`TrailEvent`) and output (`Finding`). Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from ringfence.kernel.base.ids import derived_id
from ringfence.messages.topics import AUDITED
from ringfence.model.audit_log.chain import Source

CODE_PREFIX = "detection."
"""Prefix of the event codes of findings. Rules never judge findings."""
_NAMES = ("agent", "sponsor", "on_behalf_of", "task", "request", "lease", "target", "trace_id")
_MORE = ("act", "verified")
_TOPICS = frozenset(topic.what for topic in AUDITED)


class EventSummary(NamedTuple):
    """The part of an event that rules keep while they wait for others."""

    uid: str
    code: str
    time_ms: int
    key: str
    log_name: str
    source: Source
    fields: Mapping[str, Any]

    def field(self, name: str) -> str | None:
        """A field that is an id, or None."""
        value = self.fields.get(name)
        return value if isinstance(value, str) else None


class TrailEvent(NamedTuple):
    """An event from `audit`: its summary and its whole body."""

    summary: EventSummary
    body: Mapping[str, Any]

    @property
    def code(self) -> str:
        return self.summary.code

    def field(self, name: str) -> Any:
        """Any field of `unmapped`."""
        return self.body["unmapped"].get(name)


@dataclass(frozen=True, slots=True)
class Finding:
    """A finding of a rule.

    `rule` and `subject` make its uid, so every replica that finds the same makes the same event. `standing`: it holds
    until somebody acts on it, and is published however old it is; others are published only if their
    event is younger than a day.
    """

    rule: str
    subject: tuple[str | int, ...]
    at_ms: int
    message: str
    trigger: EventSummary
    """The event that completed the pattern."""
    evidence: tuple[str, ...]
    """Uids of the events that it rests on."""
    standing: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uid(self) -> str:
        return derived_id(CODE_PREFIX + self.rule, *self.subject)


class Rule(Protocol):
    """A detection rule: keeps bounded state, gets events, returns findings."""

    def wants(self, code: str, log_name: str) -> bool:
        """Whether the rule needs events with this code, about records of this topic."""
        ...

    def observe(self, event: TrailEvent, now_ms: int) -> Iterable[Finding]:
        """Process an event; return the findings that it completes. `now_ms`: when audit read it."""
        ...

    def due(self, now_ms: int) -> Iterable[Finding]:
        """Findings that follow from the passing of time."""
        ...


class TrailQueries(Protocol):
    """The queries of rules over the trail so far."""

    def has_event(self, kind: Literal["request", "lease"], id: str, codes: Sequence[str]) -> bool: ...

    def ended_at(self, lease: str, ends: Collection[str]) -> tuple[str, int] | None:
        """(uid of the event that shows it, time in ms) of the earliest end of a lease, or None.

        The end is an event with a code of `ends`, or the deadline in its issue.
        """
        ...


def read_event(event: Mapping[str, Any], key: str) -> TrailEvent:
    """Parse an event. Raises KeyError, TypeError or ValueError if audit did not write it."""
    fields, metadata = event["unmapped"], event["metadata"]
    if metadata["log_name"] not in _TOPICS:
        raise ValueError("no such topic is audited")
    source = fields["source"]
    summary = EventSummary(
        str(metadata["uid"]),
        str(metadata["event_code"]),
        int(event["time"]),
        key,
        str(metadata["log_name"]),
        Source(str(source["topic"]), int(source["partition"]), int(source["offset"])),
        {name: value for name in _NAMES if isinstance(value := fields.get(name), str)}
        | {name: fields[name] for name in _MORE if name in fields},
    )
    return TrailEvent(summary, event)
