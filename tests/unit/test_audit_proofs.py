"""What the hashes that proofs are made of are taken from: events in their own places of their own trees."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from ringfence.audit.proofs import ProofStore
from ringfence.messages.topics import AUDIT
from ringfence.model.merkle import Hash
from tests.audit_office import Office


class Kept(ProofStore):
    """Tells how many leaves each tree has got."""

    def __init__(self, office: Office) -> None:
        super().__init__(office.trust, None)
        self.leaves: dict[str, int] = {}

    def _append(self, tree: str, level: int, hash: Hash) -> None:
        self.leaves[tree] = self.leaves.get(tree, 0) + (level == 0)
        super()._append(tree, level, hash)


def told(tree: Any, seq: Any) -> bytes:
    return orjson.dumps({"unmapped": {"chain": {"tree": tree, "seq": seq, "prev": "0" * 64}}})


@pytest.mark.parametrize(
    "value",
    [
        told("0", 1), told("0", 3), told("1", 2), told(0, 2), told("0", "2"), told("0", None), told(["0"], 2),
        b'{"unmapped":{"chain":{"tree":"0"}}}', b'{"unmapped":{"chain":null}}', b'{"unmapped":{"chain":[2]}}',
        b'{"unmapped":{}}', b'{"unmapped":7}', b'{"time":7}', b"[]", b"7", b"null", b'"words"', b"no JSON", b"",
    ],
)  # fmt: skip
def test_what_does_not_come_next_in_its_tree_is_no_leaf(value: bytes) -> None:
    office = Office()
    proofs = Kept(office)
    proofs.add_events([office.received(AUDIT, told("0", 1)), office.received(AUDIT, value)])
    assert proofs.leaves == {"0": 1}
    proofs.add_events([office.received(AUDIT, told("0", 2))])
    assert proofs.leaves == {"0": 2}, "the next that follows counts all the same"
    proofs.close()


def test_each_partition_has_a_tree_of_its_own() -> None:
    office = Office()
    proofs = Kept(office)
    proofs.add_events(
        [office.received(AUDIT, told(str(at), 1), partition=at) for at in (0, 3)]
        + [office.received(AUDIT, told("0", 2), partition=3)]
    )
    assert proofs.leaves == {"0": 1, "3": 1}
    proofs.close()
