"""Where an audit that takes over goes on: behind the last event that follows the chain, and no other."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from typing import Any, Self, cast

import pytest

from ringfence.audit.trail import chain_recovery
from ringfence.audit.trail.chain_recovery import (
    RecoveredChain,
    _extend_chain,
    _last_checkpoints,
    _PartitionEnd,
    _read_end,
    _recent_uids,
    _TrailEntry,
    _UnsignedEvent,
    recover_chains,
)
from ringfence.audit.trail.handover import content_digest
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.jws import sign, sign_payload
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.range_reader import Stretches
from ringfence.kernel.kafka.record import Received
from ringfence.messages.audit import AuditCheckpoint, AuditIntake, ChainLink
from ringfence.messages.base import ServiceRole, Topic
from ringfence.messages.operations import Heartbeat
from ringfence.messages.topics import AUDIT as AUDIT_TOPIC
from ringfence.messages.topics import AUDIT_CHECKPOINT, AUDIT_INTAKE
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.audit_log.chain import (
    NOTHING,
    Source,
    Tip,
    claimed_link,
    event_of,
    linkable,
    linked,
    linked_event,
    loaded,
)
from ringfence.model.audit_log.merkle import Hash, TreeHead, leaf_hash
from tests.support.in_memory_registry import START_MS, TD

TREE = "0"
FIRST = Tip().grown(leaf_hash(b"one"))
"""A chain of one event."""
OTHER: Hash = leaf_hash(b"other")


def event(
    number: int, tree: str = TREE, seq: int = 2, prev: Hash = FIRST.last, **more: Any
) -> _UnsignedEvent:
    """An event that stands behind the chain of one event, and names it as its predecessor."""
    link, leaf = ChainLink(tree=tree, seq=seq, prev=prev.hex()), leaf_hash(str(number).encode())
    given = {"digest": content_digest({"a": number}), "has_handover": False, **more}
    return _UnsignedEvent(link=link, leaf=leaf, offset=number, **given)


def extended(*events: _UnsignedEvent, handed_over: frozenset[Hash] = frozenset()) -> RecoveredChain:
    return _extend_chain(_PartitionEnd(FIRST, 0, 9, unsigned=list(events)), TREE, handed_over)


@pytest.mark.parametrize(
    "wrong",
    [{"prev": OTHER}, {"prev": NOTHING}, {"seq": 1}, {"seq": 3}, {"tree": "1"}],
    ids=["another predecessor", "no predecessor", "a number again", "a number left out", "another tree"],
)
def test_an_event_with_another_link_than_the_next_is_skipped_and_is_a_fault(wrong: dict[str, Any]) -> None:
    stray, next_one = event(1, **wrong), event(2)
    found = extended(stray, next_one)
    assert found.tip == FIRST.grown(next_one.leaf)
    assert found.faults == [f"event {stray.link.seq} at offset 1 does not follow event 1"]
    assert (found.signed_size, found.tip.head.size) == (1, 2)


def test_the_chain_goes_on_from_each_event_to_the_one_that_names_it() -> None:
    second = event(1)
    third = event(2, seq=3, prev=second.leaf)
    found = extended(second, third)
    assert (found.tip, found.faults) == (FIRST.grown(second.leaf, third.leaf), [])
    assert extended(third, second).tip == FIRST.grown(second.leaf)


@pytest.mark.parametrize(
    ("retained", "handed_over", "chained"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_an_event_whose_handover_must_be_there_counts_only_with_it(
    retained: bool, handed_over: bool, chained: bool
) -> None:
    one = event(1, has_handover=retained)
    found = extended(one, handed_over=frozenset({one.leaf} if handed_over else ()))
    assert (found.tip.head.size == 2) is chained
    assert found.faults == ([] if chained else ["no audit service handed over event 2 at offset 1"])


def test_the_last_uids_are_those_on_the_way_back_from_the_tip() -> None:
    leaves = [leaf_hash(bytes([number])) for number in range(3)]
    before = [NOTHING, *leaves]
    tail = _PartitionEnd(Tip(), 0, 9)
    tail.predecessors = {leaf: (f"uid-{n}", before[n]) for n, leaf in enumerate(leaves)}
    tail.predecessors[OTHER] = ("stray", leaves[2])
    assert _recent_uids(tail, leaves[2], 9) == ["uid-0", "uid-1", "uid-2"]
    assert _recent_uids(tail, leaves[2], 2) == ["uid-1", "uid-2"]
    assert _recent_uids(tail, NOTHING, 9) == []


def test_records_without_a_link_that_follow_each_other_are_one_entry() -> None:
    tail = _PartitionEnd(Tip(), 0, 9)
    for offset, is_event in ((1, False), (2, False), (3, True), (4, True), (5, False)):
        tail.add_unlinked(offset, is_event=is_event)
    assert [(entry.offsets, entry.is_event) for entry in tail.entries] == [
        (range(1, 3), False),
        (range(3, 5), True),
        (range(5, 6), False),
    ]


# --- links ---


@pytest.mark.parametrize(
    ("link", "fits"),
    [
        ({}, True),
        ({"tree": "1"}, False),
        ({"seq": 1}, False),
        ({"seq": 3}, False),
        ({"prev": NOTHING.hex()}, False),
    ],
)
def test_a_link_fits_only_with_tree_number_and_predecessor(link: dict[str, Any], fits: bool) -> None:
    given: dict[str, Any] = {"tree": TREE, "seq": 2, "prev": FIRST.last.hex(), **link}
    assert FIRST.fits(ChainLink(**given), TREE) is fits


def test_a_tip_grows_by_one_event_or_by_many_alike() -> None:
    assert Tip().fits(ChainLink(tree=TREE, seq=1, prev=NOTHING.hex()), TREE)
    assert Tip().followed_by(b"one") == FIRST
    assert FIRST.grown() == FIRST
    both = (leaf_hash(b"one"), leaf_hash(b"two"))
    assert Tip().grown(*both) == FIRST.followed_by(b"two") == Tip(TreeHead().grown(both), both[1])


def test_a_checkpoint_whose_parts_contradict_each_other_names_no_tip() -> None:
    head = FIRST.head
    fields: dict[str, Any] = {
        "tree": TREE,
        "size": 1,
        "root": head.root.hex(),
        "peaks": tuple(peak.hex() for peak in head.peaks),
        "last": FIRST.last.hex(),
    }
    assert Tip.of(AuditCheckpoint.model_construct(**fields)) == FIRST
    with pytest.raises(ValueError, match="root"):
        Tip.of(AuditCheckpoint.model_construct(**{**fields, "root": OTHER.hex()}))


def event_of_record(**more: Any) -> dict[str, Any]:
    source = {"topic": "t", "partition": 1, "offset": 2}
    return {"metadata": {"uid": "u"}, "unmapped": {"source": source, **more}, "message": "m"}


def test_an_event_is_linked_to_its_predecessor_and_read_back() -> None:
    body = linkable(event_of_record(chain={"old": 1}))
    value = linked(body, TREE, 2, FIRST.last)
    link: dict[str, Any] = {"tree": TREE, "seq": 2, "prev": FIRST.last.hex()}
    assert json.loads(value)["unmapped"]["chain"] == link
    assert linked_event(event_of_record(), TREE, 2, FIRST.last) == loaded(value)
    assert claimed_link(loaded(value)) == (TREE, 2, FIRST.last.hex())
    found = event_of(value)
    assert found is not None
    assert found.source.uid == derived_id("t", 1, 2)
    assert (found.uid, found.source, found.link) == ("u", Source("t", 1, 2), ChainLink(**link))
    unlinked = event_of(body)
    assert unlinked is not None
    assert unlinked.link is None


@pytest.mark.parametrize(
    "value",
    [
        b"", b"{", b"[]", b"1", b"{}", b'{"unmapped": {}}', b'{"unmapped": 1}',
        b'{"unmapped": {"source": {"topic": "t", "partition": "x", "offset": 1}}, "metadata": {"uid": "u"}}',
        json.dumps(event_of_record(chain={"tree": TREE})).encode(),
        json.dumps(event_of_record(chain={"tree": TREE, "seq": "2", "prev": NOTHING.hex()})).encode(),
    ],
)  # fmt: skip
def test_a_value_that_is_no_event_has_no_link(value: bytes) -> None:
    assert event_of(value) is None


@pytest.mark.parametrize(
    "event", [None, 1, [], {}, {"unmapped": {}}, {"unmapped": {"chain": {"tree": TREE}}}]
)
def test_an_event_without_a_whole_link_claims_none(event: Any) -> None:
    assert claimed_link(event) is None


# --- signed heads ---

ROOT = SigningKey.generate(f"spiffe://{TD}/root")
AUDIT, POLICY = (SigningKey.generate(f"spiffe://{TD}/service/{name}") for name in ("audit", "policy"))
ENDED, YOUNG = (SigningKey.generate(AUDIT.id) for _ in range(2))
YEAR_S = 365 * 86_400


@pytest.fixture
def trust() -> TrustStore:
    now_s = START_MS // 1000
    roles: dict[SigningKey, ServiceRole] = {AUDIT: "audit", POLICY: "policy"}
    others = {AUDIT: (ENDED.record(now_s), YOUNG.record(now_s + YEAR_S, not_before=now_s))}
    services = tuple(
        ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(now_s + YEAR_S), *others.get(key, ())))
        for key, role in roles.items()
    )
    bundle = TrustBundle(
        iss=ROOT.id, aud=TD, iat=now_s, exp=now_s + YEAR_S, jti="b", version=1, services=services
    )
    store = TrustStore(TD, ROOT.kid)
    store.load(sign(bundle, ROOT, header_jwk=True), now_s)
    return store


class Checkpoints:
    """The topic of checkpoints, as whoever takes over reads it."""

    def __init__(self, *values: str) -> None:
        self._values = values

    async def whole(self, topic: Topic[Any]) -> AsyncIterator[Received]:
        for offset, value in enumerate(self._values):
            yield Received(topic, "t", 0, offset, START_MS, None, value.encode())


def checkpoint(size: int, key: SigningKey = AUDIT, **fields: Any) -> str:
    tip = Tip().grown(*(leaf_hash(bytes([number])) for number in range(size)))
    given = {
        "iss": key.id, "aud": TD, "iat": START_MS // 1000, "jti": f"c{size}", "tree": TREE, "size": size,
        "root": tip.head.root.hex(), "peaks": tuple(peak.hex() for peak in tip.head.peaks), "last": tip.last.hex(),
        **fields,
    }  # fmt: skip
    return sign(AuditCheckpoint.model_validate(given), key)


@pytest.mark.parametrize(
    ("values", "size"),
    [
        ([checkpoint(2)], 2),
        ([checkpoint(2), checkpoint(3)], 3),
        ([checkpoint(3), checkpoint(2)], 3),
        ([checkpoint(2), checkpoint(3, POLICY)], 2),  # no audit service
        ([checkpoint(2), checkpoint(3, SigningKey.generate(AUDIT.id))], 2),  # an unknown key
        ([checkpoint(2), checkpoint(3, ENDED)], 2),  # a key that ended in the second in which it was appended
        ([checkpoint(2), checkpoint(3, YOUNG)], 3),  # a key that is valid from then on
        ([checkpoint(2), checkpoint(3, aud="other.example")], 2),
        ([checkpoint(3, root=OTHER.hex()), checkpoint(2)], 2),  # its parts contradict each other
        (["garbage", checkpoint(2)], 2),
        ([sign(Heartbeat(iss=AUDIT.id, aud=TD, iat=1, jti="h", at_ms=1), AUDIT), checkpoint(2)], 2),
    ],
)
async def test_the_chain_begins_behind_the_largest_head_that_an_audit_service_signed(
    trust: TrustStore, values: list[str], size: int
) -> None:
    found = await _last_checkpoints(cast(Stretches, Checkpoints(*values)), trust)
    assert {tree: tip.head.size for tree, tip in found.items()} == {TREE: size}


async def test_a_second_checkpoint_of_the_same_size_does_not_replace_the_first(trust: TrustStore) -> None:
    fork = tip_of([b"a", b"b"])
    fields: dict[str, Any] = {"peaks": tuple(peak.hex() for peak in fork.head.peaks), "last": fork.last.hex()}
    both = checkpoint(2), checkpoint(2, root=fork.head.root.hex(), **fields)
    for first, second, last in ((*both, leaf_hash(bytes([1]))), (*both[::-1], fork.last)):
        found = await _last_checkpoints(cast(Stretches, Checkpoints(first, second)), trust)
        assert found[TREE].last == last


# --- the end of a partition ---

LONG_AGO_MS = START_MS - 1000 * (AUDIT_INTAKE.retention_s or 0)


def chain(count: int) -> list[bytes]:
    """So many events of partition 0, linked."""
    values: list[bytes] = []
    for number in range(count):
        prev = leaf_hash(values[-1]) if values else NOTHING
        values.append(linked(body(number), TREE, number + 1, prev))
    return values


def body(number: int) -> bytes:
    source = {"topic": "x", "partition": 0, "offset": number}
    return linkable({"metadata": {"uid": str(number)}, "unmapped": {"source": source}})


def tip_of(values: Sequence[bytes]) -> Tip:
    return Tip().grown(*map(leaf_hash, values))


class Partition:
    """`Stretches` over the partition 0 of `audit` and of `audit.intake`, and over the checkpoints.

    It notes the ranges that are read.
    """

    def __init__(
        self,
        *values: bytes,
        start: int = 0,
        at_ms: int = LONG_AGO_MS,
        checkpoints: Sequence[str] = (),
        handovers: Sequence[str] = (),
    ) -> None:
        self.settled = True
        self.read: list[tuple[int, int]] = []
        self.read_of_intake: list[tuple[int, int]] = []
        self._intake = [
            Received(AUDIT_INTAKE, "intake", 0, offset, at_ms, None, value.encode())
            for offset, value in enumerate(handovers)
        ]
        self._bounds = start, start + len(values)
        self._records = [
            Received(AUDIT_TOPIC, "audit", 0, offset, at_ms, None, value)
            for offset, value in enumerate(values, start)
        ]
        self._checkpoints = Checkpoints(*checkpoints)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None: ...

    async def partitions(self, topic: Topic[Any]) -> list[int]:
        assert topic is AUDIT_TOPIC
        return [0]

    async def is_settled(self, topic: Topic[Any], partition: int) -> bool:
        assert (topic, partition) == (AUDIT_TOPIC, 0)
        return self.settled

    async def bounds(self, topic: Topic[Any], partition: int) -> tuple[int, int]:
        assert partition == 0
        return self._bounds if topic is AUDIT_TOPIC else (0, len(self._intake))

    async def records(
        self, topic: Topic[Any], partition: int, start: int, end: int
    ) -> AsyncIterator[Received]:
        assert partition == 0
        of_intake = topic is AUDIT_INTAKE
        assert of_intake or topic is AUDIT_TOPIC
        (self.read_of_intake if of_intake else self.read).append((start, end))
        for record in self._intake if of_intake else self._records:
            if start <= record.offset < end:
                yield record

    def whole(self, topic: Topic[Any]) -> AsyncIterator[Received]:
        assert topic is AUDIT_CHECKPOINT
        return self._checkpoints.whole(topic)


HUNDRED = chain(100)


@pytest.mark.parametrize(
    ("values", "signed", "remember", "judged_to", "ranges"),
    [
        (HUNDRED, 100, 6, None, [(94, 100)]),
        (HUNDRED, 93, 6, None, [(94, 100), (52, 100)]),
        (HUNDRED, 94, 6, None, [(94, 100)]),
        (HUNDRED, 52, 6, None, [(94, 100), (52, 100)]),
        (HUNDRED, 51, 6, None, [(94, 100), (52, 100), (0, 100)]),
        (HUNDRED, 100, 6, 94, [(94, 100)]),
        (HUNDRED, 100, 6, 93, [(94, 100), (52, 100)]),
        (HUNDRED, 50, 6, 94, [(94, 100), (52, 100), (0, 100)]),
        (HUNDRED, 0, 200, 100, [(0, 100)]),
        ([b"x"] * 10, 0, 2, None, [(8, 10), (0, 10)]),
        ([*HUNDRED[:20], *[b"x"] * 5], 20, 2, None, [(23, 25), (9, 25)]),
        ([], 0, 2, None, [(0, 0)]),
    ],
)
async def test_a_partition_is_read_back_to_its_checkpoint_and_to_what_is_judged(
    values: list[bytes], signed: int, remember: int, judged_to: int | None, ranges: list[tuple[int, int]]
) -> None:
    kafka = Partition(*values)
    tip = tip_of(HUNDRED[:signed])
    tail = await _read_end(cast(Stretches, kafka), 0, tip, remember, judged_to, START_MS)
    assert kafka.read == ranges
    assert (tail.signed, tail.start, tail.end) == (tip, 0, len(values))


async def test_a_partition_is_not_read_before_its_first_record() -> None:
    kafka = Partition(*HUNDRED[95:], start=30)
    tail = await _read_end(cast(Stretches, kafka), 0, tip_of(HUNDRED[:50]), 9, None, START_MS)
    assert (kafka.read, tail.start, tail.end) == ([(30, 35)], 30, 35)


@pytest.mark.parametrize(("at_ms", "has_handover"), [(START_MS, True), (LONG_AGO_MS, False)])
async def test_the_end_of_a_partition_has_each_record_and_the_events_behind_the_checkpoint(
    at_ms: int, has_handover: bool
) -> None:
    values = [*HUNDRED[:3], b"x", body(9), HUNDRED[3]]
    kafka = Partition(*values, at_ms=at_ms)
    tail = await _read_end(cast(Stretches, kafka), 0, tip_of(HUNDRED[:2]), 9, None, START_MS)
    linked_at = {0: 0, 1: 1, 2: 2, 5: 3}
    links, leaves = {}, {}
    for offset, number in linked_at.items():
        found = event_of(HUNDRED[number])
        assert found is not None
        assert found.link is not None
        links[offset], leaves[offset] = found.link, leaf_hash(HUNDRED[number])
    assert tail.entries == [
        *(_TrailEntry(range(one, one + 1), True, links[one], leaves[one]) for one in (0, 1, 2)),
        _TrailEntry(range(3, 4), False),
        _TrailEntry(range(4, 5), True),
        _TrailEntry(range(5, 6), True, links[5], leaves[5]),
    ]
    assert tail.predecessors == {
        leaves[offset]: (str(number), bytes.fromhex(links[offset].prev))
        for offset, number in linked_at.items()
    }
    assert tail.unsigned == [
        _UnsignedEvent(links[one], leaves[one], content_digest(json.loads(values[one])), one, has_handover)
        for one in (2, 5)
    ]


# --- taking over ---


async def recovered(
    monkeypatch: pytest.MonkeyPatch, trust: TrustStore, kafka: Partition, **given: Any
) -> RecoveredChain:
    settings = BusSettings(trust_domain=TD)
    monkeypatch.setattr(chain_recovery, "Stretches", lambda given: kafka if given is settings else None)
    found = await recover_chains(
        settings, trust,
        **{"remember": 9, "chained": {}, "checked": {}, "now_ms": START_MS, **given},
    )  # fmt: skip
    assert found.keys() == {0}
    return found[0]


def signed_head(size: int) -> str:
    tip = tip_of(HUNDRED[:size])
    return checkpoint(
        size, root=tip.head.root.hex(), peaks=tuple(peak.hex() for peak in tip.head.peaks), last=tip.last.hex()
    )  # fmt: skip


async def test_recovery_continues_after_the_last_event_chained_to_the_checkpoint(
    monkeypatch: pytest.MonkeyPatch, trust: TrustStore
) -> None:
    kafka = Partition(*HUNDRED[:6], b"x", checkpoints=[signed_head(3)])
    found = await recovered(monkeypatch, trust, kafka, remember=2)
    assert (found.tip, found.signed_size, found.end) == (tip_of(HUNDRED[:6]), 3, 7)
    assert found.recent_uids == ["4", "5"]
    assert (found.faults, found.unauthorised) == ([], [range(6, 7)])
    judged = await recovered(monkeypatch, trust, kafka, checked={0: 7, 1: 0})
    assert judged.unauthorised == []


async def test_events_without_their_handover_are_faults_and_do_not_count(
    monkeypatch: pytest.MonkeyPatch, trust: TrustStore
) -> None:
    kafka = Partition(*HUNDRED[:5], at_ms=START_MS, checkpoints=[signed_head(3)])
    found = await recovered(monkeypatch, trust, kafka, checked={0: 0})
    assert found.tip == tip_of(HUNDRED[:3])
    assert [fault.partition(" over ")[0] for fault in found.faults] == ["no audit service handed"] * 2
    assert found.unauthorised == [range(3, 4), range(4, 5)]


def handover(*values: bytes, key: SigningKey = AUDIT) -> str:
    entries = [{"key": "k", "event": json.loads(value)} for value in values]
    claims = {"iss": key.id, "aud": TD, "iat": START_MS // 1000, "jti": "h", "entries": entries}
    return sign_payload(AuditIntake, json.dumps(claims).encode(), key)


async def test_events_count_if_an_audit_service_handed_them_over_and_not_if_another_did(
    monkeypatch: pytest.MonkeyPatch, trust: TrustStore
) -> None:
    given: dict[str, Any] = {"at_ms": START_MS, "checkpoints": [signed_head(3)]}
    kafka = Partition(*HUNDRED[:5], handovers=[handover(body(3), body(4))], **given)
    found = await recovered(monkeypatch, trust, kafka)
    assert (found.tip, found.faults) == (tip_of(HUNDRED[:5]), [])
    kafka = Partition(*HUNDRED[:5], handovers=[handover(body(3), body(4), key=POLICY)], **given)
    found = await recovered(monkeypatch, trust, kafka)
    assert (found.tip, len(found.faults)) == (tip_of(HUNDRED[:3]), 2)


async def test_handovers_of_events_that_are_too_old_to_have_one_are_not_read(
    monkeypatch: pytest.MonkeyPatch, trust: TrustStore
) -> None:
    kafka = Partition(*HUNDRED[:5], checkpoints=[signed_head(3)], handovers=[handover(body(9))])
    assert (await recovered(monkeypatch, trust, kafka)).tip == tip_of(HUNDRED[:5])
    assert kafka.read_of_intake == []


async def test_a_chain_without_a_checkpoint_is_recovered_from_its_first_event(
    monkeypatch: pytest.MonkeyPatch, trust: TrustStore
) -> None:
    found = await recovered(monkeypatch, trust, Partition(*HUNDRED[:3]))
    assert (found.tip, found.signed_size, found.unauthorised) == (tip_of(HUNDRED[:3]), 0, [])


async def test_all_records_from_the_first_that_is_not_judged_are_judged_however_many_events_follow(
    monkeypatch: pytest.MonkeyPatch, trust: TrustStore
) -> None:
    kafka = Partition(*HUNDRED[:60], b"x", *HUNDRED[60:], checkpoints=[signed_head(100)])
    found = await recovered(monkeypatch, trust, kafka, remember=2, checked={0: 50})
    assert found.unauthorised == [range(60, 61)]


async def test_signed_events_whose_successors_are_lost_are_not_unauthorised(
    monkeypatch: pytest.MonkeyPatch, trust: TrustStore
) -> None:
    kafka = Partition(*HUNDRED[:3], b"x", *HUNDRED[6:9], checkpoints=[signed_head(6)])
    found = await recovered(monkeypatch, trust, kafka, checked={0: 0})
    assert (found.tip, found.unauthorised) == (tip_of(HUNDRED[:9]), [range(3, 4)])


async def test_while_a_transaction_is_open_no_chain_is_taken_over(
    monkeypatch: pytest.MonkeyPatch, trust: TrustStore
) -> None:
    kafka = Partition(*HUNDRED[:5])
    kafka.settled = False
    with pytest.raises(UnavailableError, match="transaction open on partition 0 of audit"):
        await recovered(monkeypatch, trust, kafka)
    assert kafka.read == []
