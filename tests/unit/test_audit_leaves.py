"""How much is held of what nobody signed yet, and on which way the tree goes on meanwhile."""

from __future__ import annotations

import random
import sqlite3

import pytest

from ringfence.audit.trail.proofs import HASHES_TABLE, LEAVES_TABLE, Leaves, TreeHashes
from ringfence.model.audit_log.chain import NOTHING
from ringfence.model.audit_log.merkle import Hash, TreeHead, leaf_hash

Way = list[tuple[int, str, Hash]]


@pytest.fixture
def db() -> sqlite3.Connection:
    made = sqlite3.connect(":memory:", isolation_level=None)
    made.executescript(HASHES_TABLE + LEAVES_TABLE)
    return made


def way(name: str, count: int, behind: Way | None = None) -> Way:
    """Events that go on from others: place, hash before, hash."""
    place, _, prev = behind[-1] if behind else (0, "", NOTHING)
    found: Way = []
    for at in range(place + 1, place + count + 1):
        leaf = leaf_hash(f"{name} {at} {prev.hex()}".encode())
        found.append((at, prev.hex(), leaf))
        prev = leaf
    return found


def fed(tree: Leaves, *ways: Way) -> None:
    for one in ways:
        for event in one:
            tree.add(*event)


def candidates(db: sqlite3.Connection, tree: Leaves) -> int:
    (count,) = db.execute("SELECT count(*) FROM candidates").fetchone()
    assert count == tree._candidate_count
    return int(count)


def test_unlinked_or_repeated_leaf_is_not_kept(db: sqlite3.Connection) -> None:
    tree = Leaves(db, "0")
    true = way("true", 9)
    fed(
        tree, true, true, [(5, "ab" * 32, NOTHING), (2**70, true[-1][1], NOTHING)], way("far", 3, way("?", 9))
    )
    assert (tree.main_branch.size, candidates(db, tree)) == (9, 0)
    fed(tree, way("forged", 3, true[:5]), way("forged", 3, true[:5]))
    assert (tree.main_branch.size, candidates(db, tree)) == (9, 3)
    assert not tree.holds(2**70, true[-1][2])
    tree.sign(9, true[-1][2])
    assert candidates(db, tree) == 0


def test_the_trunk_does_not_stay_on_a_forged_event_for_want_of_a_checkpoint(db: sqlite3.Connection) -> None:
    """Else all that comes until the next one would be put aside."""
    tree = Leaves(db, "0")
    true = way("true", 3)
    fed(tree, true, way("forged", 1, true), more := way("true", 1000, true))
    assert (tree.main_branch.size, candidates(db, tree)) == (1003, 1)
    tree.sign(*more[-1][::2])
    assert (tree.settled, candidates(db, tree)) == (1003, 0)


def test_leaf_displaced_by_a_longer_branch_can_still_be_signed(db: sqlite3.Connection) -> None:
    tree = Leaves(db, "0")
    true = way("true", 300)
    fed(tree, true, way("forged", 1500, true[:10]))
    assert tree.main_branch.size > 1000
    tree.sign(*true[-1][::2])
    assert (tree.settled, tree.main_branch.size) == (300, 300)
    assert tree.main_branch.leaf(299) == true[-1][2]


def test_leaves_beyond_the_signed_head_continue_from_it(db: sqlite3.Connection) -> None:
    tree = Leaves(db, "0")
    true = way("true", 90)
    fed(tree, way("forged", 1), true)
    tree.sign(*true[39][::2])
    assert (tree.settled, tree.main_branch.size, candidates(db, tree)) == (40, 90, 0)


def test_a_way_that_leads_nowhere_any_more_goes(db: sqlite3.Connection) -> None:
    tree = Leaves(db, "0")
    true = way("true", 20)
    fed(tree, true, forged := way("forged", 200, true[:10]))
    tree.sign(*true[-1][::2])
    assert candidates(db, tree) == 190, "that much has a place which is not settled"
    fed(tree, more := way("forged", 500, forged))
    assert candidates(db, tree) == 0
    assert not tree.holds(*more[-1][::2])
    fed(tree, on := way("true", 5, true))
    tree.sign(*on[-1][::2])
    assert (tree.settled, tree.main_branch.size) == (25, 25)


@pytest.mark.parametrize("size", [0, 1, 255, 256, 257, 511, 65_535, 65_536, 65_537, 66_000])
def test_a_tree_that_was_cut_and_grew_another_way_has_the_roots_of_that_way(
    db: sqlite3.Connection, size: int
) -> None:
    tree = TreeHashes(db, "0")
    first = [leaf_hash(b"first %d" % at) for at in range(66_000)]
    then = first[:size] + [leaf_hash(b"then %d" % at) for at in range(size, min(size + 70_000, 66_300))]
    for leaf in first:
        tree.append(leaf)
    tree.cut(size)
    for leaf in then[size:]:
        tree.append(leaf)
    chance = random.Random(size)
    for level in range(17):
        some = {0, max(0, (size >> level) - 1), size >> level, (len(then) >> level) - 1}
        for index in {*some, chance.randrange(max(1, len(then) >> level))}:
            if 0 <= index < len(then) >> level:
                expected = TreeHead().grown(then[index << level : (index + 1) << level]).root
                assert tree.subtree(level, index) == expected, (level, index)
