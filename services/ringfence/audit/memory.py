"""The working state of audit: creates its SQLite files, holds facts of requests and leases, and detects replays.

Facts and the replay index are in memory, and bounded. The SQLite files are private to audit's user, and created anew
at each start from the topics.
"""

from __future__ import annotations

import os
import sqlite3
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ringfence.kernel.base.ids import digest
from ringfence.kernel.base.private_files import make_private_folder, open_private
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.messages.lease import Delegator

_BESIDE = ("", "-journal", "-wal", "-shm")
"""Suffixes of the files that SQLite keeps beside a database. They take the mode of the database file."""


def new_database(file: Path | None) -> sqlite3.Connection:
    """Create an empty database, in memory if `file` is None. Deletes old files. Raises OSError, NotPrivateError."""
    if file is None:
        return sqlite3.connect(":memory:", isolation_level=None)
    make_private_folder(file.parent)
    for suffix in _BESIDE:
        file.with_name(f"{file.name}{suffix}").unlink(missing_ok=True)
    os.close(open_private(file, os.O_RDWR | os.O_EXCL))
    return sqlite3.connect(file, isolation_level=None)


@dataclass(slots=True)
class RequestFacts:
    """Facts of one verified request: from its claims, the registry's records, and the decision that followed."""

    request_id: str
    compact: str
    digest: str
    signer: str
    agent: str
    act: tuple[str, ...]
    """The agent, then the agents that delegated the task to it, the nearest first."""
    task: str
    target: str
    permissions: list[dict[str, Any]]
    privileges: list[str]
    scope_text: str
    ttl_s: int
    delivery: str | None
    """As requested; None if the request left it to the target."""
    reason: str
    sponsor: str | None
    on_behalf_of: str | None
    break_glass: bool = False
    instance: dict[str, Any] | None = None
    """The enrolled instance that asked, if any."""
    approvers: tuple[str, ...] = ()
    approver_keys: tuple[tuple[str, str], ...] = ()
    """Each with the key (`kid`) by which they approved."""
    decision: str | None = None
    policy_revision: str | None = None
    traceparent: str | None = None


@dataclass(frozen=True, slots=True)
class LeaseFacts:
    """Facts of one lease, from its own records."""

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
    scope_text: str
    traceparent: str | None


class Sighting(NamedTuple):
    """Coordinates of the first sighting of a message, and the mark that tells two contents with one id apart."""

    partition: int
    offset: int
    signature: str


class SeenMessages:
    """Replay detection: the first sighting of each signed message, by topic, `iss` and `jti`.

    Bounded, and lost with the process. It only serves reports: services that act on messages refuse replays by their
    own durable means.
    """

    def __init__(self, size: int) -> None:
        self._seen: BoundedDict[tuple[str, str, str], Sighting] = BoundedDict(size)

    def first(self, topic: str, iss: str, jti: str, sighting: Sighting) -> Sighting | None:
        """The first sighting of a message if it was at other coordinates. Otherwise None, and `sighting` is kept."""
        key = (topic, iss, jti if len(jti) <= 64 else digest(jti))
        first = self._seen.get(key)
        if first is None:
            self._seen[key] = sighting
            return None
        return None if (first.partition, first.offset) == (sighting.partition, sighting.offset) else first
