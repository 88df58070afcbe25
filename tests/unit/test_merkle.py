"""The tree: heads and proofs against the definitions of RFC 9162, written down as they stand there."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.model.audit_log.merkle import (
    EMPTY_ROOT,
    Hash,
    TreeHead,
    consistency_proof,
    inclusion_proof,
    is_consistent,
    leaf_hash,
    root_by_inclusion,
)

LEAVES = [leaf_hash(b"%d" % number) for number in range(70)]


def mth(leaves: list[Hash]) -> Hash:
    """The definition of 2.1.1, without any thought of speed."""
    if not leaves:
        return hashlib.sha256(b"").digest()
    if len(leaves) == 1:
        return leaves[0]
    k = 1
    while k * 2 < len(leaves):
        k *= 2
    return hashlib.sha256(b"\x01" + mth(leaves[:k]) + mth(leaves[k:])).digest()


def subtree(level: int, index: int) -> Hash:
    return mth(LEAVES[index << level : (index + 1) << level])


def test_hashes_of_leaves_and_nodes_are_those_of_the_rfc() -> None:
    assert leaf_hash(b"").hex() == "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert EMPTY_ROOT.hex() == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize("size", range(len(LEAVES)))
def test_the_root_is_that_of_the_definition_however_it_grew(size: int) -> None:
    at_once = TreeHead().grown(LEAVES[:size])
    in_two = TreeHead().grown(LEAVES[: size // 3]).grown(LEAVES[size // 3 : size])
    assert at_once == in_two
    assert at_once.root == mth(LEAVES[:size])


@pytest.mark.parametrize("size", range(1, 34))
def test_each_leaf_of_each_tree_is_proved(size: int) -> None:
    root = mth(LEAVES[:size])
    for index in range(size):
        proof = inclusion_proof(index, size, subtree)
        assert root_by_inclusion(LEAVES[index], index, size, proof) == root


@pytest.mark.parametrize("size", range(1, 34))
def test_each_tree_is_proved_to_go_on_from_each_before(size: int) -> None:
    for old in range(1, size + 1):
        proof = consistency_proof(old, size, subtree)
        assert is_consistent(old, mth(LEAVES[:old]), size, mth(LEAVES[:size]), proof)


@given(st.integers(1, 69), st.data())
def test_a_proof_for_one_leaf_holds_for_no_other_and_nowhere_else(size: int, data: st.DataObject) -> None:
    index, other = data.draw(st.integers(0, size - 1)), data.draw(st.integers(0, size - 1))
    leaf = data.draw(st.sampled_from([*LEAVES, leaf_hash(b"forged")]))
    proof = inclusion_proof(index, size, subtree)
    try:
        proved = root_by_inclusion(leaf, other, size, proof) == mth(LEAVES[:size])
    except ValueError:
        proved = False
    assert proved == (other == index and leaf == LEAVES[index])


@given(st.integers(1, 69), st.data())
def test_no_proof_leads_from_a_tree_that_was_rewritten(size: int, data: st.DataObject) -> None:
    old = data.draw(st.integers(1, size))
    changed = data.draw(st.integers(0, old - 1))
    rewritten = [*LEAVES]
    rewritten[changed] = leaf_hash(b"forged")
    proof = consistency_proof(old, size, lambda level, i: mth(rewritten[i << level : (i + 1) << level]))
    assert not is_consistent(old, mth(LEAVES[:old]), size, mth(rewritten[:size]), proof)
    shortened = proof[:-1] if proof else [LEAVES[0]]
    assert not is_consistent(old, mth(LEAVES[:old]), size, mth(LEAVES[:size]), shortened)


def test_impossible_heads_and_proofs_are_rejected() -> None:
    with pytest.raises(ValueError, match="peaks"):
        TreeHead(3, (LEAVES[0],))
    with pytest.raises(ValueError, match="no leaf"):
        inclusion_proof(4, 4, subtree)
    with pytest.raises(ValueError, match="too long"):
        root_by_inclusion(LEAVES[0], 0, 1, [LEAVES[1]])
    with pytest.raises(ValueError, match="too short"):
        root_by_inclusion(LEAVES[0], 0, 2, [])
    assert not is_consistent(5, LEAVES[0], 4, LEAVES[0], [])
