"""Records that code of before signed (`contract/golden/records`), for tests of whoever reads them today."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.registry import AnyRecord
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.command_chain import Authorised
from ringfence.model.records.directory import Alarm, Directory
from tests.support.in_memory_registry import RECORDS, TOPICS, FixedClock

FILE = Path(__file__).parents[1] / "contract/golden/records/v1.json"


@dataclass
class OldRecords:
    """One organisation, as its records and messages lie on Kafka."""

    document: dict[str, Any] = field(default_factory=lambda: json.loads(FILE.read_text()))
    alarms: list[Alarm] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.trust_domain: str = self.document["trust_domain"]
        self.trust = TrustStore(self.trust_domain, self.document["root_kid"])
        self.trust.load(self.document["bundle"], self.document["now_s"])
        self.clock = FixedClock(self.document["end_ms"])

    def directory(self, *, compacted: bool = False, kinds: tuple[str, ...] = tuple(TOPICS)) -> Directory:
        """A reader that has just started, with all records of these kinds; `compacted`: with the last of each alone."""
        directory = Directory(self.trust, self.clock, grace_ms=None, on_alarm=self.alarms.append)
        for one in self.last() if compacted else self.document["records"]:
            if one["kind"] in kinds:
                _admit(directory, one)
        return directory

    def admit(self, directory: Directory, record: AnyRecord) -> None:
        """Hand one of `records` to a reader."""
        (found,) = [one for one in self.document["records"] if _claims(one)["jti"] == record.jti]
        _admit(directory, found)

    def records(self) -> list[tuple[SubjectKind, str, AnyRecord]]:
        """Every record in the order in which they were written, with the kind and id of what it is about."""
        found = []
        for one in self.document["records"]:
            record = parse(one["jws"]).unverified_claims(RECORDS[one["kind"]])
            found.append((one["kind"], record.sub.rpartition("/")[2], record))
        return found

    def last(self) -> list[dict[str, Any]]:
        """The last record of each subject, in the order in which they were first written."""
        return list({_claims(one)["sub"]: one for one in self.document["records"]}.values())

    def states(self) -> list[tuple[SubjectKind, str, int, dict[str, Any]]]:
        """What each record came to when it was made: kind, id, revision and state."""
        return [(one["kind"], one["id"], one["revision"], one["state"]) for one in self.document["states"]]

    def commands(self, directory: Directory) -> list[Authorised]:
        """Every command that the records embed, authorised as it was when it came."""
        found: list[Authorised] = []
        for kind, id, _, _ in self.states():
            entry = directory.entry(kind, id)
            assert entry is not None
            commands = entry.record.commands
            found += [directory.chains.authorise(parse(one.jws), one.appended_at_ms) for one in commands]
        return sorted(found, key=lambda given: given.appended_at_ms)

    def message(self, typ: str) -> tuple[str, int]:
        """A signed message that is no command, and when it was appended."""
        (found,) = [one for one in self.document["messages"] if one["typ"] == typ]
        return found["jws"], found["appended_at_ms"]


def _claims(one: dict[str, Any]) -> dict[str, Any]:
    claims: dict[str, Any] = json.loads(parse(one["jws"]).payload)
    return claims


def _admit(directory: Directory, one: dict[str, Any]) -> None:
    topic = TOPICS[one["kind"]].name("ringfence")
    problem = directory.admit(one["kind"], topic, 0, one["jws"].encode(), one["appended_at_ms"])
    assert problem is None, problem
