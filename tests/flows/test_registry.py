"""The registry on a real broker: commands in, records and signed answers out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, TopicPartition
from prometheus_client import generate_latest

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.base import Topic
from ringfence.messages.credential import Coordinates
from ringfence.messages.operations import Heartbeat, ServiceEvent
from ringfence.messages.registry import (
    AgentDecommission,
    AgentRecord,
    AgentRegister,
    AgentResume,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    BackendSettings,
    EmbeddedCommand,
    TargetSet,
    TaskAssign,
    TaskConsent,
    TaskEnd,
    TaskTerms,
    UserDisable,
    VerbFloor,
)
from ringfence.messages.topics import AGENT, HEARTBEAT, REGISTRY_COMMAND, SERVICE_EVENT, TARGET, TASK, USER
from ringfence.model.records.directory import TABLES, Directory
from tests.support.world import DeadLetteredError, Party, World, scope

ENV, ENV_A = (scope("staging", ["deploy"], [glob]) for glob in ("env/**", "env/a"))


class Reader:
    """Another service's table, fed from the topics themselves."""

    def __init__(self, world: World, grace_ms: int | None = None) -> None:
        self.alarms: list[str] = []
        self.directory = Directory(
            world.trust,
            SystemClock(),
            grace_ms=grace_ms,
            on_alarm=lambda alarm: self.alarms.append(alarm.code),
        )
        self._follower = Follower(world.settings("policy"), TABLES, self._on_records)

    def _on_records(self, records: Sequence[Received]) -> None:
        self.directory.on_records(records)

    async def __aenter__(self) -> Reader:
        await self._follower.start()
        await asyncio.wait_for(self._follower.complete.wait(), 60)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._follower.stop()


async def values(world: World, topic: Topic[Any], key: str) -> list[bytes]:
    """What stands on a topic under a key, oldest first, up to now."""
    done = await world.send(topic, "end-of-test", f"mark {time.monotonic_ns()}")
    await world.consume_until(topic, lambda r: (r.partition, r.offset) == (done.partition, done.offset))
    return [record.value for record in await world.records(topic) if record.key == key]


async def answers(world: World) -> list[ServiceEvent]:
    """All answers of the registry to commands, up to now."""
    return [
        event
        for value in await values(world, SERVICE_EVENT, "registry")
        if (event := world.opened(_as_received(value), ServiceEvent, "registry")).ref
    ]


def _as_received(value: bytes) -> Received:
    return Received(SERVICE_EVENT, "", 0, 0, int(time.time() * 1000), None, value, ())


async def deliver_from(world: World, offset: int = 0) -> None:
    """Whoever has the group next gets the commands from there on; from 0 it is as after a crash before any commit."""
    group = f"{world.prefix}.registry"
    consumer = AIOKafkaConsumer(bootstrap_servers=world.bootstrap, group_id=group, enable_auto_commit=False)
    partition = TopicPartition(REGISTRY_COMMAND.name(world.prefix), 0)
    consumer.assign([partition])
    await consumer.start()
    try:
        await consumer.commit({partition: offset})
    finally:
        await consumer.stop()


async def resend(world: World, claims: Any, by: Party) -> Coordinates:
    """The very same bytes a second time, at another offset: a replay."""
    return await world.send(REGISTRY_COMMAND, "replay", sign(claims, by.key), claims.typ)


# --- the main line ----------------------------------------------------------------------------------------------------


async def test_an_organisation_comes_to_be_and_every_reader_believes_it(world: World):
    async with world.running("registry"), Reader(world, grace_ms=5000) as reader:
        sam = await world.user("sam", ("sponsor",), ENV)
        bot = await world.agent("deploy-bot", sam, ENV)
        await world.target("staging")
        task = await world.task(bot, sam, ENV_A)
        await world.accepted(world.claims(AgentSuspend, sam, agent_id="deploy-bot", reason="lunch"), sam)

        def known() -> bool:
            agent = reader.directory.agent("deploy-bot")
            return agent is not None and agent.revision == 2 and reader.directory.stale() is None

        await world.consume_until(HEARTBEAT, lambda _: known())
        agent, assigned = reader.directory.agent("deploy-bot"), reader.directory.task(task)
        assert agent is not None
        assert (agent.state.status, agent.state.sponsor, agent.state.ceiling) == ("suspended", "sam", ENV)
        assert assigned is not None
        assert (assigned.state.on_behalf_of, assigned.state.agent_id) == ("sam", "deploy-bot")
        assert reader.alarms == []


async def test_the_answer_says_what_came_of_it(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        bot = await world.agent("deploy-bot", sam)
        terms = TaskTerms(agent_id=bot.name, purpose="x", scope=ENV, not_after=int(time.time()) + 60)
        claims = world.claims(TaskAssign, sam, terms=terms, on_behalf_of="sam")
        sent = await world.send_command(claims, sam)
        event = await world.outcome(claims, sent)
        task = message_id(claims.iss, claims.jti)
        assert (event.kind, event.subject, event.actor, event.ref) == (
            "accepted",
            "task.assign",
            sam.id,
            claims.jti,
        )
        assert (event.result, event.task_id, event.agent_id) == (task, task, "deploy-bot")
        assert event.source == sent
        end = await world.accepted(world.claims(TaskEnd, sam, task_id=task, reason="done"), sam)
        assert (end.task_id, end.agent_id) == (task, "deploy-bot")


async def test_a_refusal_is_signed_and_says_why(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        suzy = await world.user("suzy", ("sponsor",))
        await world.agent("deploy-bot", sam)
        claims = world.claims(AgentSetCeiling, suzy, agent_id="deploy-bot", ceiling=ENV)
        event = await world.command(claims, suzy)
        assert (event.kind, event.reasons[0].code, event.result) == ("refused", "not_sponsor", None)
        assert event.agent_id == "deploy-bot"
        assert len(await values(world, AGENT, "deploy-bot")) == 1


async def test_a_command_with_a_field_that_nobody_knows_is_refused_by_name(world: World):
    async with world.running("registry"):
        verb = VerbFloor(verb="deploy").model_copy(update={"asks": "sponsor"})
        claims = world.claims(
            TargetSet, world.operator, target_id="platform", description="a target",
            backend=BackendSettings(kind="jwt"), verbs=(verb,),
        )  # fmt: skip
        event = await world.command(claims, world.operator)
        assert (event.kind, event.reasons[0].code) == ("refused", "unknown_field")
        assert event.reasons[0].message == (
            'unknown field "asks" in target platform, verbs.deploy: did you mean "ask"?'
        )
        assert not await values(world, TARGET, "platform")


async def test_command_without_a_change_is_accepted_and_writes_no_record(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        await world.agent("deploy-bot", sam, ENV)
        await world.accepted(world.claims(AgentSetCeiling, sam, agent_id="deploy-bot", ceiling=ENV), sam)
        assert len(await values(world, AGENT, "deploy-bot")) == 1


async def test_commands_sent_at_once_are_each_answered(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        await asyncio.gather(*(world.agent(f"bot-{n}", sam) for n in range(20)))
        # One key, two agents, at the same time: one of them is told no.
        key = world.party("agent", "x").key_record()
        events = await asyncio.gather(
            *(
                world.command(
                    world.claims(
                        AgentRegister,
                        sam,
                        agent_id=f"twin-{n}",
                        sponsor="sam",
                        description="x",
                        keys=(key,),
                        ceiling=(),
                    ),
                    sam,
                )
                for n in range(2)
            )
        )
        assert sorted((e.kind, *(r.code for r in e.reasons)) for e in events) == [
            ("accepted",),
            ("refused", "key_taken"),
        ]


# --- repeats ----------------------------------------------------------------------------------------------------------


async def test_a_replay_changes_nothing_and_is_told(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        await world.agent("deploy-bot", sam)
        wide = world.claims(AgentSetCeiling, sam, agent_id="deploy-bot", ceiling=ENV)
        await world.accepted(wide, sam)
        await world.accepted(world.claims(AgentSetCeiling, sam, agent_id="deploy-bot", ceiling=()), sam)
        forbidden = world.claims(AgentResume, sam, agent_id="deploy-bot", reason="x")
        assert (await world.command(forbidden, sam)).kind == "refused"
        for claims in (wide, forbidden):
            sent = await resend(world, claims, sam)
            event = await world.outcome(claims, sent)
            assert (event.kind, event.source) == ("replayed", sent)
        assert len(await values(world, AGENT, "deploy-bot")) == 3


async def test_a_replay_is_still_known_after_a_restart(world: World):
    """Also of a command that no record embeds any more, and of one that was refused."""
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        await world.agent("deploy-bot", sam)
        wide = world.claims(AgentSetCeiling, sam, agent_id="deploy-bot", ceiling=ENV)
        await world.accepted(wide, sam)
        await world.accepted(world.claims(AgentSetCeiling, sam, agent_id="deploy-bot", ceiling=()), sam)
        early = world.claims(AgentResume, sam, agent_id="deploy-bot", reason="x")
        assert (await world.command(early, sam)).kind == "refused"
    async with world.running("registry"):
        for claims in (wide, early):
            event = await world.outcome(claims, await resend(world, claims, sam))
            assert event.kind == "replayed"
        assert len(await values(world, AGENT, "deploy-bot")) == 3


async def test_redelivered_commands_are_carried_out_once(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        bot = await world.agent("deploy-bot", sam)
        await world.task(bot, sam, ENV)
        for ceiling in (ENV, ENV_A, ENV):
            await world.accepted(
                world.claims(AgentSetCeiling, sam, agent_id="deploy-bot", ceiling=ceiling), sam
            )
        refused = world.claims(AgentResume, sam, agent_id="deploy-bot", reason="x")
        await world.command(refused, sam)
    before = {topic.what: len(await world.records(topic)) for topic in (USER, AGENT, TASK)}
    told = {event.jti for event in await answers(world)}
    await deliver_from(world)
    async with world.running("registry"):
        # Whatever came after everything else is answered: so all of it was gone through.
        await world.accepted(world.claims(AgentSetCeiling, sam, agent_id="deploy-bot", ceiling=()), sam)
        after = await answers(world)
    assert {event.kind for event in after} == {
        "accepted",
        "refused",
        "finding",
        "widened",
    }  # of the first key of sam
    assert len({event.jti for event in after} - told) == 1
    assert len(await values(world, AGENT, "deploy-bot")) == 5
    for topic in (USER, TASK):
        assert len(await world.records(topic)) == before[topic.what], topic.what


async def test_a_command_that_stands_there_twice_is_done_once(world: World):
    """Both were there before the registry came: it has nothing but its own memory to tell them apart."""
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        await world.agent("deploy-bot", sam)
    wide = world.claims(AgentSetCeiling, sam, agent_id="deploy-bot", ceiling=ENV)
    early = world.claims(AgentResume, sam, agent_id="deploy-bot", reason="x")
    sent = [(claims, await resend(world, claims, sam)) for claims in (wide, early) for _ in range(2)]
    async with world.running("registry"):
        kinds = [(await world.outcome(claims, place)).kind for claims, place in sent]
    assert kinds == ["accepted", "replayed", "refused", "replayed"]


async def registered_without_answer(world: World, sam: Party) -> tuple[AgentRegister, Coordinates]:
    """A registry wrote the record and died before it answered."""
    bot = world.party("agent", "deploy-bot")
    claims = world.claims(
        AgentRegister, sam, agent_id="deploy-bot", sponsor="sam", description="x", keys=(bot.key_record(),), ceiling=ENV
    )  # fmt: skip
    compact = sign(claims, sam.key)
    sent = await world.send(REGISTRY_COMMAND, "deploy-bot", compact)
    state = AgentState(
        agent_id="deploy-bot", sponsor="sam", description="x", keys=claims.keys, ceiling=ENV, status="active"
    )
    record = AgentRecord(
        iss=world.key("registry").id, aud=world.td, iat=sent.appended_at_ms // 1000, jti="x", sub=bot.id, revision=1,
        commands=(EmbeddedCommand(jws=compact, appended_at_ms=sent.appended_at_ms),), state=state,
    )  # fmt: skip
    await world.send(AGENT, "deploy-bot", sign(record, world.key("registry")))
    return claims, sent


async def test_a_process_that_died_between_record_and_answer(world: World):
    """The next process answers, and writes no second record."""
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
    claims, sent = await registered_without_answer(world, sam)
    async with world.running("registry"):
        event = await world.outcome(claims, sent)
        assert (event.kind, event.result) == ("accepted", "deploy-bot")
        assert (await world.outcome(claims, await resend(world, claims, sam))).kind == "replayed"
        assert len(await values(world, AGENT, "deploy-bot")) == 1


async def test_a_replay_is_known_where_only_the_record_remembers(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
    claims, sent = await registered_without_answer(world, sam)
    await deliver_from(world, sent.offset + 1)
    async with world.running("registry"):
        assert (await world.outcome(claims, await resend(world, claims, sam))).kind == "replayed"
        assert len(await values(world, AGENT, "deploy-bot")) == 1


async def test_keys_names_and_consents_are_remembered_over_a_restart(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        uma = await world.user("uma", (), ENV)
        bot = await world.agent("deploy-bot", sam, ENV)
        terms = TaskTerms(agent_id="deploy-bot", purpose="x", scope=ENV, not_after=int(time.time()) + 600)
        consent = sign(world.claims(TaskConsent, uma, terms=terms), uma.key)
        assign = {"terms": terms, "on_behalf_of": "uma", "consent": consent}
        await world.accepted(world.claims(TaskAssign, sam, **assign), sam)
    async with world.running("registry"):
        again = await world.command(world.claims(TaskAssign, sam, **assign), sam)
        assert again.reasons[0].code == "consent_used"
        await world.accepted(world.claims(AgentDecommission, sam, agent_id="deploy-bot", reason="x"), sam)
        fields = {"sponsor": "sam", "description": "x", "ceiling": ()}
        for agent_id, key, code in (
            ("other", bot.key_record(), "key_taken"),
            ("other", uma.key_record(), "key_taken"),
            ("deploy-bot", world.party("agent", "deploy-bot").key_record(), "name_taken"),
        ):
            claims = world.claims(AgentRegister, sam, agent_id=agent_id, keys=(key,), **fields)
            assert (await world.command(claims, sam)).reasons[0].code == code


# --- what strangers send ----------------------------------------------------------------------------------------------


async def test_command_of_an_unknown_signer_is_dead_lettered(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        stranger = world.party("user", "eve")
        impostor = Party("sam", SigningKey.generate(sam.id))
        expired = {"iat": int(time.time()) - 600, "exp": int(time.time()) - 300}
        cases: list[tuple[Any, Party, str]] = [
            (world.claims(AgentSuspend, stranger, agent_id="x", reason="x"), stranger, "key_unknown"),
            (world.claims(AgentSuspend, sam, agent_id="x", reason="x"), impostor, "key_unknown"),
            (world.claims(AgentSuspend, sam, agent_id="x", reason="x", **expired), sam, "expired"),
            (
                world.claims(AgentSuspend, sam, agent_id="x", reason="x", aud="other.example"),
                sam,
                "aud_unexpected",
            ),
        ]
        for claims, by, code in cases:
            with pytest.raises(DeadLetteredError) as caught:
                await world.command(claims, by)
            assert caught.value.letter.code == code
        garbage = [b"", b"garbage", b"\x00" * 100, b"e30.e30.e30", b"{" * 5000, b"a" * 600_000]
        for value in garbage:
            sent = await world.send(REGISTRY_COMMAND, "x", value)
            claims = world.claims(AgentSuspend, sam, agent_id="x", reason="x")
            with pytest.raises(DeadLetteredError):
                await world.outcome(claims, sent)
        await world.agent("deploy-bot", sam)  # it still works


async def test_a_disabled_user_is_nobody(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        await world.agent("deploy-bot", sam)
        disable = world.claims(UserDisable, world.operator, user_id="sam", reason="left")
        await world.accepted(disable, world.operator)
        with pytest.raises(DeadLetteredError, match="no valid key"):
            await world.command(world.claims(AgentSetCeiling, sam, agent_id="deploy-bot", ceiling=ENV), sam)


def is_revision(world: World, after: int, revision: int, record: Received) -> bool:
    return record.offset > after and world.opened(record, AgentRecord, "registry").revision == revision


async def finding_at(world: World, place: Coordinates) -> ServiceEvent:
    return await world.event_where(lambda event: event.kind == "finding" and event.source == place)


# --- a topic that others write to -------------------------------------------------------------------------------------


async def test_a_forged_record_is_found_and_written_over(world: World):
    """Compaction keeps the last record under a key: it must be the one that counts."""
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        await world.agent("deploy-bot", sam, ENV_A)
        old = (await values(world, AGENT, "deploy-bot"))[-1]
        await world.accepted(world.claims(AgentSuspend, sam, agent_id="deploy-bot", reason="x"), sam)
        for forged, code in ((b"garbage", "not_a_jws"), (old, "revision_fell"), (b"", "tombstone")):
            sent = await world.send(AGENT, "deploy-bot", forged)
            event = await finding_at(world, sent)
            assert event.reasons[0].code == code
            await world.consume_until(AGENT, partial(is_revision, world, sent.offset, 2))
    async with Reader(world) as reader:
        agent = reader.directory.agent("deploy-bot")
        assert agent is not None
        assert agent.state.status == "suspended"
        assert reader.directory.displaced() == []


async def test_records_that_vanished_while_it_was_away_are_found(world: World):
    """A registry that starts cannot know better than its topics; what its last heartbeat said is there to compare."""
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        await world.agent("deploy-bot", sam)
        mark = await world.send(SERVICE_EVENT, "x", "mark")
        await world.consume_until(HEARTBEAT, lambda r: r.appended_at_ms > mark.appended_at_ms + 1000)
    beats = [r for r in await world.records(HEARTBEAT) if r.key == "registry"]
    last = world.opened(beats[-1], Heartbeat, "registry")
    tables = tuple(
        table.model_copy(update={"count": table.count + 1})
        if table.topic == AGENT.name(world.prefix)
        else table
        for table in last.tables
    )
    more = last.model_copy(update={"tables": tables, "at_ms": last.at_ms + 1, "jti": "more"})
    await world.send(HEARTBEAT, "registry", sign(more, world.key("registry")))
    async with world.running("registry"):
        event = await world.event_where(lambda e: e.reasons and e.reasons[0].code == "table_differs")
        assert AGENT.name(world.prefix) in event.reasons[0].message


async def test_a_registry_that_nobody_would_believe_takes_no_command(world: World):
    """The trust bundle names another key: what it wrote would count for nothing. It says so, and waits."""
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        await world.publish_trust(
            world.make_bundle(2, registry=SigningKey.generate(world.key("registry").id))
        )
        runtime = world.runtimes["registry"]
        await world.until(lambda: True if runtime.unready() else None, "that it is not ready")
        ready = await world.get("registry", "/readyz")
        assert ready.status_code == 503
        assert "ringfence init" in ready.json()["reasons"][0]
        claims = world.claims(AgentSuspend, sam, agent_id="x", reason="x")
        sent = await world.send_command(claims, sam)
        tried = f'ringfence_batch_retries_total{{group="{world.prefix}.registry"}}'
        await world.until(lambda: True if tried in generate_latest().decode() else None, "that it waits")
        await world.publish_trust(world.make_bundle(3))
        assert (await world.outcome(claims, sent)).reasons[0].code == "unknown_agent"


# --- replicas ---------------------------------------------------------------------------------------------------------


async def test_another_replica_goes_on_where_the_first_stopped(world: World):
    async with world.running("registry"):
        async with world.running("registry"):
            sam = await world.user("sam", ("sponsor",))
            await world.agent("deploy-bot", sam)
            wide = world.claims(AgentSetCeiling, sam, agent_id="deploy-bot", ceiling=ENV)
            await world.accepted(wide, sam)
        await world.accepted(world.claims(AgentSuspend, sam, agent_id="deploy-bot", reason="x"), sam)
        event = await world.outcome(wide, await resend(world, wide, sam))
        assert event.kind == "replayed"
    revisions = [
        world.opened(record, AgentRecord, "registry").revision
        for record in await world.records(AGENT)
        if record.key == "deploy-bot"
    ]
    assert revisions == [1, 2, 3]


async def test_only_the_replica_that_has_the_commands_sends_heartbeats(world: World):
    """Each replica has a key of its own here, so that one sees whose the heartbeats and the answers are."""
    key = world.key("registry")
    second = SigningKey.generate(key.id)
    path = world.folder / "second.json"
    second.save(path)
    bundle = world.make_bundle(2)
    services = tuple(
        service.model_copy(update={"keys": (*service.keys, second.record(bundle.exp))})
        if service.id == key.id
        else service
        for service in bundle.services
    )
    bundle = bundle.model_copy(update={"services": services})
    await world.publish_trust(bundle)
    world.trust.load(sign(bundle, world.root.key, header_jwk=True), time.time())

    async def said() -> list[str]:
        """The replica that answers a command, and those that send the next three heartbeats."""
        claims = world.claims(AgentSuspend, world.operator, agent_id="x", reason="x")
        await world.command(claims, world.operator)
        answer = await world.consume_until(
            SERVICE_EVENT, lambda record: world.event(record).ref == claims.jti
        )
        beats = await world.records(HEARTBEAT)

        def next_three() -> list[str] | None:
            later = [parse(r.value).header.kid for r in beats if r.appended_at_ms > answer.appended_at_ms]
            return later[:3] if len(later) >= 3 else None

        return [
            parse(answer.value).header.kid,
            *await world.until(next_three, "three heartbeats"),
        ]

    async def owner() -> str:
        kids: list[str] = []
        for _ in range(5):  # the commands may just have changed hands
            kids = await said()
            if len(set(kids)) == 1:
                return kids[0]
        raise AssertionError(f"heartbeats of several replicas at once: {kids}")

    async with world.running("registry"):
        async with world.running("registry", key_file=path):
            assert await owner() in (key.kid, second.kid)
        assert await owner() == key.kid


# --- reading ----------------------------------------------------------------------------------------------------------


async def test_each_role_sees_only_its_own_records(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        suzy = await world.user("suzy", ("sponsor",))
        adam = await world.user("adam", ("auditor",))
        uma = await world.user("uma")
        bot, robot = await world.agent("deploy-bot", sam, ENV), await world.agent("robot", suzy)
        await world.target("staging")
        task = await world.task(bot, uma, ENV)
        other = await world.task(robot, suzy, ENV)

        async def sees(who: Party, path: str, **query: str) -> set[str]:
            response = await world.get("registry", f"/v1/{path}", who, **query)
            assert response.status_code == 200, response.text
            (items,) = response.json().values()
            return {item["id"] for item in items}

        everyone = {"olga", "sam", "suzy", "adam", "uma"}
        for who in (world.operator, adam):
            assert await sees(who, "users") == everyone
            assert await sees(who, "agents") == {"deploy-bot", "robot"}
            assert await sees(who, "tasks") == {task, other}
        assert await sees(sam, "users") == {"sam"}
        assert await sees(sam, "agents") == {"deploy-bot"}
        assert await sees(sam, "tasks") == {task}
        assert await sees(uma, "agents") == set()
        assert await sees(uma, "tasks") == {task}
        assert await sees(uma, "targets") == {"staging"}
        assert await sees(adam, "tasks", agent="robot") == {other}
        await world.accepted(world.claims(TaskEnd, uma, task_id=task, reason="done"), uma)
        assert await sees(adam, "tasks", status="active") == {other}
        assert await sees(adam, "tasks", status="ended") == {task}
        cases: list[tuple[str, Party | None, int]] = [
            ("agents/robot", suzy, 200),
            ("agents/robot", sam, 404),
            ("agents/nobody", sam, 404),
            ("users/uma", uma, 200),
            ("users/sam", uma, 404),
            (f"tasks/{other}", uma, 404),
            (f"tasks/{task}", sam, 200),
            ("targets/staging", uma, 200),
            ("targets/none", uma, 404),
            ("users/sam", world.party("user", "eve"), 401),
            ("users/sam", Party("sam", SigningKey.generate(sam.id)), 401),
            ("agents/deploy-bot", bot, 401),
            ("users/sam", None, 401),
        ]
        for path, caller, status in cases:
            response = await world.get("registry", f"/v1/{path}", caller)
            assert response.status_code == status, (path, response.text)
        # What is there and not theirs is answered as what is not there is, to the letter.
        for kind, id in (("users", "suzy"), ("agents", "robot"), ("tasks", other)):
            answers = [await world.get("registry", f"/v1/{kind}/{one}", uma) for one in (id, "nobody")]
            told = [
                (answer.status_code, answer.text.replace(one, "ID"))
                for answer, one in zip(answers, (id, "nobody"), strict=True)
            ]
            assert told[0] == told[1]
            assert told[0][0] == 404


async def test_tasks_come_page_by_page(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        suzy = await world.user("suzy", ("sponsor",))
        bot, robot = await world.agent("deploy-bot", sam, ENV), await world.agent("robot", suzy)
        await world.target("staging")
        lives = (3000, 1000, 4000, 2000, 5000)
        tasks = {life: await world.task(bot, sam, ENV, life_s=life) for life in lives}
        await world.task(robot, suzy, ENV)
        over = await world.task(bot, sam, ENV, life_s=6000)
        await world.accepted(world.claims(TaskEnd, sam, task_id=over, reason="done"), sam)

        async def pages(**query: str) -> list[list[str]]:
            found: list[list[str]] = []
            after: dict[str, str] = {}
            while True:
                answer = (await world.get("registry", "/v1/tasks", sam, **query, **after)).json()
                found.append([one["id"] for one in answer["tasks"]])
                assert answer["count"] == (5 if query.get("status") == "active" else 6)
                if answer["after"] is None:
                    return found
                after = {"after": answer["after"]}

        by_end = [tasks[life] for life in sorted(lives)]
        assert await pages(status="active", limit="2") == [by_end[:2], by_end[2:4], by_end[4:]]
        assert await pages(limit="4") == [[over, *by_end[:1:-1]], by_end[1::-1]]
        assert await pages(status="active", limit="5") == [by_end], "a page that is just full is the last one"
        for wrong in ({"limit": "0"}, {"limit": "1001"}, {"limit": "x"}, {"limit": "2", "after": "x"}):
            answer = await world.get("registry", "/v1/tasks", sam, **wrong)
            assert answer.status_code == 400, answer.text


async def test_a_record_read_over_http_can_be_verified(world: World):
    async with world.running("registry"):
        sam = await world.user("sam", ("sponsor",))
        await world.agent("deploy-bot", sam)
        response = await world.get("registry", "/v1/agents/deploy-bot", sam, records="1")
        answer = response.json()
        record = world.opened(_as_received(answer["record"].encode()), AgentRecord, "registry")
        assert (answer["id"], answer["revision"]) == ("deploy-bot", record.revision)
        assert answer["state"] == record.state.model_dump(mode="json")
