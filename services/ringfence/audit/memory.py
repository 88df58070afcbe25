"""What audit remembers between records, all of it bounded: what a request was about, and which messages it has seen."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar

from ringfence.kernel.base.ids import digest
from ringfence.messages.lease import Delegator

K = TypeVar("K")
V = TypeVar("V")


class Recent(Generic[K, V]):
    """The latest entries, up to a number; the oldest go first."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._entries: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K) -> V | None:
        return self._entries.get(key)

    def put(self, key: K, value: V) -> None:
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._size:
            self._entries.popitem(last=False)

    def __len__(self) -> int:
        return len(self._entries)


@dataclass(slots=True)
class RequestFacts:
    """What is known of one request: from its own signature, from the records, and from what came after it."""

    request_id: str
    compact: str
    digest: str
    signer: str
    agent: str
    act: tuple[str, ...]
    """It and those that handed the task on to it, the last to do so first."""
    task: str
    target: str
    permissions: list[dict[str, Any]]
    privileges: list[str]
    words: str
    ttl_s: int
    delivery: str
    reason: str
    sponsor: str | None
    on_behalf_of: str | None
    break_glass: bool = False
    instance: dict[str, Any] | None = None
    """The running instance that asked, where it was one."""
    approvers: tuple[str, ...] = ()
    decision: str | None = None
    policy_revision: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class LeaseFacts:
    """What is known of one lease, from its own records."""

    lease_id: str
    request_id: str
    agent: str
    act: tuple[str, ...]
    delegators: tuple[Delegator, ...]
    sponsor: str
    on_behalf_of: str
    task: str
    target: str
    privileges: list[str] = field(repr=False)
    permissions: list[dict[str, Any]] = field(repr=False)
    words: str
    traceparent: str | None


class Sighting(NamedTuple):
    """Where a message was first seen, and the end of its signature, which tells two texts apart."""

    partition: int
    offset: int
    signature: str


class SeenMessages:
    """The signed messages of each topic, by (`iss`, `jti`), and where each was seen first.

    Bounded, and gone with the process: services that act on a message have their own way to refuse a replay, and it
    does not rest on a memory.
    """

    def __init__(self, size: int) -> None:
        self._seen: Recent[tuple[str, str, str], Sighting] = Recent(size)

    def first(self, topic: str, iss: str, jti: str, here: Sighting) -> Sighting | None:
        """Where the message stood when it was seen first, if that was elsewhere; else None, and it is remembered."""
        key = (topic, iss, jti if len(jti) <= 64 else digest(jti))
        known = self._seen.get(key)
        if known is None:
            self._seen.put(key, here)
            return None
        return None if (known.partition, known.offset) == (here.partition, here.offset) else known
