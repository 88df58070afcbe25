"""The local table: what it takes in, what it refuses and tells, and when it denies."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Permission
from ringfence.messages.operations import Heartbeat, PartitionDigest
from ringfence.messages.registry import (
    AgentResume,
    AgentSetCeiling,
    AgentSuspend,
    AnyRecord,
    TargetRemove,
    UserDisable,
)
from ringfence.messages.topics import AGENT, HEARTBEAT, USER
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Alarm, Directory
from ringfence.model.verdict import ALLOWED
from tests.support.in_memory_registry import TOPICS, InMemoryRegistry, permission
from tests.support.polling import until

WIDE, NARROW = (permission("env/**"),), (permission("env/a"),)
KINDS: tuple[SubjectKind, ...] = ("user", "agent", "target", "task")
GRACE_MS = 5000


class Reader:
    """Another service's table, fed as a follower feeds it."""

    def __init__(self, ledger: InMemoryRegistry, grace_ms: int | None = None) -> None:
        self.ledger = ledger
        self.alarms: list[Alarm] = []
        self.directory: Directory = ledger.reader(self.alarms.append, grace_ms)

    def reads(
        self, record: AnyRecord | bytes, key: str | None = None, kind: SubjectKind = "agent"
    ) -> list[str]:
        """One record from its topic; the codes of the alarms that it raised."""
        before = len(self.alarms)
        value = record
        if not isinstance(record, bytes):
            kind = record.typ  # type: ignore[assignment]
            key = record.sub.rpartition("/")[2] if key is None else key
            value = sign(record, self.ledger.registry).encode()
        assert isinstance(value, bytes)
        self.directory.on_records([self.ledger.received(TOPICS[kind], key or "", value)])
        return [alarm.code for alarm in self.alarms[before:]]

    def reads_all(self) -> None:
        for kind in KINDS:
            for entry in self.ledger.directory.entries(kind):
                assert self.reads(entry.record) == []

    def beats(
        self,
        tables: tuple[PartitionDigest, ...] | None = None,
        at_ms: int | None = None,
        key: SigningKey | None = None,
    ) -> bytes:
        """A heartbeat of the registry arrives; returned, to be sent again."""
        key = key or self.ledger.registry
        at_ms = self.ledger.clock.ms if at_ms is None else at_ms
        tables = self.ledger.directory.digests() if tables is None else tables
        beat = Heartbeat(
            iss=key.id, aud="test.example", iat=at_ms // 1000, jti=f"b{at_ms}", at_ms=at_ms, tables=tables
        )
        value = sign(beat, key).encode()
        self.hears(value)
        return value

    def hears(self, value: bytes) -> None:
        self.directory.on_records([self.ledger.received(HEARTBEAT, "registry", value)])


@pytest.fixture
def ledger() -> InMemoryRegistry:
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.register("sam", "bot", "sam", ceiling=NARROW))
    return ledger


@pytest.fixture
def reader(ledger: InMemoryRegistry) -> Reader:
    reader = Reader(ledger)
    reader.reads_all()
    return reader


def record(ledger: InMemoryRegistry, kind: SubjectKind = "agent", id: str = "bot") -> AnyRecord:
    entry = ledger.directory.entry(kind, id)
    assert entry is not None
    return entry.record


def ceiling(reader: Reader) -> Any:
    entry = reader.directory.agent("bot")
    assert entry is not None
    return entry.state.ceiling


# --- taking in --------------------------------------------------------------------------------------------------------


def test_directory_answers_with_state_revision_and_ids(ledger: InMemoryRegistry, reader: Reader):
    directory = reader.directory
    entry = directory.agent("bot")
    assert entry is not None
    assert (entry.state.sponsor, entry.revision) == ("sam", 1)
    assert parse(entry.compact).header.kid == ledger.registry.kid
    assert directory.agent("nobody") is None
    assert directory.entry("user", "sam") is not None
    names = [e.record.sub.rpartition("/")[2] for e in directory.entries("user")]
    assert names == ["adam", "olga", "otto", "sam", "suzy", "uma"]


def test_keys_count_for_their_owner_and_their_time(ledger: InMemoryRegistry, reader: Reader):
    directory, now = reader.directory, ledger.clock.ms / 1000
    bot, sam = ledger.key("bot", "agent"), ledger.key("sam")
    assert directory.agent_key(bot.id, bot.kid, now)
    assert directory.user_key(sam.id, sam.kid, now)
    assert directory.agent_key(sam.id, sam.kid, now) is None
    assert directory.user_key(bot.id, bot.kid, now) is None
    assert directory.user_key(sam.id, bot.kid, now) is None
    assert directory.agent_key(bot.id, bot.kid, now + 20 * 365 * 86_400) is None
    ledger.give(ledger.claims(UserDisable, "olga", user_id="sam", reason="x"))
    reader.reads(record(ledger, "user", "sam"))
    assert directory.user_key(sam.id, sam.kid, now) is None


def test_listeners_are_told_what_was_taken_in(ledger: InMemoryRegistry):
    reader = Reader(ledger)
    told: list[tuple[str, ...]] = []
    reader.directory.on_change(lambda *changed: told.append(changed))
    reader.reads(record(ledger))
    reader.reads(record(ledger))
    reader.reads(b"garbage", "bot")
    assert told == [("agent", "bot")]


def test_records_may_come_before_those_of_their_signers(ledger: InMemoryRegistry):
    reader = Reader(ledger)
    reader.reads(record(ledger))
    with pytest.raises(ChainError):
        reader.directory.agent("bot")
    reader.reads(record(ledger, "user", "sam"))
    with pytest.raises(ChainError):
        reader.directory.agent("bot")
    reader.reads(record(ledger, "user", "olga"))
    assert reader.directory.agent("bot") is not None


def test_the_same_record_signed_once_more_is_the_same(ledger: InMemoryRegistry, reader: Reader):
    """A registry that was killed at the wrong moment, or writes over what somebody wrote, signs again."""
    assert reader.reads(record(ledger)) == []
    assert reader.directory.displaced() == []


# --- refusing ---------------------------------------------------------------------------------------------------------


def test_a_record_that_the_registry_did_not_sign(ledger: InMemoryRegistry, reader: Reader):
    raised = ledger.record(
        record(ledger).state.model_copy(update={"ceiling": WIDE}), record(ledger).commands, 2
    )
    for key in (ledger.key("olga"), SigningKey.generate(ledger.registry.id), ledger.root):
        claims = raised.model_copy(update={"iss": key.id})
        assert reader.reads(sign(claims, key).encode(), "bot") == ["key_unknown"]
    assert ceiling(reader) == NARROW


@pytest.mark.parametrize("value", [b"garbage", b"a.b.c", b"\xff\xfe", b"e30.e30.e30"])
def test_garbage(ledger: InMemoryRegistry, reader: Reader, value: bytes):
    assert len(reader.reads(value, "bot")) == 1
    assert ceiling(reader) == NARROW


def test_a_lower_revision_is_refused_and_told(ledger: InMemoryRegistry, reader: Reader):
    old = record(ledger)
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    reader.reads(record(ledger))
    assert reader.reads(old) == ["revision_fell"]
    entry = reader.directory.agent("bot")
    assert entry is not None
    assert entry.state.status == "suspended"
    alarm = reader.alarms[-1]
    assert alarm.subject == "spiffe://test.example/agent/bot"
    assert alarm.source is not None
    assert alarm.source.topic == AGENT.name("ringfence")


def test_late_copy_of_a_published_record_is_no_replay(ledger: InMemoryRegistry, reader: Reader):
    """It had published the next one by then. Put there again, the same bytes are an old record."""

    def written() -> Received:
        return ledger.received(
            AGENT, "robot", sign(record(ledger, "agent", "robot"), ledger.registry).encode()
        )

    ledger.give(ledger.register("sam", "robot", "sam"))
    first, again = written(), written()
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="robot", reason="x"))
    then = written()
    for one in (first, again, then):
        assert reader.directory.take_own("agent", one.value, one.coordinates) == ALLOWED
    reader.directory.on_records([first, again, then])
    assert (reader.alarms, reader.directory.displaced()) == ([], [])
    assert reader.reads(first.value, "robot") == ["revision_fell"]
    assert reader.directory.displaced() == [("agent", "robot")]


def test_record_read_before_its_own_publication_is_expected_once(ledger: InMemoryRegistry, reader: Reader):
    old = record(ledger)
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    new = ledger.received(AGENT, "bot", sign(record(ledger), ledger.registry).encode())
    reader.directory.on_records([new])
    assert reader.directory.take_own("agent", new.value, new.coordinates) == ALLOWED
    assert reader.reads(old) == ["revision_fell"]
    reader.directory.on_records([new._replace(value=b"x")])
    assert [alarm.code for alarm in reader.alarms] == ["revision_fell", "not_a_jws"]


def test_the_same_revision_that_says_something_else(ledger: InMemoryRegistry, reader: Reader):
    raised = ledger.embed(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE))
    bot = record(ledger)
    twin = ledger.record(
        bot.state.model_copy(update={"ceiling": WIDE}), (*bot.commands, raised), bot.revision
    )
    assert reader.reads(twin) == ["revision_fell"]
    assert ceiling(reader) == NARROW


def test_a_record_under_the_key_of_another(ledger: InMemoryRegistry, reader: Reader):
    """It would be signed and valid; compaction would let the other one vanish."""
    ledger.give(ledger.register("sam", "robot", "sam"))
    assert reader.reads(record(ledger, "agent", "robot"), key="bot") == ["wrong_key"]
    assert reader.directory.agent("robot") is None
    assert reader.directory.displaced() == [("agent", "bot")]


def test_a_record_of_another_kind_of_subject(ledger: InMemoryRegistry, reader: Reader):
    sam = record(ledger, "user", "sam")
    assert reader.reads(sign(sam, ledger.registry).encode(), "sam", "agent") == ["typ_unexpected"]
    disguised = sam.model_copy(update={"sub": "spiffe://test.example/agent/sam"})
    assert reader.reads(disguised) == ["wrong_subject"]


def test_a_broken_chain_counts_for_nothing_and_is_told_once(ledger: InMemoryRegistry, reader: Reader):
    bot = record(ledger)
    raised = ledger.record(bot.state.model_copy(update={"ceiling": WIDE}), bot.commands, 2)
    assert reader.reads(raised) == []
    for step in range(3):
        with pytest.raises(ChainError):
            reader.directory.agent("bot")
        ledger.give(ledger.user_set("olga", "uma", name=f"Uma {step}"))
        reader.reads(record(ledger, "user", "uma"))  # a signer may have come: it is looked at again
    assert [alarm.code for alarm in reader.alarms] == ["chain_broken"]
    assert reader.alarms[0].source is not None
    assert list(reader.directory.entries("agent")) == []


def test_the_agents_of_a_sponsor_are_found_without_verifying_those_of_others(
    ledger: InMemoryRegistry, reader: Reader
):
    ledger.give(ledger.register("suzy", "other", "suzy", ceiling=NARROW))
    ledger.give(ledger.register("sam", "again", "sam", ceiling=NARROW))
    for id in ("other", "again"):
        assert reader.reads(record(ledger, id=id)) == []
    bot = record(ledger)
    assert reader.reads(ledger.record(bot.state.model_copy(update={"ceiling": WIDE}), bot.commands, 2)) == []
    assert [agent.state.agent_id for agent in reader.directory.agents_of("suzy")] == ["other"]
    assert reader.alarms == [], "the broken record of another sponsor's agent was verified"
    assert [agent.state.agent_id for agent in reader.directory.agents_of("sam")] == ["again"]
    assert [alarm.code for alarm in reader.alarms] == ["chain_broken"]
    assert list(reader.directory.agents_of("nobody")) == []


# --- what a registry leaves out ---------------------------------------------------------------------------------------


def next_record(ledger: InMemoryRegistry, commands: Any, kind: SubjectKind = "agent", id: str = "bot") -> Any:
    """The next revision that a dishonest registry makes of these commands. Its chain holds."""
    made = ledger.follow(tuple(commands), record(ledger, kind, id).revision + 1)
    ledger.chains().verify(made)
    return made


@pytest.mark.parametrize(
    ("kind", "id", "what"),
    [
        ("agent", "bot", lambda ledger: ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="x")),
        ("agent", "bot", lambda ledger: ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=())),
        ("agent", "bot", lambda ledger: ledger.transfer("sam", "bot", "suzy")),
        ("user", "sam", lambda ledger: ledger.claims(UserDisable, "olga", user_id="sam", reason="x")),
        ("user", "sam", lambda ledger: ledger.user_set("olga", "sam", [])),
        ("target", "prod", lambda ledger: ledger.claims(TargetRemove, "olga", target_id="prod", reason="x")),
        ("target", "prod", lambda ledger: ledger.target_set("olga", "prod", max_ttl_s=1)),
    ],
)
def test_restricting_command_left_out_is_detected(
    ledger: InMemoryRegistry, kind: SubjectKind, id: str, what: Callable[[InMemoryRegistry], Any]
):
    """A suspension, a lower ceiling, a lost role: without that command the chain holds, and gives what was before."""
    ledger.give(ledger.target_set("olga", "prod"))
    before = record(ledger, kind, id)
    ledger.give(what(ledger))
    reader = Reader(ledger)
    reader.reads_all()
    without = next_record(ledger, before.commands, kind, id)
    assert without.state == before.state
    assert reader.reads(without) == ["history_changed"]
    entry = reader.directory.entry(kind, id)
    assert entry is not None
    assert entry.state == record(ledger, kind, id).state != before.state


@pytest.mark.parametrize("delay_ms", [0, 5000])
def test_an_order_of_the_past_cannot_undo_a_newer_one(ledger: InMemoryRegistry, delay_ms: int):
    """The wider ceiling that a narrower one replaced, as if it had come (again) after that."""
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE))
    first, wide = record(ledger).commands
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()))
    reader = Reader(ledger)
    reader.reads_all()
    wide = wide.model_copy(update={"appended_at_ms": wide.appended_at_ms + delay_ms})
    undone = next_record(ledger, [first, wide])
    assert undone.state.ceiling == WIDE
    assert reader.reads(undone) == ["history_changed"]
    assert ceiling(reader) == ()


def test_operators_narrowing_cannot_be_left_out_by_its_subject(
    ledger: InMemoryRegistry,
):
    """Nobody widens themselves: what dora sets of herself is held against what otto left her, and that stays."""
    as_of = ledger.clock.ms // 1000

    def dora_by(who: str, *scope: Permission) -> Any:
        entitlements = ledger.entitlements(*scope, as_of=as_of)
        return ledger.user_set(who, "dora", ["operator"], entitlements=entitlements)

    for scope in (WIDE, NARROW):
        ledger.give(dora_by("otto", *scope))
    *before, narrowed = record(ledger, "user", "dora").commands
    reader = Reader(ledger)
    reader.reads_all()
    ledger.clock.ms += 5000
    wide_again = next_record(ledger, [*before, ledger.embed(dora_by("dora", *WIDE))], "user", "dora")
    assert wide_again.state.entitlements.scope == WIDE, "by the chain alone it holds"
    assert narrowed not in wide_again.commands
    assert reader.reads(wide_again) == ["history_changed"]
    entry = reader.directory.user("dora")
    assert entry is not None
    assert entry.state.entitlements.scope == NARROW


def test_a_sponsors_suspension_cannot_take_the_place_of_an_operators(ledger: InMemoryRegistry):
    """With the sponsor's help, who signs one of their own after it, to lift that."""
    (registered,) = record(ledger).commands
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="looking into it"))
    reader = Reader(ledger)
    reader.reads_all()
    own = ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="lunch")
    alone = next_record(ledger, [registered, ledger.embed(own)])
    assert not alone.state.suspended_by_operator
    assert reader.reads(alone) == ["history_changed"]


def test_a_suspension_of_the_past_cannot_take_the_place_of_an_operators(ledger: InMemoryRegistry):
    """The sponsor could lift their own."""
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="lunch"))
    own = record(ledger).commands
    ledger.give(ledger.claims(AgentResume, "sam", agent_id="bot", reason="back"))
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="looking into it"))
    reader = Reader(ledger)
    reader.reads_all()
    assert reader.reads(next_record(ledger, own)) == ["history_changed"]


def test_a_name_cannot_be_given_anew(ledger: InMemoryRegistry, reader: Reader):
    """With suzy's help: her own registration of the name, its chain in order, and her key under a trusted name."""
    thief = SigningKey.generate(ledger.key("bot", "agent").id)
    claims = ledger.register("suzy", "bot", "suzy", ceiling=WIDE, keys=(ledger.key_record(thief),))
    taken = next_record(ledger, [ledger.embed(claims)])
    assert taken.state.sponsor == "suzy"
    assert reader.reads(taken) == ["history_changed"]
    assert reader.directory.agent_key(thief.id, thief.kid, ledger.clock.ms / 1000) is None


def test_a_command_cannot_be_slipped_into_the_past(ledger: InMemoryRegistry, reader: Reader):
    """suzy was the sponsor for a while; what she signs today is not from then."""
    ledger.give(ledger.transfer("sam", "bot", "suzy"))
    then = ledger.clock.ms
    ledger.clock.ms += 60_000
    ledger.give(ledger.transfer("suzy", "bot", "sam"))
    assert reader.reads(record(ledger)) == []
    late = ledger.claims(AgentSetCeiling, "suzy", agent_id="bot", ceiling=WIDE, iat=then // 1000)
    *past, last = record(ledger).commands
    slipped = next_record(ledger, [*past, ledger.embed(late, then), last])
    assert slipped.state.ceiling == WIDE
    assert reader.reads(slipped) == ["history_changed"]


def test_times_of_commands_cannot_be_changed(ledger: InMemoryRegistry, reader: Reader):
    moved = [c.model_copy(update={"appended_at_ms": c.appended_at_ms + 1}) for c in record(ledger).commands]
    assert reader.reads(next_record(ledger, moved)) == ["history_changed"]


def test_superseded_commands_may_be_left_out(ledger: InMemoryRegistry, reader: Reader):
    """Also where the reader missed some of the revisions: compaction takes them."""
    for scope in (WIDE, (), NARROW):
        ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=scope))
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    assert reader.reads(record(ledger)) == []
    ledger.give(ledger.claims(AgentResume, "sam", agent_id="bot", reason="x"))
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="y"))
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE))
    assert reader.reads(record(ledger)) == []
    assert ceiling(reader) == WIDE


# --- what compaction would keep ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["garbage", "tombstone", "an old record", "another's record"])
def test_overwritten_record_is_listed_as_displaced(ledger: InMemoryRegistry, reader: Reader, what: str):
    old = record(ledger)
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    reader.reads(record(ledger))
    match what:
        case "garbage":
            reader.reads(b"garbage", "bot")
        case "tombstone":
            assert reader.reads(b"", "bot") == ["tombstone"]
        case "an old record":
            reader.reads(old)
        case _:
            ledger.give(ledger.register("sam", "robot", "sam"))
            reader.reads(record(ledger, "agent", "robot"), key="bot")
    assert reader.directory.displaced() == [("agent", "bot")]
    entry = reader.directory.agent("bot")
    assert entry is not None
    assert entry.state.status == "suspended"
    reader.reads(record(ledger))  # written again, as the registry does
    assert reader.directory.displaced() == []


def test_garbage_under_a_key_that_nobody_has_displaces_nothing(reader: Reader):
    reader.reads(b"garbage", "nobody")
    assert reader.directory.displaced() == []


# --- fresh or stale ---------------------------------------------------------------------------------------------------


@pytest.fixture
def guarded(ledger: InMemoryRegistry) -> Reader:
    """A reader that denies without heartbeats."""
    reader = Reader(ledger, GRACE_MS)
    reader.reads_all()
    return reader


def test_without_a_heartbeat_it_denies(ledger: InMemoryRegistry, guarded: Reader):
    assert guarded.directory.stale()
    guarded.beats()
    assert guarded.directory.stale() is None


def test_an_empty_table_denies_too(ledger: InMemoryRegistry):
    """Until the registry says that there is nothing to hold yet."""
    reader = Reader(ledger, GRACE_MS)
    assert reader.directory.stale()
    reader.beats(())
    assert reader.directory.stale() is None
    ledger.clock.ms += GRACE_MS + 1
    assert reader.directory.stale()
    reader.beats()
    assert "never" in (reader.directory.stale() or "")


def test_directory_denies_when_the_grace_is_over(ledger: InMemoryRegistry, guarded: Reader):
    guarded.beats()
    ledger.clock.ms += GRACE_MS
    assert guarded.directory.stale() is None
    ledger.clock.ms += 1
    assert guarded.directory.stale()
    guarded.beats()
    assert guarded.directory.stale() is None


def test_a_clock_that_is_set_back_makes_it_no_younger(ledger: InMemoryRegistry):
    reader = Reader(ledger, 200)
    reader.reads_all()
    reader.beats()
    ledger.clock.ms -= 3_600_000
    until(lambda: reader.directory.stale() is not None)


def test_directory_denies_while_a_record_is_missing(ledger: InMemoryRegistry, guarded: Reader):
    guarded.beats()
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"), passing_ms=GRACE_MS + 1)
    guarded.beats()
    assert AGENT.name("ringfence") in (guarded.directory.stale() or "")
    guarded.reads(record(ledger))  # late, but it came: what the last heartbeat said is so
    assert guarded.directory.stale() is None


def test_directory_denies_while_a_topic_is_missing(ledger: InMemoryRegistry, guarded: Reader):
    guarded.beats()
    ledger.give(ledger.target_set("olga", "staging"), passing_ms=GRACE_MS + 1)
    guarded.beats()
    assert guarded.directory.stale()


def test_the_first_record_of_a_topic_need_not_wait_for_its_heartbeat(
    ledger: InMemoryRegistry, guarded: Reader
):
    """Like every later one: it is known before the registry confirms it, and must be confirmed within the grace."""
    guarded.beats()
    ledger.give(ledger.target_set("olga", "staging"), passing_ms=GRACE_MS)
    guarded.reads(record(ledger, "target", "staging"))
    assert guarded.directory.stale() is None
    ledger.clock.ms += 1
    assert guarded.directory.stale()
    guarded.beats()
    assert guarded.directory.stale() is None


def test_directory_denies_with_records_that_the_registry_lacks(ledger: InMemoryRegistry, guarded: Reader):
    guarded.beats()
    ledger.clock.ms += GRACE_MS + 1
    guarded.beats(tuple(d for d in ledger.directory.digests() if d.topic != USER.name("ringfence")))
    assert USER.name("ringfence") in (guarded.directory.stale() or "")


def test_a_heartbeat_may_be_older_than_the_table(ledger: InMemoryRegistry, guarded: Reader):
    """It was signed before the record that the reader has already."""
    before = ledger.directory.digests()
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"), passing_ms=GRACE_MS + 1)
    guarded.reads(record(ledger))
    guarded.beats(before)
    assert guarded.directory.stale() is None


def test_a_heartbeat_that_is_sent_again_makes_nothing_young(ledger: InMemoryRegistry, guarded: Reader):
    beat = guarded.beats()
    ledger.clock.ms += GRACE_MS + 1
    guarded.hears(beat)
    assert guarded.directory.stale()
    fresh = Reader(ledger, GRACE_MS)  # it started just now, and has seen no other
    fresh.reads_all()
    ledger.clock.ms += 120_000
    fresh.hears(beat)
    assert fresh.directory.stale()


def test_only_the_registry_confirms_tables(ledger: InMemoryRegistry, guarded: Reader):
    guarded.beats(key=ledger.key("olga"))
    guarded.beats(key=SigningKey.generate(ledger.registry.id))
    assert guarded.directory.stale()


def test_directory_names_tables_that_do_not_match_the_heartbeat(ledger: InMemoryRegistry, guarded: Reader):
    assert guarded.directory.unmatched() == []
    guarded.beats()
    assert guarded.directory.unmatched() == []
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    guarded.beats()
    assert [found.split("/")[0] for found in guarded.directory.unmatched()] == [AGENT.name("ringfence")]


@settings(max_examples=40)
@given(seed=st.integers(0, 2**32), steps=st.integers(1, 12))
def test_digests_do_not_depend_on_the_order_or_on_repeats(seed: int, steps: int):
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.register("sam", "bot", "sam"))
    shuffle = random.Random(seed)
    records = [entry.record for kind in KINDS for entry in ledger.directory.entries(kind)]
    for step in range(steps):
        claims = (
            ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(permission(f"env/{step}"),))
            if shuffle.random() < 0.5
            else ledger.user_set("olga", "uma", name=f"Uma {step}")
        )
        change = ledger.give(claims)
        assert change is not None
        records.append(ledger.record(change.state, change.commands, change.revision))
    shuffle.shuffle(records)
    reader = Reader(ledger)
    for one in [*records, *records[:3]]:
        reader.reads(one)
    assert reader.directory.digests() == ledger.directory.digests()
