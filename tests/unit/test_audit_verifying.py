"""Faults planted in a chain of events: each is found, wherever it is, and named."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.messages.audit import AuditCheckpoint
from ringfence.model.audit_log.chain import Source, Tip, linkable, linked
from ringfence.model.audit_log.verification import ChainVerifier, Fault

TREE = "3"
COUNT = 12
places = st.integers(0, COUNT - 1)


def event(number: int, message: str = "something happened") -> dict[str, object]:
    source = Source("ringfence.lease.v1", 3, number)
    return {
        "message": message,
        "metadata": {"uid": source.uid},
        "unmapped": {"source": {"topic": source.topic_name, "partition": 3, "offset": number}},
    }


def chain(events: Sequence[dict[str, object]], tip: Tip | None = None) -> tuple[list[bytes], list[Tip]]:
    """The events as they are published, and how far the chain has come after each."""
    tip, values, tips = tip or Tip(), [], []
    for one in events:
        value = linked(linkable(one), TREE, tip.head.size + 1, tip.last)
        tip = tip.followed_by(value)
        values.append(value)
        tips.append(tip)
    return values, tips


def checkpoint(tip: Tip) -> AuditCheckpoint:
    return AuditCheckpoint(
        iss="spiffe://example.org/service/audit",
        aud="example.org",
        iat=1,
        jti="1",
        tree=TREE,
        size=tip.head.size,
        root=tip.head.root.hex(),
        peaks=tuple(peak.hex() for peak in tip.head.peaks),
        last=tip.last.hex(),
    )


VALUES, TIPS = chain([event(number) for number in range(COUNT)])


def verify(values: Sequence[bytes], *tips: Tip, seen: Sequence[tuple[int, str]] = ()) -> list[Fault]:
    verifier = ChainVerifier(TREE, tuple(map(checkpoint, tips)), seen)
    for offset, value in enumerate(values):
        verifier.take(value, offset)
    verifier.finish()
    return verifier.faults


def kinds(faults: Sequence[Fault]) -> set[str]:
    return {fault.kind for fault in faults}


def test_untouched_chain_has_no_fault_and_the_signed_root() -> None:
    verifier = ChainVerifier(TREE, tuple(map(checkpoint, TIPS)))
    for offset, value in enumerate(VALUES):
        verifier.take(value, offset)
    verifier.finish()
    assert (verifier.faults, verifier.first, verifier.last) == ([], 1, COUNT)
    assert verifier.head == TIPS[-1].head
    assert verifier.sources[event(4)["metadata"]["uid"]] == Source("ringfence.lease.v1", 3, 4)  # type: ignore[index]


@given(st.integers(0, COUNT - 2), places)
def test_removed_events_are_named(at: int, count: int) -> None:
    until = min(at + 1 + count, COUNT - 1)
    left = [*VALUES[:at], *VALUES[until:]]
    if at == 0:
        # What is gone at the beginning may have been gone by its age: the caller holds that against the retention.
        verifier = ChainVerifier(TREE, [checkpoint(TIPS[-1])])
        for offset, value in enumerate(left):
            verifier.take(value, offset)
        verifier.finish()
        assert (verifier.faults, verifier.first) == ([], until + 1)
        return
    (fault,) = verify(left, TIPS[-1])
    assert (fault.kind, fault.seq) == ("removed", at + 1)
    assert (str(until) in fault.message) == (until > at)


@given(st.integers(0, COUNT - 2))
def test_a_changed_event_is_named_though_its_link_is_kept(at: int) -> None:
    changed = orjson.loads(VALUES[at])
    changed["message"] = "nothing happened"
    (fault,) = verify([*VALUES[:at], orjson.dumps(changed), *VALUES[at + 1 :]], TIPS[-1])
    assert (fault.kind, fault.seq) == ("changed", at + 1)
    assert fault.uid == changed["metadata"]["uid"]


def test_the_last_event_is_held_against_what_was_signed() -> None:
    changed = orjson.loads(VALUES[-1])
    changed["message"] = "nothing happened"
    values = [*VALUES[:-1], orjson.dumps(changed)]
    assert kinds(verify(values, TIPS[-1])) == {"rewritten"}
    assert kinds(verify(values, seen=[(COUNT, TIPS[-1].head.root.hex())])) == {"rewritten"}
    assert verify(values, TIPS[-2]) == []  # nobody has said anything of it yet


@given(places, places)
def test_an_event_in_another_place_is_named(a: int, b: int) -> None:
    if a == b:
        return
    values = [*VALUES]
    moved = values.pop(a)
    values.insert(b, moved)
    found = verify(values, TIPS[-1])
    assert "reordered" in kinds(found)
    assert kinds(found) <= {"reordered", "removed", "changed"}


@given(places, places)
def test_an_event_that_is_there_twice_is_named(at: int, again: int) -> None:
    again = max(again, at + 1)
    (fault,) = verify([*VALUES[:again], VALUES[at], *VALUES[again:]], TIPS[-1])
    assert (fault.kind, fault.seq, fault.offset) == ("duplicated", at + 1, again)


@given(st.integers(1, COUNT - 1))
def test_truncated_chain_is_found(at: int) -> None:
    (fault,) = verify(VALUES[:at], TIPS[-1])
    assert (fault.kind, fault.seq) == ("truncated", at + 1)
    (fault,) = verify(VALUES[:at], seen=[(COUNT, "0" * 64)])
    assert (fault.kind, fault.seq) == ("truncated", at + 1)
    assert verify(VALUES[:at], TIPS[at - 1]) == []


@given(places)
def test_a_chain_that_was_written_anew_is_not_the_signed_one(at: int) -> None:
    forged, _ = chain(
        [event(number, "forged" if number == at else "something happened") for number in range(COUNT)]
    )
    (fault,) = verify(forged, TIPS[-1])
    assert (fault.kind, fault.seq) == ("rewritten", COUNT)
    assert verify(forged) == []  # without anything signed nobody could tell


@pytest.mark.parametrize(
    "junk",
    [
        lambda: b"not even JSON",
        lambda: orjson.dumps(event(99)),
        lambda: linked(linkable(event(99)), "4", 5, bytes(32)),
        lambda: orjson.dumps({"unmapped": {"chain": 7}}),
    ],
)
@pytest.mark.parametrize("at", [1, COUNT // 2, COUNT])
def test_foreign_record_in_the_chain_is_found(junk: Callable[[], bytes], at: int) -> None:
    (fault,) = verify([*VALUES[:at], junk(), *VALUES[at:]], TIPS[-1])
    assert (fault.kind, fault.offset) == ("foreign", at)


def test_the_same_event_under_two_numbers_is_named() -> None:
    values, tips = chain([event(1), event(2), event(1)])
    (fault,) = verify(values, tips[-1])
    assert (fault.kind, fault.seq) == ("duplicated", 3)


def test_a_fork_is_named() -> None:
    other, _ = chain([event(77)], TIPS[4])
    (fault,) = verify([*VALUES[:6], *other, *VALUES[6:]], TIPS[-1])
    assert (fault.kind, fault.seq) == ("duplicated", 6)


def test_events_from_before_there_was_a_chain_are_counted() -> None:
    verifier = ChainVerifier(TREE)
    for offset, value in enumerate([orjson.dumps(event(50)), *VALUES]):
        verifier.take(value, offset)
    verifier.finish()
    assert (verifier.faults, verifier.unchained) == ([], 1)
    assert len(verifier.sources) == COUNT + 1


@given(st.integers(1, COUNT - 1))
def test_checkpoint_before_an_expired_beginning_still_gives_the_root(at: int) -> None:
    for known, whole in ([TIPS[at - 1], TIPS[-1]], True), ([TIPS[-1]], False):
        verifier = ChainVerifier(TREE, tuple(map(checkpoint, known)))
        for offset, value in enumerate(VALUES[at:]):
            verifier.take(value, offset)
        verifier.finish()
        assert verifier.faults == []
        assert verifier.head == (TIPS[-1].head if whole else None)
    changed = orjson.loads(VALUES[at])
    changed["message"] = "nothing happened"
    assert verify([orjson.dumps(changed), *VALUES[at + 1 :]], TIPS[at - 1], TIPS[-1])


@given(
    st.lists(st.tuples(st.sampled_from(["drop", "edit", "swap", "double"]), places), min_size=1, max_size=4)
)
def test_no_history_of_tampering_passes(steps: list[tuple[str, int]]) -> None:
    values = [*VALUES]
    for what, at in steps:
        place = at % len(values)
        match what:
            case "drop" if len(values) > 1:
                del values[place]
            case "edit":
                told = orjson.loads(values[place])
                told["message"] += "!"
                values[place] = orjson.dumps(told)
            case "swap":
                values[place - 1], values[place] = values[place], values[place - 1]
            case _:
                values.insert(place, values[place])
    found = verify(values, TIPS[-1])
    only_the_beginning = values == VALUES[COUNT - len(values) :]
    assert bool(found) != (values == VALUES or only_the_beginning)
