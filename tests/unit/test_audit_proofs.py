"""What proofs are made of: the events that a signed checkpoint leads back to, whatever else stands on `audit`.

Anybody who may write there can link an event to one that is there, before the true next one comes.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import orjson
import pytest

from ringfence.audit.trail.chain_writer import ParsedRecord, WrittenEventCache
from ringfence.audit.trail.proofs import NoProofError, ProofStore
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditCheckpoint
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT
from ringfence.model.audit_log.chain import NOTHING, Source, Tip, linkable, linked, loaded
from ringfence.model.audit_log.merkle import Hash, TreeHead, is_consistent, leaf_hash, root_by_inclusion
from tests.support.audit_fixtures import AuditFixtures


def event(seq: int, prev: Hash, words: str = "true", tree: str = "0") -> bytes:
    source = Source("ringfence.action", 0, seq)
    body = {
        "metadata": {"uid": f"{words}-{seq}"},
        "unmapped": {"source": {"topic": source.topic_name, "partition": 0, "offset": seq}, "words": words},
    }
    return linked(linkable(body), tree, seq, prev)


def told(tree: Any, seq: Any, prev: Any = "0" * 64) -> bytes:
    return orjson.dumps({"unmapped": {"chain": {"tree": tree, "seq": seq, "prev": prev}}})


class Trail:
    """Chains true events and signs them, and puts forged ones between; holds a `ProofStore` against what is true."""

    def __init__(self, tree: str = "0", office: AuditFixtures | None = None) -> None:
        self.office = office or AuditFixtures()
        self.tree = tree
        self.tip = Tip()
        self.values: list[bytes] = []
        self.store = ProofStore(self.office.trust, None)

    # --- what is written ---

    def chained(self, count: int = 1) -> list[bytes]:
        """The next true events."""
        for _ in range(count):
            self.values.append(event(len(self.values) + 1, self.tip.last, tree=self.tree))
            self.tip = self.tip.followed_by(self.values[-1])
        return self.values[-count:]

    def forged(self, after: int, count: int = 1, words: str = "forged") -> list[bytes]:
        """Events that go on from the true event `after`."""
        prev = leaf_hash(self.values[after - 1]) if after else NOTHING
        values = []
        for seq in range(after + 1, after + count + 1):
            values.append(event(seq, prev, words, self.tree))
            prev = leaf_hash(values[-1])
        return values

    def signed(self, size: int | None = None, by: SigningKey | None = None, **fields: Any) -> Received:
        """A checkpoint of what is chained, or of the first of it."""
        values = self.values[:size]
        head = TreeHead().grown(map(leaf_hash, values))
        said = {
            "tree": self.tree, "size": head.size, "root": head.root.hex(),
            "peaks": tuple(peak.hex() for peak in head.peaks), "last": leaf_hash(values[-1]).hex(),
        }  # fmt: skip
        key = by or self.office.key("service", "audit")
        claims = self.office.claims(AuditCheckpoint, key, **{**said, **fields})
        return self.office.signed(AUDIT_CHECKPOINT, claims, key, key=self.tree)

    # --- what is read ---

    def comes(self, *values: bytes) -> None:
        """On `audit`, in this order."""
        self.store.add_events([
            self.office.received(AUDIT, value, partition=int(self.tree)) for value in values
        ])  # fmt: skip

    def comes_signed(self, size: int | None = None, **fields: Any) -> None:
        """On `audit.checkpoint`."""
        self.store.add_checkpoints([self.signed(size, **fields)])

    # --- what is asked ---

    def is_proved(self, size: int) -> None:
        """That the events are proved to be under the head over so many, and that this goes on from what was before."""
        leaves = [leaf_hash(value) for value in self.values[:size]]
        root = TreeHead().grown(leaves).root
        for index in sorted({*range(0, size, max(1, size // 8)), *range(max(0, size - 3), size)}):
            found = self.store.inclusion(self.values[index])
            assert (found.index, found.leaf, found.head.claims.size) == (index, leaves[index], size)
            assert root_by_inclusion(found.leaf, index, size, found.proof) == root
            proof, _ = self.store.consistency(self.tree, index + 1)
            assert is_consistent(index + 1, TreeHead().grown(leaves[: index + 1]).root, size, root, proof)

    def has_none(self, values: list[bytes], why: str = "no such event") -> None:
        for value in values:
            with pytest.raises(NoProofError, match=why):
                self.store.inclusion(value)


@pytest.fixture
def trail() -> Iterator[Trail]:
    made = Trail()
    yield made
    made.store.close()


# --- what is linked to nothing ---


@pytest.mark.parametrize(
    "value",
    [
        told("0", 1), told("0", 3), told("1", 2), told(0, 2), told("0", "2"), told("0", None), told(["0"], 2),
        told("0", 2), told("0", 2, None), told("0", 2, 7), told("0", 2, "ü"), told("0", 2, ""), told("0", 2, ["a"]),
        told("0", 2**63), told("0", -1), told("0", 0), told("0", 1.5), told("0", True), told("0", 1, "ab" * 32),
        b'{"unmapped":{"chain":{"tree":"0"}}}', b'{"unmapped":{"chain":{"tree":"0","seq":2}}}',
        b'{"unmapped":{"chain":null}}', b'{"unmapped":{"chain":[2]}}',
        b'{"unmapped":{}}', b'{"unmapped":7}', b'{"time":7}', b"[]", b"7", b"null", b'"words"', b"no JSON", b"",
    ],
)  # fmt: skip
def test_event_outside_the_chain_is_no_leaf(trail: Trail, value: bytes) -> None:
    trail.comes(*trail.chained(), value, *trail.chained(2))
    trail.comes_signed()
    trail.is_proved(3)
    trail.has_none([value])


def test_an_event_that_is_linked_to_nothing_stands_for_none(trail: Trail) -> None:
    trail.comes(*trail.chained(5))
    stray = event(6, bytes(31) + b"\x01", "stray")
    trail.comes(stray, event(7, leaf_hash(stray), "stray"), *trail.chained(5))
    trail.comes_signed()
    trail.is_proved(10)
    trail.has_none([stray])


def test_each_partition_has_a_tree_of_its_own() -> None:
    office = AuditFixtures()
    first, other = Trail("0", office), Trail("3", office)
    other.store = first.store
    first.comes(*first.chained(3))
    other.comes(*other.chained(5))
    first.comes(event(4, first.tip.last, tree="3"))
    other.comes_signed()
    with pytest.raises(NoProofError, match="not signed yet"):
        first.is_proved(3)
    other.is_proved(5)
    first.comes(*first.chained())
    first.comes_signed()
    first.is_proved(4)


# --- what is linked to what stands there ---


@pytest.mark.parametrize("count", [1, 2, 300, 700])
@pytest.mark.parametrize("true", [1, 3, 300, 600])
def test_a_forged_event_that_comes_first_takes_no_place(trail: Trail, count: int, true: int) -> None:
    """Nor do several, that go on from each other, and are more than the true ones or fewer."""
    trail.comes(*trail.chained(4))
    forged = trail.forged(4, count)
    trail.comes(*forged, *trail.chained(true))
    trail.comes_signed()
    trail.is_proved(4 + true)
    trail.has_none(forged)
    trail.comes(*trail.chained(3))
    trail.comes_signed()
    trail.is_proved(4 + true + 3)


@pytest.mark.parametrize("before", [0, 3, 256, 300])
def test_a_forged_first_event_takes_no_place(trail: Trail, before: int) -> None:
    forged = trail.forged(0)
    trail.comes(*forged, *trail.chained(before + 1))
    trail.comes_signed()
    trail.is_proved(before + 1)
    trail.has_none(forged)


def test_forged_events_that_come_after_take_no_place(trail: Trail) -> None:
    trail.comes(*trail.chained(6))
    forged = [*trail.forged(4, 9), *trail.forged(5, 1, "other"), *trail.forged(6, 3, "more")]
    trail.comes(*forged)
    trail.has_none(forged, "not signed yet")
    trail.comes_signed()
    trail.is_proved(6)
    trail.has_none([*forged[:2], forged[9]])
    trail.comes(*trail.forged(2, 8, "late"), *trail.chained(4))
    trail.comes_signed()
    trail.is_proved(10)
    trail.has_none([value for value in forged if seq_of(value) <= 10])


def test_an_event_that_came_after_a_forged_one_is_not_signed_yet(trail: Trail) -> None:
    trail.comes(*trail.chained(2))
    trail.comes_signed()
    trail.comes(*trail.forged(2), *trail.chained(2))
    trail.is_proved(2)
    trail.has_none(trail.values[2:], "no checkpoint covers this event yet")


def test_events_that_came_beyond_what_is_signed_are_kept(trail: Trail) -> None:
    """Also where a forged event held their places until then."""
    trail.comes(*trail.chained(2))
    trail.comes(*trail.forged(2, 3), *trail.chained(9))
    trail.comes_signed(5)
    trail.is_proved(5)
    trail.comes_signed(8)
    trail.is_proved(8)
    trail.comes(*trail.chained(2))
    trail.comes_signed()
    trail.is_proved(13)


def test_repeated_events_change_no_proof(trail: Trail) -> None:
    forged, values = trail.forged(0, 3), trail.chained(4)
    trail.comes(*values[:2], *values[:2], *forged, *forged, *values[1:3], *values[2:], *values)
    trail.comes_signed()
    trail.comes(*values, *forged)
    trail.comes_signed()
    trail.is_proved(4)
    trail.has_none(forged)


def test_events_read_back_are_checked_against_the_chain(trail: Trail) -> None:
    values = [*trail.forged(0), *trail.chained(3)]
    records = [trail.office.received(AUDIT, value) for value in values]
    trail.store.add_events(records, [ParsedRecord(loaded(value), leaf_hash(value)) for value in values])
    trail.store.add_events(records, WrittenEventCache().parse(records))
    trail.comes_signed()
    trail.is_proved(3)


# --- checkpoints ---


@pytest.mark.parametrize("forge", [False, True])
@pytest.mark.parametrize("order", ["before", "after", "between"])
def test_checkpoints_and_events_come_in_any_order(trail: Trail, order: str, forge: bool) -> None:
    values = trail.chained(600)
    events = [*values[:100], *(trail.forged(100, 3) if forge else ()), *values[100:]]
    if order == "before":
        for size in (150, 300, 600):
            trail.comes_signed(size)
    for start in range(0, len(events), 50):
        trail.comes(*events[start : start + 50])
        if order == "between":
            trail.comes_signed(min(600, start + 70))
    if order == "after":
        for size in (150, 300, 600):
            trail.comes_signed(size)
    trail.is_proved(600)


def test_later_signature_proves_events_of_a_missing_checkpoint(trail: Trail) -> None:
    trail.comes(*trail.chained(3))
    trail.has_none(trail.values, "not signed yet")
    trail.comes(*trail.forged(3, 2), *trail.chained(1000))
    trail.has_none(trail.values, "not signed yet")
    trail.comes_signed()
    trail.is_proved(1003)


def test_head_with_a_missing_last_event_proves_nothing(trail: Trail) -> None:
    trail.comes(*trail.chained(5))
    trail.chained(3)
    trail.comes_signed()
    trail.has_none(trail.values[:5], "audit has not read all of it")
    trail.comes(*trail.forged(5, 5))
    trail.has_none(trail.values[:5], "audit has not read all of it")
    trail.comes(*trail.values[5:])
    trail.is_proved(8)


def test_events_after_a_gap_are_not_proved(trail: Trail) -> None:
    """The first events are gone by their age."""
    values = trail.chained(9)
    trail.comes(*values[3:])
    trail.comes_signed()
    trail.has_none(values)
    with pytest.raises(NoProofError, match="its first events are gone"):
        trail.store.consistency("0", 1)


def test_no_proof_is_given_under_a_head_that_is_signed_over_something_else(trail: Trail) -> None:
    trail.comes(*trail.chained(5))
    other = TreeHead().grown(leaf_hash(b"%d" % at) for at in range(5))
    trail.comes_signed(root=other.root.hex(), peaks=tuple(peak.hex() for peak in other.peaks))
    trail.has_none(trail.values, "not what stands there")
    trail.comes(*trail.chained())
    trail.comes_signed()
    trail.is_proved(6)


def test_checkpoint_not_signed_by_audit_is_ignored(trail: Trail) -> None:
    trail.comes(*trail.chained(3), *trail.forged(3, 2))
    for role in ("gateway", "registry"):
        trail.comes_signed(by=trail.office.key("service", role))
    trail.has_none(trail.values, "not signed yet")
    assert trail.store.heads() == []


# --- all of it ---


@pytest.mark.parametrize("seed", range(16))
def test_signed_events_are_proved_despite_forged_branches(seed: int) -> None:
    """At once, and by whoever reads everything again from the beginning, in another order between the topics."""
    trail, chance = Trail(), random.Random(seed)
    most = chance.choice([2, 20, 300])
    said: list[bytes] = []
    signed: list[Received] = []
    forged: list[bytes] = []
    for _ in range(12):
        some: list[bytes] = []
        for _ in range(chance.randrange(4)):
            after = chance.randint(max(0, len(trail.values) - most), len(trail.values))
            some += trail.forged(after, chance.randint(1, most), f"forged-{chance.random()}")
        if forged:  # some that go on from forged ones, and some that are there already
            start = seq_of(parent := chance.choice(forged))
            some += [event(start + 1, leaf_hash(parent), "further"), parent]
        forged += some
        true = trail.chained(chance.randint(1, most))
        batch = shuffled(chance, some, true)
        said += batch
        trail.comes(*batch)
        signed.append(trail.signed(chance.randint(max(1, len(trail.values) - most), len(trail.values))))
        trail.store.add_checkpoints(signed[-1:])
    trail.is_proved(max(size_of(one) for one in signed))
    settled = trail.store.heads()[0].claims.size
    trail.has_none([value for value in forged if seq_of(value) <= settled][:200])
    trail.store.close()

    trail.store = ProofStore(trail.office.trust, None)
    trail.store.add_checkpoints(signed if seed % 2 else [])
    trail.comes(*said)
    trail.store.add_checkpoints(signed)
    trail.is_proved(settled)
    trail.store.close()


def shuffled(chance: random.Random, some: list[bytes], others: list[bytes]) -> list[bytes]:
    """Each in its own order, mixed."""
    left = [list(some), list(others)]
    found = []
    while any(left):
        found.append(chance.choice([one for one in left if one]).pop(0))
    return found


def seq_of(value: bytes) -> int:
    return int(orjson.loads(value)["unmapped"]["chain"]["seq"])


def size_of(record: Received) -> int:
    return parse(record.value).unverified_claims(AuditCheckpoint).size


@pytest.mark.parametrize("order", ["before", "after"])
def test_proof_tree_is_rebuilt_at_start_in_the_same_file(tmp_path: Any, order: str) -> None:
    trail = Trail()
    file = tmp_path / "tree.sqlite"
    events = [*trail.chained(10), *trail.forged(10, 2), *trail.chained(500), *trail.forged(510, 600)]
    for _ in range(2):
        trail.store = ProofStore(trail.office.trust, file)
        if order == "before":
            trail.comes_signed()
        trail.comes(*events)
        if order == "after":
            trail.comes_signed()
        trail.is_proved(510)
        trail.store.close()
