"""Each kind of fault, planted in each position of a trail of several chains: it is named, and nothing else is.

A chain has thirty events, written five at a time, and is signed after every tenth.
"""

from __future__ import annotations

from collections.abc import Callable

import orjson
import pytest

from ringfence.messages.audit import AuditCheckpoint
from ringfence.model.audit_log.chain import Source, Tip, linkable, linked
from ringfence.model.audit_log.verification import ChainVerifier, Fault

TREES = ("0", "1", "2")
COUNT, BATCH, SIGNED = 30, 5, 10
PLACES = {
    "first": 1,
    "second": 2,
    "last of a batch": BATCH,
    "first of a batch": BATCH + 1,
    "last before a checkpoint": SIGNED,
    "first after a checkpoint": SIGNED + 1,
    "middle": 17,
    "last but one": COUNT - 1,
    "last": COUNT,
}
EACH_PLACE = pytest.mark.parametrize("seq", PLACES.values(), ids=PLACES)
EACH_TREE = pytest.mark.parametrize("tree", TREES)
Trail = dict[str, list[bytes]]


def event(tree: str, number: int) -> dict[str, object]:
    source = Source("ringfence.lease.v1", int(tree), number)
    words = {"source": {"topic": source.topic_name, "partition": source.partition, "offset": number}}
    return {"message": "something happened", "metadata": {"uid": source.uid}, "unmapped": words}


def chain(tree: str) -> tuple[list[bytes], list[AuditCheckpoint]]:
    tip, values, signed = Tip(), list[bytes](), list[AuditCheckpoint]()
    for number in range(COUNT):
        value = linked(linkable(event(tree, number)), tree, tip.head.size + 1, tip.last)
        tip = tip.followed_by(value)
        values.append(value)
        if tip.head.size % SIGNED == 0:
            signed.append(checkpoint(tree, tip))
    return values, signed


def checkpoint(tree: str, tip: Tip) -> AuditCheckpoint:
    return AuditCheckpoint(
        iss="spiffe://example.org/service/audit", aud="example.org", iat=1, jti="1", tree=tree,
        size=tip.head.size, root=tip.head.root.hex(), peaks=tuple(peak.hex() for peak in tip.head.peaks),
        last=tip.last.hex(),
    )  # fmt: skip


CHAINS = {tree: chain(tree) for tree in TREES}


def uid(tree: str, seq: int) -> str:
    return Source("ringfence.lease.v1", int(tree), seq - 1).uid


def verified(tree: str, plant: Callable[[list[bytes]], None]) -> dict[str, ChainVerifier]:
    """All chains, with a fault planted in one."""
    found = {}
    for one in TREES:
        values, signed = CHAINS[one]
        values = [*values]
        if one == tree:
            plant(values)
        verifier = ChainVerifier(one, signed)
        for offset, value in enumerate(values):
            verifier.take(value, offset)
        verifier.finish()
        found[one] = verifier
    return found


def faults(tree: str, plant: Callable[[list[bytes]], None]) -> list[Fault]:
    """Those of this chain; the others have none."""
    found = verified(tree, plant)
    assert [fault for one in TREES if one != tree for fault in found[one].faults] == []
    assert all(fault.tree == tree for fault in found[tree].faults)
    return found[tree].faults


def named(found: list[Fault]) -> list[tuple[str, int | None]]:
    return [(fault.kind, fault.seq) for fault in found]


def otherwise(value: bytes) -> bytes:
    """The same event with another message; its link is as it was."""
    changed = orjson.loads(value)
    changed["message"] = "nothing happened"
    return orjson.dumps(changed)


@EACH_TREE
@EACH_PLACE
def test_an_event_that_is_removed(tree: str, seq: int) -> None:
    def plant(values: list[bytes]) -> None:
        del values[seq - 1]

    if seq == 1:  # whoever reads the topic tells by its age whether that may be: see the flow tests
        assert verified(tree, plant)[tree].first == 2
        assert faults(tree, plant) == []
    else:
        assert named(faults(tree, plant)) == [("truncated" if seq == COUNT else "removed", seq)]


@EACH_TREE
@pytest.mark.parametrize(
    ("first", "last"),
    [(2, 3), (BATCH - 1, BATCH + 2), (SIGNED - 1, SIGNED + 2), (4, 2 * SIGNED + 3), (2, COUNT - 1)],
    ids=["in a batch", "over a batch's end", "over a checkpoint", "over two checkpoints", "all but two"],
)
def test_events_that_are_removed_together(tree: str, first: int, last: int) -> None:
    def plant(values: list[bytes]) -> None:
        del values[first - 1 : last]

    (fault,) = faults(tree, plant)
    assert (fault.kind, fault.seq, fault.message) == (
        "removed", first, f"events {first} to {last} are not there",
    )  # fmt: skip


@EACH_TREE
@EACH_PLACE
def test_an_event_that_is_changed(tree: str, seq: int) -> None:
    def plant(values: list[bytes]) -> None:
        values[seq - 1] = otherwise(values[seq - 1])

    found = faults(tree, plant)
    # A signed head says it as well, where it is the last that is under it.
    kinds = {("changed", seq)} if seq < COUNT else set()
    assert set(named(found)) == kinds | ({("rewritten", seq)} if seq % SIGNED == 0 else set())
    assert {fault.uid for fault in found if fault.kind == "changed"} <= {uid(tree, seq)}


@EACH_TREE
@EACH_PLACE
def test_an_event_that_comes_after_its_successor(tree: str, seq: int) -> None:
    at = min(seq, COUNT - 1)

    def plant(values: list[bytes]) -> None:
        values[at - 1], values[at] = values[at], values[at - 1]

    found = faults(tree, plant)
    assert ("reordered", at) in named(found)
    assert {fault.kind for fault in found} <= {"reordered", "changed"}


@EACH_TREE
@EACH_PLACE
@pytest.mark.parametrize("to", [2, SIGNED, COUNT], ids=["near", "at a checkpoint", "at the end"])
def test_an_event_that_is_moved(tree: str, seq: int, to: int) -> None:
    if to == seq:
        to -= 1

    def plant(values: list[bytes]) -> None:
        values.insert(to - 1, values.pop(seq - 1))

    assert "reordered" in {fault.kind for fault in faults(tree, plant)}


@EACH_TREE
@EACH_PLACE
@pytest.mark.parametrize(
    "after", [0, 1, BATCH, COUNT], ids=["at once", "one later", "a batch later", "at the end"]
)
def test_an_event_that_is_there_twice(tree: str, seq: int, after: int) -> None:
    def plant(values: list[bytes]) -> None:
        values.insert(seq + after, values[seq - 1])

    (fault,) = faults(tree, plant)
    assert (fault.kind, fault.seq, fault.uid) == ("duplicated", seq, uid(tree, seq))
    assert fault.offset == min(seq + after, COUNT)


@EACH_TREE
@EACH_PLACE
def test_a_chain_that_is_cut_off(tree: str, seq: int) -> None:
    def plant(values: list[bytes]) -> None:
        del values[seq - 1 :]

    (fault,) = faults(tree, plant)
    assert (fault.kind, fault.seq) == ("truncated", seq)
    assert str(COUNT) in fault.message


@EACH_PLACE
@pytest.mark.parametrize("seq_there", [1, 17, COUNT])
def test_an_event_that_is_moved_to_another_partition(seq: int, seq_there: int) -> None:
    strange = CHAINS["1"][0][seq - 1]

    def plant(values: list[bytes]) -> None:
        values.insert(seq_there - 1, strange)

    (fault,) = faults("0", plant)
    assert (fault.kind, fault.seq, fault.uid) == ("foreign", seq, uid("1", seq))
    assert fault.offset == seq_there - 1


@pytest.mark.parametrize("seq", [seq for seq in PLACES.values() if seq > 1])
def test_two_faults_in_two_partitions_are_both_named(seq: int) -> None:
    changed, removed = ChainVerifier("0", CHAINS["0"][1]), ChainVerifier("1", CHAINS["1"][1])
    for verifier, gone in ((changed, None), (removed, seq)):
        for offset, value in enumerate(CHAINS[verifier.tree][0], 1):
            if offset == gone:
                continue
            verifier.take(otherwise(value) if gone is None and offset == 3 else value, offset)
        verifier.finish()
    assert named(changed.faults) == [("changed", 3)]
    assert named(removed.faults) == [("truncated" if seq == COUNT else "removed", seq)]
