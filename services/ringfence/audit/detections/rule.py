"""What the rules of detection are handed, and what they find. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from ringfence.kernel.base.ids import derived_id
from ringfence.messages.topics import AUDITED
from ringfence.model.audit_log.chain import Source

CODE_PREFIX = "detection."
"""Of the event codes of all that is found here: nothing is found about findings."""
_NAMES = ("agent", "sponsor", "on_behalf_of", "task", "request", "lease", "target", "trace_id")
_MORE = ("act", "verified")
_TOPICS = frozenset(topic.what for topic in AUDITED)


class EventSummary(NamedTuple):
    """What is kept of an event for as long as something may come of it."""

    uid: str
    code: str
    time_ms: int
    key: str
    log_name: str
    source: Source
    fields: Mapping[str, Any]

    def field(self, name: str) -> str | None:
        """One of the words that name something."""
        value = self.fields.get(name)
        return value if isinstance(value, str) else None


class TrailEvent(NamedTuple):
    """An event as it came from `audit`."""

    summary: EventSummary
    body: Mapping[str, Any]

    @property
    def code(self) -> str:
        return self.summary.code

    def field(self, name: str) -> Any:
        """Any of its words."""
        return self.body["unmapped"].get(name)


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that somebody should know of.

    `rule` and `subject` make its uid, so whoever finds the same makes the same event. `standing`: it is so until
    somebody does something about it, however long ago it began; others are told only while they are news.
    """

    rule: str
    subject: tuple[str | int, ...]
    at_ms: int
    message: str
    trigger: EventSummary
    """The event that completed the pattern."""
    evidence: tuple[str, ...]
    """The uids of the events that it rests on."""
    standing: bool = False
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def uid(self) -> str:
        return derived_id(CODE_PREFIX + self.rule, *self.subject)


class Rule(Protocol):
    """State in, event in, findings out."""

    def wants(self, code: str, log_name: str) -> bool:
        """Whether an event with this code, about a record of this topic, may mean anything to it."""
        ...

    def observe(self, event: TrailEvent, now_ms: int) -> Iterable[Finding]:
        """An event came; what it completes. `now_ms`: when it came, for what waits for others to come."""
        ...

    def due(self, now_ms: int) -> Iterable[Finding]:
        """What has been found by time alone."""
        ...


class TrailQueries(Protocol):
    """What stands on the trail, asked by what happened."""

    def has_event(self, kind: Literal["request", "lease"], id: str, codes: Sequence[str]) -> bool:
        """Whether there is an event with one of these codes about a `request` or a `lease`."""
        ...

    def ended_at(self, lease: str, ends: Collection[str]) -> tuple[str, int] | None:
        """The earliest moment at which a lease was over, in ms: that of an event with one of the codes `ends`, or its
        deadline; with the uid of the event that says so. None where none does.
        """
        ...


def read_event(event: Mapping[str, Any], key: str) -> TrailEvent:
    """Raises KeyError, TypeError or ValueError where audit did not write the event."""
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
