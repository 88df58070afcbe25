"""The chain of audit events on a real broker: who writes it, who takes over, and what an auditor finds."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from aiokafka import AIOKafkaProducer

from ringfence.audit.settings import AuditSettings
from ringfence.audit.trail.chain_writer import GROUP, ChainWriter
from ringfence.audit.trail.handover import Intake, PendingEvent
from ringfence.audit.trail.proofs import NoProofError, ProofStore
from ringfence.client.reports.auditor import TrailReport, verify_trail, witness
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.producer import FencedError, TransactionalPublisher
from ringfence.kernel.kafka.record import Outbound, Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.audit import AuditCheckpoint, AuditIntake, IntakeEntry
from ringfence.messages.credential import Coordinates
from ringfence.messages.operations import DeadLetter
from ringfence.messages.registry import AgentSuspend
from ringfence.messages.topics import AUDIT, AUDIT_CHECKPOINT, AUDIT_INTAKE, DEAD_LETTER, SERVICE_EVENT
from ringfence.model.audit_log.chain import Source, Tip, event_of, linkable, linked
from ringfence.model.audit_log.merkle import TreeHead, is_consistent, leaf_hash, root_by_inclusion
from tests.support.world import Party, World, scope

QUICK = AuditSettings(linger_ms=10, checkpoint_s=0.1)
DEPLOY = scope("staging", ("deploy",), ("env/staging/*",))


def client_settings(world: World) -> ClientSettings:
    fields = world.settings("audit").model_dump()
    return ClientSettings(**{name: fields[name] for name in ClientSettings.model_fields if name in fields})


async def verified(world: World, **options: Any) -> TrailReport:
    return await verify_trail(client_settings(world), settle_s=0, **options)


def kinds(report: TrailReport) -> list[str]:
    return sorted({fault.kind for fault in report.faults})


async def told(world: World, sam: Party) -> None:
    """Something happens, and is in the trail."""
    suspend = world.claims(AgentSuspend, sam, agent_id="deploy-bot", reason="odd")
    await world.accepted(suspend, sam)
    for record in await world.records(SERVICE_EVENT):
        await chained(world, Source(record.topic_name, record.partition, record.offset).uid)


async def chained(world: World, uid: str) -> Received:
    return await world.consume_until(AUDIT, lambda record: record.headers["ce_id"] == uid)


async def signed_up_to_the_end(world: World) -> None:
    """The checkpoints have reached what stands on `audit`."""
    events = await world.records(AUDIT)

    def every_head() -> bool | None:
        heads = {parse(r.value).unverified_claims(AuditCheckpoint).size for r in watched}
        last = {p: max(seqs) for p in (0, 1) if (seqs := [seq_of(r) for r in events if r.partition == p])}
        return True if set(last.values()) <= heads else None

    watched = await world.records(AUDIT_CHECKPOINT)
    await world.until(every_head, "checkpoints of all chains")


def seq_of(record: Received) -> int:
    event = event_of(record.value)
    assert event is not None
    assert event.link is not None
    return event.link.seq


@pytest.fixture
async def sam(world: World) -> AsyncIterator[Party]:
    """A trail: an organisation, and an agent that is suspended."""
    async with world.running("registry", "audit", own={"audit": QUICK}):
        sam = await world.user("sam", ("sponsor",), DEPLOY)
        await world.user("ali", ("auditor",))
        await world.target("staging")
        await world.agent("deploy-bot", sam, DEPLOY)
        await told(world, sam)
        await signed_up_to_the_end(world)
        yield sam


async def test_a_trail_that_nobody_touched_is_without_fault(world: World, sam: Party) -> None:
    report = await verified(world)
    assert report.faults == []
    events = await world.records(AUDIT)
    assert sum(one.last for one in report.trees) == len(events) >= 10
    assert all(one.first == 1 and one.signed == one.last for one in report.trees if one.last)
    # Each chain in its order, without a hole.
    for partition in (0, 1):
        seqs = [seq_of(record) for record in events if record.partition == partition]
        assert seqs == list(range(1, len(seqs) + 1))


async def test_each_kind_of_tampering_on_the_topic_is_found(world: World, sam: Party) -> None:
    records = [record for record in await world.records(AUDIT) if record.partition == 0]
    changed = json.loads(records[0].value)
    changed["message"] = "nothing happened"
    await told_as_buried(
        world,
        await put(world, 0, records[0].value),
        await put(world, 0, json.dumps(changed).encode()),
        await put(world, 0, b"junk"),
    )
    report = await verified(world)
    assert kinds(report) == ["duplicated", "foreign"]
    assert [fault.seq for fault in report.faults if fault.kind == "duplicated"] == [1, 1]


async def put(world: World, partition: int, value: bytes) -> Coordinates:
    """As whoever may write to the topic would."""
    sent = await (
        await world.publisher.send(AUDIT, "audit", Outbound("x", value, id="x"), partition=partition)
    )
    return Coordinates(
        topic=sent.topic, partition=sent.partition, offset=sent.offset, appended_at_ms=sent.timestamp
    )


async def told_as_buried(world: World, *places: Coordinates) -> list[DeadLetter]:
    """The letters about these records, each once its own event is in the trail."""
    letters = []
    for at in places:
        record = await world.consume_until(DEAD_LETTER, lambda r, at=at: letter_in(r).source == at)  # type: ignore[misc]
        await chained(world, Source(record.topic_name, record.partition, record.offset).uid)
        letters.append(letter_in(record))
    return letters


def letter_in(record: Received) -> DeadLetter:
    return DeadLetter.model_validate_json(record.value)


async def test_missing_and_invented_events_are_found(world: World) -> None:
    async with world.running("registry", "audit", own={"audit": QUICK}):
        sam = await world.user("sam", ("sponsor",), DEPLOY)
        await world.agent("deploy-bot", sam, DEPLOY)
        await told(world, sam)
    # Nobody audits this.
    at = await world.send(SERVICE_EVENT, "policy", "not heard")
    report = await verified(world)
    missing = [fault for fault in report.faults if fault.kind == "missing"]
    assert Source(at.topic, at.partition, at.offset).uid in {fault.uid for fault in missing}
    async with world.running("registry", "audit", own={"audit": QUICK}):
        await chained(world, Source(at.topic, at.partition, at.offset).uid)
        await told_again(world)
    made_up = Source(SERVICE_EVENT.name(world.prefix), 0, at.offset + 1000)
    await hand_over(world, made_up)
    async with world.running("registry", "audit", own={"audit": QUICK}):
        await chained(world, made_up.uid)
        await signed_up_to_the_end(world)
    faults = [fault for fault in (await verified(world)).faults if fault.kind != "missing"]
    assert [(fault.kind, fault.uid) for fault in faults] == [("invented", made_up.uid)]


async def told_again(world: World) -> None:
    for record in await world.records(SERVICE_EVENT):
        await chained(world, Source(record.topic_name, record.partition, record.offset).uid)


async def hand_over(world: World, *sources: Source) -> None:
    """Events for the intake, as an audit service would."""
    intake = Intake(world.publisher, lambda: world.key("audit"), world.td, SystemClock())
    await intake.hand_over(PendingEvent("deploy-bot", one.uid, told_of(one), None) for one in sources)


def told_of(source: Source) -> bytes:
    words = {"source": {"topic": source.topic_name, "partition": source.partition, "offset": source.offset}}
    return json.dumps({"metadata": {"uid": source.uid}, "unmapped": words}).encode()


async def test_entry_not_signed_by_audit_is_not_chained(world: World) -> None:
    entry = IntakeEntry(key="x", event=json.loads(told_of(Source("x", 0, 1))))
    for key in (world.key("policy"), world.party("user", "eve").key):
        claims = AuditIntake(iss=key.id, aud=world.td, iat=1, jti="1", entries=(entry,))
        await world.send(AUDIT_INTAKE, "x", sign(claims, key))
    good = Source("x", 0, 2)
    async with world.running("registry", "audit", own={"audit": QUICK}):
        await hand_over(world, good)
        await chained(world, good.uid)
        uids = [record.headers["ce_id"] for record in await world.records(AUDIT)]
    assert Source("x", 0, 1).uid not in uids


async def test_a_lone_audit_service_hands_over_all_that_it_chains(world: World) -> None:
    """In the order in which it chains them."""
    async with world.running("registry", "audit", own={"audit": QUICK}):
        sam = await world.user("sam", ("sponsor",), DEPLOY)
        await world.agent("deploy-bot", sam, DEPLOY)
        await told(world, sam)
    handed_over, events = list(await world.records(AUDIT_INTAKE)), list(await world.records(AUDIT))
    for partition in (0, 1):
        assert uids_in(handed_over, partition) == [
            record.headers["ce_id"] for record in events if record.partition == partition
        ]
    assert len(events) > 3


def uids_in(handed_over: list[Received], partition: int) -> list[Any]:
    """Each once, as the first hand-over counts."""
    entries = [
        entry
        for record in handed_over
        if record.partition == partition
        for entry in parse(record.value).unverified_claims(AuditIntake).entries
    ]
    return list(dict.fromkeys(entry.event["metadata"]["uid"] for entry in entries))


@pytest.mark.parametrize("event", [{}, {"metadata": {}, "unmapped": {}}, {"metadata": {"uid": "1"}}])
async def test_malformed_signed_entry_is_dead_lettered_and_chaining_continues(
    world: World, event: dict[str, Any]
) -> None:
    key, good = world.key("audit"), Source("x", 0, 2)
    entries = (IntakeEntry(key="x", event=json.loads(told_of(good))), IntakeEntry(key="x", event=event))
    await world.send(
        AUDIT_INTAKE, "x", sign(AuditIntake(iss=key.id, aud=world.td, iat=1, jti="1", entries=entries), key)
    )
    async with world.running("registry", "audit", own={"audit": QUICK}):
        await hand_over(world, good)
        await chained(world, good.uid)
        letters = [json.loads(record.value) for record in await world.records(DEAD_LETTER)]
    assert [letter["code"] for letter in letters] == ["claims_invalid"]


async def test_a_forged_checkpoint_moves_nothing_and_is_found(world: World, sam: Party) -> None:
    (record, *_) = await world.records(AUDIT_CHECKPOINT)
    honest = parse(record.value).unverified_claims(AuditCheckpoint)
    forged = honest.model_copy(update={"iss": world.key("policy").id, "size": 2**20, "peaks": (honest.last,)})
    at = await world.send(AUDIT_CHECKPOINT, honest.tree, sign(forged, world.key("policy")))
    (letter,) = await told_as_buried(world, at)
    assert (letter.service, letter.code) == ("audit", "key_unknown")
    report = await verified(world)
    assert kinds(report) == ["foreign"]


async def test_kept_or_witnessed_head_that_changed_is_found(world: World, sam: Party) -> None:
    report = await verified(world)
    assert (await verified(world, earlier_heads=report.heads)).faults == []
    tree, (size, root) = next(iter(report.heads.items()))
    other = {tree: (size, root[::-1])}
    assert kinds(await verified(world, earlier_heads=other)) == ["rewritten"]
    assert kinds(await verified(world, earlier_heads={tree: (size + 5, root)})) == ["truncated"]

    ali = world.party("user", "vera")
    await world.accepted(world.user_set(world.operator, ali, roles=("auditor",)), world.operator)
    await told(world, sam)
    await signed_up_to_the_end(world)
    report = await verified(world)
    assert await witness(report, ali.key, client_settings(world)) == len(report.heads) > 0
    report = await verified(world)
    assert report.faults == []
    assert {"vera"} == {name for one in report.trees for name in one.witnesses}
    # Somebody else's word is none.
    count = await witness(report, sam.key, client_settings(world))
    words = list(await world.records(AUDIT_CHECKPOINT))[-count:]
    letters = await told_as_buried(world, *(word.coordinates for word in words))
    assert {letter.code for letter in letters} == {"not_auditor"}
    assert kinds(await verified(world)) == ["foreign"]


async def test_a_paused_writer_that_wakes_writes_nothing_more(world: World) -> None:
    """It has sent half of a batch, and is paused; another takes over; then it wakes and wants to commit."""
    sources = [Source("x", 0, offset) for offset in range(6)]
    async with world.running("registry"):
        await hand_over(world, *sources)
    batch = [record for record in await world.records(AUDIT_INTAKE) if record.value]
    paused, other = runtime_of(world), runtime_of(world)
    load_trust(paused, world)
    load_trust(other, world)
    first, second = ChainWriter(paused, 60), ChainWriter(other, 60)
    sleeping = Sleeping(first)
    task = asyncio.create_task(first.on_batch(batch))
    await sleeping.has_sent.wait()
    await second.on_batch(batch)
    sleeping.wake.set()
    with pytest.raises(UnavailableError) as caught:
        await task
    assert isinstance(caught.value, FencedError)
    await second.close()
    records = await world.records(AUDIT)
    assert [record.headers["ce_id"] for record in records] == [one.uid for one in sources]
    assert [
        fault for fault in (await verified(world)).faults if fault.kind not in ("invented", "missing")
    ] == []


async def test_chain_writer_continues_where_a_killed_one_stopped(world: World) -> None:
    """Killed before its commit, all comes again; after it, nothing does."""
    sources = [Source("x", 0, offset) for offset in range(6)]
    await hand_over(world, *sources[:3])
    killed = runtime_of(world)
    load_trust(killed, world)
    writer = ChainWriter(killed, 60)
    sleeping = Sleeping(writer)
    batch = list(await world.records(AUDIT_INTAKE))
    task = asyncio.create_task(writer.on_batch(batch))
    await sleeping.has_sent.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    for count in (3, 6):
        again = runtime_of(world)
        load_trust(again, world)
        writer = ChainWriter(again, 60)
        # What was committed comes once more: the consumer was told before the transaction ended.
        await writer.on_batch(list(await world.records(AUDIT_INTAKE)))
        await writer.close()
        records = await world.records(AUDIT)
        assert [record.headers["ce_id"] for record in records] == [one.uid for one in sources[:count]]
        await hand_over(world, *sources[:6])
    assert [
        fault for fault in (await verified(world)).faults if fault.kind not in ("invented", "missing")
    ] == []


def runtime_of(world: World) -> Runtime:
    return Runtime("audit", world.settings("audit"))


def load_trust(runtime: Runtime, world: World) -> None:
    runtime.trust.load(sign(world.bundle, world.root.key, header_jwk=True), world.bundle.iat)


class Sleeping:
    """Puts a writer to sleep between what it sends and its commit."""

    def __init__(self, writer: ChainWriter) -> None:
        self.has_sent, self.wake = asyncio.Event(), asyncio.Event()
        chain = writer._chain

        async def slow(publisher: TransactionalPublisher, events: Any) -> None:
            await chain(publisher, events)
            self.has_sent.set()
            await self.wake.wait()

        writer._chain = slow  # type: ignore[method-assign]


async def test_readers_of_what_is_committed_never_see_what_a_writer_left_behind(world: World) -> None:
    name = AUDIT.name(world.prefix)
    abandoned = AIOKafkaProducer(
        bootstrap_servers=world.bootstrap, transactional_id=f"{world.prefix}.{GROUP}"
    )
    await abandoned.start()
    await abandoned.begin_transaction()
    await abandoned.send_and_wait(name, b"half a batch", key=b"deploy-bot", partition=0)
    async with world.running("registry", "audit", own={"audit": QUICK}):
        good = Source("x", 0, 2)
        await hand_over(world, good)
        await chained(world, good.uid)
        assert b"half a batch" not in {record.value for record in await world.records(AUDIT)}
    await abandoned.stop()


# --- proofs over HTTP ---


async def test_each_event_is_proved_to_be_under_the_signed_head(world: World, sam: Party) -> None:
    ali = await world.user("vera", ("auditor",))
    await world.known(ali, "audit")
    await signed_up_to_the_end(world)
    for record in list(await world.records(AUDIT)):
        answer = (await once_signed(world, ali, f"/v1/events/{record.headers['ce_id']}/proof")).json()
        assert answer["event"].encode() == record.value
        head = parse(answer["checkpoint"]).unverified_claims(AuditCheckpoint)
        proof = [bytes.fromhex(step) for step in answer["proof"]]
        root = root_by_inclusion(leaf_hash(record.value), answer["leaf_index"], head.size, proof)
        assert (root.hex(), answer["leaf_index"]) == (head.root, seq_of(record) - 1)
        forged = root_by_inclusion(leaf_hash(record.value + b" "), answer["leaf_index"], head.size, proof)
        assert forged.hex() != head.root


async def test_an_event_that_was_put_behind_the_last_takes_no_proof_away(world: World, sam: Party) -> None:
    ali = await world.user("vera", ("auditor",))
    await world.known(ali, "audit")
    await signed_up_to_the_end(world)
    lasts = {record.partition: record for record in await world.records(AUDIT)}
    for partition, last in lasts.items():
        forged = linked(
            linkable(json.loads(told_of(Source("x", 0, 0)))),
            str(partition),
            seq_of(last) + 1,
            leaf_hash(last.value),
        )
        await put(world, partition, forged)
    await told(world, sam)
    for record in [one for one in await world.records(AUDIT) if one.headers["ce_id"] != "x"]:
        answer = (await once_signed(world, ali, f"/v1/events/{record.headers['ce_id']}/proof")).json()
        assert answer["event"].encode() == record.value
        head = parse(answer["checkpoint"]).unverified_claims(AuditCheckpoint)
        proof = [bytes.fromhex(step) for step in answer["proof"]]
        root = root_by_inclusion(leaf_hash(record.value), answer["leaf_index"], head.size, proof)
        assert root.hex() == head.root


async def once_signed(world: World, who: Party, path: str, since: int = 0) -> httpx.Response:
    """The answer, once a checkpoint covers what is asked for."""
    async with asyncio.timeout(30):
        while (answer := await world.get("audit", path, who, **{"from": str(since)})).status_code != 200:
            assert answer.json()["error"] == "no_proof", answer.text
            await asyncio.sleep(0.05)
        return answer


async def test_a_chain_is_proved_to_go_on_from_what_it_was(world: World, sam: Party) -> None:
    ali = await world.user("vera", ("auditor",))
    await world.known(ali, "audit")
    (tree, (size, root)), *_ = (await verified(world)).heads.items()
    await told(world, sam)
    await signed_up_to_the_end(world)
    answer = (await once_signed(world, ali, f"/v1/checkpoints/{tree}/consistency", since=size)).json()
    head = parse(answer["checkpoint"]).unverified_claims(AuditCheckpoint)
    proof = [bytes.fromhex(step) for step in answer["proof"]]
    assert is_consistent(size, bytes.fromhex(root), head.size, bytes.fromhex(head.root), proof)
    assert not is_consistent(size, bytes(32), head.size, bytes.fromhex(head.root), proof)
    everything = (await world.get("audit", "/v1/checkpoints", ali)).json()["checkpoints"]
    assert tree in {parse(jws).unverified_claims(AuditCheckpoint).tree for jws in everything}


async def test_proofs_are_for_those_who_may_see_the_event(world: World, sam: Party) -> None:
    (record, *_) = await world.records(AUDIT)
    path = f"/v1/events/{record.headers['ce_id']}/proof"
    eve = await world.user("eve")
    await world.known(eve, "audit")
    assert (await world.get("audit", path, eve)).status_code == 404
    assert (await world.get("audit", path)).status_code == 401
    assert (await world.get("audit", "/v1/checkpoints")).status_code == 401
    assert (
        await world.get("audit", "/v1/checkpoints/0/consistency", eve, **{"from": "x"})
    ).status_code == 400
    too_many = await world.get("audit", "/v1/checkpoints/0/consistency", eve, **{"from": "99999"})
    assert too_many.json()["error"] == "no_proof"


def test_the_nodes_that_are_kept_give_the_roots_of_all_subtrees() -> None:
    store = ProofStore(TrustStore("example.org", "x"), None)
    tip, values = Tip(), []
    for offset in range(700):
        value = linked(linkable(json.loads(told_of(Source("x", 0, offset)))), "0", offset + 1, tip.last)
        tip = tip.followed_by(value)
        values.append(value)
    for start in range(0, 700, 100):
        store.add_events(
            [
                Received(AUDIT, "audit", 0, start + i, 0, "k", value)
                for i, value in enumerate(values[start : start + 100])
            ]
        )
    leaves = [leaf_hash(value) for value in values]
    for level in range(10):
        for index in range(700 >> level):
            expected = TreeHead().grown(leaves[index << level : (index + 1) << level]).root
            assert store._leaves["0"].main_branch.subtree(level, index) == expected


@pytest.mark.parametrize("place", ["taken", "next", "of another chain"])
def test_event_in_no_chain_has_no_proof(place: str) -> None:
    store = ProofStore(TrustStore("example.org", "x"), None)
    tip, value = Tip(), b""
    for offset in range(300):
        value = linked(linkable(json.loads(told_of(Source("x", 0, offset)))), "0", offset + 1, tip.last)
        store.add_events([Received(AUDIT, "audit", 0, offset, 0, "k", value)])
        tip = tip.followed_by(value)
    with pytest.raises(NoProofError, match="not signed yet"):
        store.inclusion(value)
    tree, seq = {"taken": ("0", 7), "next": ("0", 301), "of another chain": ("1", 1)}[place]
    with pytest.raises(NoProofError, match="no such event"):
        store.inclusion(linked(linkable(json.loads(told_of(Source("x", 0, 299)))), tree, seq, tip.last))
