"""What a registry that lies, alone or with a former operator, cannot make a reader believe. Each test is one "cannot".

The ledger plays the honest registry; the tests then sign records by hand with its key.
"""

from __future__ import annotations

import random
import uuid
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import (
    AgentDecommission,
    AgentResume,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    AnyState,
    EmbeddedCommand,
    TargetRemove,
    TaskEnd,
    UserDisable,
)
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle import CommandRefusedError, still_needed
from ringfence.model.records.command_chain import unverified_command
from tests.support.forged_records import broken, forged, the
from tests.support.in_memory_registry import START_MS, InMemoryRegistry, permission

WIDE, NARROW = (permission("env/**"),), (permission("env/a"),)


KINDS: tuple[SubjectKind, ...] = ("user", "agent", "target", "task")


@pytest.fixture
def ledger() -> InMemoryRegistry:
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.register("sam", "bot", "sam", ceiling=NARROW))
    return ledger


def test_records_of_an_honest_registry_verify(ledger: InMemoryRegistry):
    ledger.give(ledger.target_set("olga", "staging"))
    ledger.give(ledger.assign("uma", "bot"))
    chains = ledger.chains()
    records = [entry.record for kind in KINDS for entry in ledger.directory.entries(kind)]
    assert len(records) == 9
    for record in records:
        chains.verify(record)


# --- a registry that makes things up ----------------------------------------------------------------------------------


def test_registry_cannot_make_a_sponsor(ledger: InMemoryRegistry):
    uma = the(ledger, "user", "uma")
    assert "not what its commands say" in broken(
        ledger, forged(ledger, uma, uma.commands, roles=("sponsor",))
    )


def test_registry_cannot_raise_a_ceiling(ledger: InMemoryRegistry):
    bot = the(ledger, "agent", "bot")
    assert "not what its commands say" in broken(ledger, forged(ledger, bot, bot.commands, ceiling=WIDE))


def test_registry_cannot_resume_an_agent(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="x"))
    bot = the(ledger, "agent", "bot")
    assert broken(ledger, forged(ledger, bot, bot.commands, status="active", suspended_by_operator=False))


def test_registry_cannot_sign_commands_itself(ledger: InMemoryRegistry):
    uma = the(ledger, "user", "uma")
    for iss in (ledger.registry.id, ledger.key("olga").id, ledger.root.id):
        claims = ledger.user_set("olga", "uma", ["operator"], iss=iss)
        command = ledger.embed(claims, key=ledger.registry)
        assert "no valid key" in broken(
            ledger, forged(ledger, uma, (*uma.commands, command), roles=("operator",))
        )


def test_registry_cannot_use_a_command_of_an_unentitled_user(ledger: InMemoryRegistry):
    uma, bot = the(ledger, "user", "uma"), the(ledger, "agent", "bot")
    for who in ("sam", "adam", "uma"):
        command = ledger.embed(ledger.user_set(who, "uma", ["operator"]))
        assert "only an operator" in broken(
            ledger, forged(ledger, uma, (*uma.commands, command), roles=("operator",))
        )
    command = ledger.embed(ledger.claims(AgentSetCeiling, "suzy", agent_id="bot", ceiling=WIDE))
    assert "only the sponsor" in broken(ledger, forged(ledger, bot, (*bot.commands, command), ceiling=WIDE))


def test_registry_cannot_let_an_operator_widen_themselves(ledger: InMemoryRegistry):
    olga = the(ledger, "user", "olga")
    claims = ledger.user_set("olga", "olga", ["operator", "sponsor"])
    record = forged(ledger, olga, (*olga.commands, ledger.embed(claims)), roles=("operator", "sponsor"))
    assert "nobody gives roles to themselves" in broken(ledger, record)
    assert "nobody gives roles to themselves" in broken(ledger, record, olga=record)


def test_registry_cannot_begin_a_user_with_their_own_command(ledger: InMemoryRegistry):
    """eve's record says that eve, an operator by that record, made her one."""
    command = ledger.embed(ledger.user_set("eve", "eve", ["operator"]))
    state = the(ledger, "user", "olga").state.model_copy(
        update={"user_id": "eve", "name": "Eve", "keys": (ledger.key_record(ledger.key("eve")),)}
    )
    record = ledger.record(state, (command,))
    assert "no valid key" in broken(ledger, record)
    assert "no valid key" in broken(ledger, record, eve=record)


def test_two_who_vouch_for_each_other_are_nobody(ledger: InMemoryRegistry):
    """eve was made by mallory, mallory by eve; each command comes just after the other's. It ends, with a no."""
    records = {}
    for turn, (who, by) in enumerate([("eve", "mallory"), ("mallory", "eve")]):
        commands = tuple(
            ledger.embed(ledger.user_set(by, who, ["operator"]), START_MS + 10_000 * step + turn)
            for step in range(3)
        )
        state = the(ledger, "user", "olga").state.model_copy(
            update={"user_id": who, "name": who.title(), "keys": (ledger.key_record(ledger.key(who)),)}
        )
        records[who] = ledger.record(state, commands)
    for record in records.values():
        assert "no valid key" in broken(ledger, record, **records)


def test_operators_who_set_each_other_in_turns_are_believed(ledger: InMemoryRegistry):
    """Two operators set one another 150 times: it ends, and no length of it exhausts the stack."""
    for step in range(150):
        by, who = ("olga", "otto") if step % 2 else ("otto", "olga")
        roles = ["operator", "auditor"] if step % 4 < 2 else ["operator"]
        ledger.give(ledger.user_set(by, who, roles))
    chains = ledger.chains()
    chains.verify(the(ledger, "user", "otto"))
    chains.verify(the(ledger, "user", "olga"))


def test_a_long_line_of_operators_is_believed(ledger: InMemoryRegistry):
    """Each was made by the one before: 250 steps back to the root, twice as many as the stack has room for."""
    by = "olga"
    for step in range(250):
        ledger.give(ledger.user_set(by, f"op{step}", ["operator"]))
        by = f"op{step}"
    ledger.chains().verify(the(ledger, "user", by))


def test_registry_cannot_exhaust_a_reader(ledger: InMemoryRegistry):
    """With an operator's help: users that are none, each of which can be judged only after the next one."""
    users: dict[str, Any] = {}
    state = the(ledger, "user", "uma").state
    for step in range(400):
        claims = ledger.register("olga", f"a{step}", f"u{step + 1}")
        command = ledger.embed(claims, ledger.clock.ms + 1000 - step)
        users[f"u{step}"] = ledger.record(state.model_copy(update={"user_id": f"u{step}"}), (command,))
    assert "the record of user u0 embeds a command that is about no user" in broken(
        ledger, users["u0"], **users
    )


# --- another subject, another shape -----------------------------------------------------------------------------------


def test_registry_cannot_use_a_command_about_another_agent(ledger: InMemoryRegistry):
    """sam resumes one of two suspended agents; that resumes the other as little as it is meant to."""
    ledger.give(ledger.register("sam", "robot", "sam", ceiling=WIDE))
    for agent in ("bot", "robot"):
        ledger.give(ledger.claims(AgentSuspend, "sam", agent_id=agent, reason="x"))
    resume = ledger.embed(ledger.claims(AgentResume, "sam", agent_id="robot", reason="fine"))
    bot = the(ledger, "agent", "bot")
    assert "another subject" in broken(ledger, forged(ledger, bot, (*bot.commands, resume), status="active"))
    ceiling = ledger.embed(ledger.claims(AgentSetCeiling, "sam", agent_id="robot", ceiling=WIDE))
    assert "another subject" in broken(ledger, forged(ledger, bot, (*bot.commands, ceiling), ceiling=WIDE))


def test_registry_cannot_put_another_users_command_into_a_record(ledger: InMemoryRegistry):
    """otto's record, continued by a command about olga that otto may give, and back again."""
    olga, otto = the(ledger, "user", "olga"), the(ledger, "user", "otto")
    mixed = (*otto.commands, ledger.embed(ledger.user_set("otto", "olga", ["operator", "sponsor"])))
    record = forged(ledger, olga, mixed, roles=("operator", "sponsor"))
    assert "another subject" in broken(ledger, record)
    assert "something else" in broken(ledger, record, olga=record)


def test_registry_cannot_use_a_task_end_for_another_task(ledger: InMemoryRegistry):
    first, second = (ledger.give(ledger.assign("uma", "bot")) for _ in range(2))
    assert first
    assert second
    end = ledger.claims(TaskEnd, "uma", task_id=first.state.task_id, reason="x")  # type: ignore[union-attr]
    task = the(ledger, "task", second.state.task_id)  # type: ignore[union-attr]
    assert "another subject" in broken(
        ledger, forged(ledger, task, (*task.commands, ledger.embed(end)), status="ended")
    )


def test_registry_cannot_publish_one_subjects_record_as_anothers(ledger: InMemoryRegistry):
    bot = the(ledger, "agent", "bot")
    record = ledger.record(bot.state, bot.commands, 1, sub="spiffe://test.example/agent/robot")
    assert "about another subject" in broken(ledger, record)


@pytest.mark.parametrize("domain", ["other.example", "test.example.evil"])
def test_a_command_of_another_trust_domain_is_none(ledger: InMemoryRegistry, domain: str):
    uma = the(ledger, "user", "uma")
    foreign = SigningKey.generate(f"spiffe://{domain}/user/olga")
    for fields in ({"iss": foreign.id}, {"aud": domain}):
        claims = ledger.user_set("olga", "uma", ["operator"], **fields)
        command = ledger.embed(claims, key=ledger.key("olga"))
        assert broken(ledger, forged(ledger, uma, (*uma.commands, command), roles=("operator",)))


@pytest.mark.parametrize(
    "path", ["agent/olga", "service/olga", "user/olga/x", "user/", "user/Olga", "task/olga"]
)
def test_signer_path_that_only_resembles_a_user_is_rejected(ledger: InMemoryRegistry, path: str):
    claims = ledger.user_set("olga", "uma", ["operator"], iss=f"spiffe://test.example/{path}")
    with pytest.raises(InvalidMessageError, match="no valid key"):
        ledger.chains().authorise(parse(sign(claims, ledger.key("olga"))), ledger.clock.ms)


@pytest.mark.parametrize("id", ["оlga", "olga\n", "olga ", "ｏlga", "", "../olga", "olga/x", "OLGA"])
def test_ids_have_one_spelling(ledger: InMemoryRegistry, id: str):
    """Letters of other alphabets, white space and paths are no part of an id, in no field that names somebody."""
    claims = ledger.user_set("olga", "uma").model_copy(update={"user_id": id})
    with pytest.raises(InvalidMessageError):
        ledger.chains().authorise(parse(sign(claims, ledger.key("olga"))), ledger.clock.ms)
    spiffe = ledger.user_set("olga", "uma").model_copy(update={"iss": f"spiffe://test.example/user/{id}"})
    with pytest.raises(InvalidMessageError):
        ledger.chains().authorise(parse(sign(spiffe, ledger.key("olga"))), ledger.clock.ms)


def test_a_consent_or_a_record_is_no_command(ledger: InMemoryRegistry):
    for compact in (
        ledger.consent("uma", ledger.terms("bot")),
        sign(the(ledger, "user", "uma"), ledger.registry),
    ):
        with pytest.raises(InvalidMessageError, match="names no command"):
            ledger.chains().authorise(parse(compact), ledger.clock.ms)


def test_agent_signature_is_rejected_by_a_reader_without_agent_records(ledger: InMemoryRegistry):
    claims = ledger.claims(
        TaskEnd, "bot", iss=ledger.key("bot", "agent").id, task_id=str(uuid.UUID(int=0)), reason="x"
    )
    with pytest.raises(InvalidMessageError, match="no valid key"):
        ledger.chains().authorise(parse(ledger.signed(claims)), ledger.clock.ms)


def test_two_people_may_use_the_same_jti(ledger: InMemoryRegistry):
    """A command's id is of its signer as well: else one could take the id of another's, and stand for it."""
    ids = set()
    for who in ("olga", "otto"):
        claims = ledger.user_set(who, "uma", jti="the same")
        given = ledger.chains().authorise(parse(ledger.embed(claims).jws), ledger.clock.ms)
        assert given.command_id == message_id(claims.iss, "the same")
        ids.add(given.command_id)
    assert len(ids) == 2


def test_embedded_message_of_an_unknown_type_is_no_command(ledger: InMemoryRegistry):
    consent = EmbeddedCommand(jws=ledger.consent("uma", ledger.terms("bot")), appended_at_ms=ledger.clock.ms)
    with pytest.raises(InvalidMessageError) as unread:
        unverified_command(consent)
    with pytest.raises(InvalidMessageError) as unsigned:
        ledger.chains().authorise(parse(consent.jws), ledger.clock.ms)
    assert (unread.value.code, unsigned.value.code) == ("typ_unexpected", "typ_unexpected")


def test_the_root_may_what_an_operator_may(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(AgentSuspend, "root", agent_id="bot", reason="x"), ledger.root)
    bot = the(ledger, "agent", "bot")
    ledger.chains().verify(bot)
    assert isinstance(bot.state, AgentState)
    assert (bot.state.status, bot.state.suspended_by_operator) == ("suspended", True)
    assert broken(ledger, forged(ledger, bot, bot.commands, suspended_by_operator=False))


# --- tasks ------------------------------------------------------------------------------------------------------------


def test_registry_cannot_assign_a_task_on_behalf_of_who_did_not_sign(ledger: InMemoryRegistry):
    claims = ledger.assign("sam", "bot", on_behalf_of="uma")
    given = ledger.give(ledger.assign("sam", "bot"))
    assert given
    state = given.state.model_copy(update={"on_behalf_of": "uma"})
    assert broken(ledger, ledger.record(state, given.commands))
    command = ledger.embed(claims)
    id = ledger.chains().authorise(parse(command.jws), command.appended_at_ms).command_id
    assert "did neither" in broken(
        ledger, ledger.record(state.model_copy(update={"task_id": id}), (command,))
    )


@pytest.mark.parametrize(
    ("lie", "why"),
    [
        ("forged", "signature"),
        ("by another", "did neither"),
        ("to other terms", "the consent is to other terms"),
        ("expired", "after its exp"),
        ("of another domain", "aud is 'other.example'"),
    ],
)
def test_registry_cannot_make_up_a_consent_to_a_task(ledger: InMemoryRegistry, lie: str, why: str):
    terms = ledger.terms("bot")
    consent = ledger.consent("uma", terms)
    given = ledger.give(ledger.assign("sam", "bot", terms=terms, on_behalf_of="uma", consent=consent))
    assert given
    ledger.chains().verify(ledger.record(given.state, given.commands))
    match lie:
        case "forged":
            head, body, _ = consent.split(".")
            consent = f"{head}.{body}.{ledger.consent('suzy', terms).rpartition('.')[2]}"
        case "by another":
            consent = ledger.consent("suzy", terms)
        case "to other terms":
            consent = ledger.consent("uma", ledger.terms("bot", purpose="another"))
        case "expired":
            now_s = ledger.clock.ms // 1000
            consent = ledger.consent("uma", terms, iat=now_s - 400, exp=now_s - 100)
        case _:
            consent = ledger.consent("uma", terms, aud="other.example")
    command = ledger.embed(ledger.assign("sam", "bot", terms=terms, on_behalf_of="uma", consent=consent))
    id = ledger.chains().authorise(parse(command.jws), command.appended_at_ms).command_id
    state = given.state.model_copy(update={"task_id": id})
    said = broken(ledger, ledger.record(state, (command,)))
    assert "did neither" in said
    assert why in said


def test_registry_cannot_give_a_task_another_id(ledger: InMemoryRegistry):
    given = ledger.give(ledger.assign("uma", "bot"))
    assert given
    other = given.state.model_copy(update={"task_id": "00000000-0000-5000-8000-000000000000"})
    assert broken(ledger, ledger.record(other, given.commands))


# --- whatever happens, every reader can follow ------------------------------------------------------------------------

PEOPLE = ("olga", "otto", "sam", "suzy", "uma")


ROLES = st.sampled_from([(), ("sponsor",), ("operator",), ("operator", "sponsor"), ("auditor",)])


SCOPES = st.sampled_from([(), NARROW, WIDE])


ACTIONS = st.one_of(
    st.tuples(
        st.just("user"), st.sampled_from(PEOPLE), st.sampled_from(PEOPLE), ROLES, SCOPES, st.booleans()
    ),
    st.tuples(st.just("disable"), st.sampled_from(PEOPLE), st.sampled_from(PEOPLE)),
    st.tuples(st.just("register"), st.sampled_from(PEOPLE), st.sampled_from("ab"), st.sampled_from(PEOPLE)),
    st.tuples(st.just("ceiling"), st.sampled_from(PEOPLE), st.sampled_from("ab"), SCOPES),
    st.tuples(st.just("transfer"), st.sampled_from(PEOPLE), st.sampled_from("ab"), st.sampled_from(PEOPLE)),
    st.tuples(st.sampled_from(["suspend", "resume", "end"]), st.sampled_from(PEOPLE), st.sampled_from("ab")),
    st.tuples(
        st.sampled_from(["target", "remove", "assign"]), st.sampled_from(PEOPLE), st.sampled_from("ab")
    ),
)


def act(ledger: InMemoryRegistry, action: tuple[Any, ...]) -> Any:
    match action:
        case ("user", by, who, roles, scope, rotate):
            if rotate:
                ledger.keys[who] = SigningKey.generate(ledger.key(who).id)
            as_of = ledger.clock.ms // 1000
            return ledger.user_set(by, who, roles, entitlements=ledger.entitlements(*scope, as_of=as_of))
        case ("disable", by, who):
            return ledger.claims(UserDisable, by, user_id=who, reason="x")
        case ("register", by, agent, sponsor):
            return ledger.register(by, agent, sponsor)
        case ("ceiling", by, agent, scope):
            return ledger.claims(AgentSetCeiling, by, agent_id=agent, ceiling=scope)
        case ("transfer", by, agent, to):
            return ledger.transfer(by, agent, to)
        case ("suspend", by, agent):
            return ledger.claims(AgentSuspend, by, agent_id=agent, reason="x")
        case ("resume", by, agent):
            return ledger.claims(AgentResume, by, agent_id=agent, reason="x")
        case ("end", by, agent):
            return ledger.claims(AgentDecommission, by, agent_id=agent, reason="x")
        case ("target", by, target):
            return ledger.target_set(by, target, max_ttl_s=1 + ledger.clock.ms % 3600)
        case ("remove", by, target):
            return ledger.claims(TargetRemove, by, target_id=target, reason="x")
        case ("assign", by, agent):
            return ledger.assign(by, agent)
    raise AssertionError(action)


@settings(max_examples=60)
@given(
    actions=st.lists(
        st.tuples(ACTIONS, st.sampled_from([0, 1, 1, 1000]), st.sampled_from([0, 0, -20, 20])),
        min_size=5,
        max_size=30,
    ),
    seed=st.integers(0, 2**32),
)
def test_accepted_records_verify_for_every_reader(actions: list[Any], seed: int):
    """Whatever was accepted, in whatever moments, by whosever clock.

    Each record's chain holds, for a reader that got them in any order, and for one that missed any of the revisions;
    and neither sees anything wrong with what comes next.
    """
    ledger = InMemoryRegistry()
    ledger.organisation()
    published: list[str] = []
    admit = ledger.admit
    ledger.admit = lambda compact, reader=None: (published.append(compact), admit(compact, reader))[1]  # type: ignore[method-assign,func-returns-value]
    for action, passing_ms, skew_s in actions:
        before = dict(ledger.keys)
        claims = act(ledger, action)
        claims = claims.model_copy(update={"iat": claims.iat + skew_s})  # their clock is wrong
        signer = claims.iss.rpartition("/")[2]
        try:
            ledger.give(claims, before.get(signer), passing_ms=passing_ms)
        except (CommandRefusedError, InvalidMessageError):
            ledger.keys = before
    random.seed(seed)
    latest = {(kind, e.record.sub): e.record for kind in KINDS for e in ledger.directory.entries(kind)}
    raw = [(kind, id) for kind in KINDS for id in ledger.directory._slots[kind]]
    assert len(latest) == len(raw)  # none of the registry's own records is broken
    shuffled = list(latest.values())
    random.shuffle(shuffled)
    alarms: list[Any] = []
    reader = ledger.reader(alarms.append)
    for record in shuffled:
        assert admit(sign(record, ledger.registry), reader) is None
    patchy = ledger.reader(alarms.append)
    for compact in published:
        if random.random() < 0.5:
            assert admit(compact, patchy) is None
    for record in shuffled:
        assert admit(sign(record, ledger.registry), patchy) is None
    for one in (reader, patchy):
        states: dict[str, AnyState] = {e.record.sub: e.state for kind in KINDS for e in one.entries(kind)}
        assert states == {sub: record.state for (_, sub), record in latest.items()}
    assert not alarms


def test_records_do_not_grow_with_what_no_longer_matters(ledger: InMemoryRegistry):
    for step in range(30):
        as_of = ledger.clock.ms // 1000
        entitlements = ledger.entitlements(permission(f"env/{step}"), as_of=as_of)
        ledger.give(ledger.user_set("olga", "uma", entitlements=entitlements))
        ledger.give(
            ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=(permission(f"env/{step}"),))
        )
        ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
        ledger.give(ledger.claims(AgentResume, "sam", agent_id="bot", reason="x"))
        ledger.give(ledger.target_set("olga", "staging", max_ttl_s=step + 1))
    counts = {
        record.sub.rpartition("/")[2]: len(record.commands)
        for record in (
            the(ledger, "user", "uma"),
            the(ledger, "agent", "bot"),
            the(ledger, "target", "staging"),
        )
    }
    assert counts == {"uma": 2, "bot": 4, "staging": 1}
    chains = ledger.chains()
    for kind in KINDS:
        for entry in ledger.directory.entries(kind):
            chains.verify(entry.record)
            assert all(unverified_command(c) for c in entry.record.commands)


def test_command_before_a_self_narrowing_is_kept_in_the_record(ledger: InMemoryRegistry):
    """olga may narrow what otto gave her; without his command in the record hers would widen what was before."""
    as_of = ledger.clock.ms // 1000
    for by, scope in (("otto", ()), ("otto", WIDE), ("olga", NARROW)):
        entitlements = ledger.entitlements(*scope, as_of=as_of)
        ledger.give(ledger.user_set(by, "olga", ["operator"], entitlements=entitlements))
    ledger.chains().verify(the(ledger, "user", "olga"))


def test_a_suspension_by_an_operator_is_kept_while_it_lasts(ledger: InMemoryRegistry):
    by_operator = ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="x")
    by_sponsor = ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x")
    assert still_needed([(by_operator, "kept")], by_sponsor) == ["kept"]


def test_a_suspension_gives_way_to_one_of_the_same_person_alone(ledger: InMemoryRegistry):
    """Else a registry could leave out an operator's, and let the sponsor lift their own."""

    def of(model: type[Any], who: str) -> Any:
        return ledger.claims(model, who, agent_id="bot", reason="x")

    olgas, sams = of(AgentSuspend, "olga"), of(AgentSuspend, "sam")
    by_olga, by_sam = of(AgentResume, "olga"), of(AgentResume, "sam")
    histories: list[tuple[list[Any], Any, list[Any]]] = [
        ([olgas, by_olga], olgas, []),
        ([olgas, by_olga], sams, [olgas, by_olga]),
        ([sams, by_sam], olgas, [sams, by_sam]),
        ([olgas, by_olga, sams, by_sam], sams, [olgas, by_olga]),
        ([olgas, by_olga, sams, by_sam], olgas, [sams, by_sam]),
        ([olgas, sams, by_olga], sams, [olgas, by_olga]),
        ([sams, olgas, by_olga], olgas, [sams, by_olga]),
        ([olgas, sams], sams, [olgas, sams]),
    ]
    for before, latest, kept in histories:
        assert still_needed([(command, command) for command in before], latest) == kept


def test_records_of_agents_that_many_suspend_do_not_grow(ledger: InMemoryRegistry):
    for who in ("olga", "sam", "otto") * 10:
        ledger.give(ledger.claims(AgentSuspend, who, agent_id="bot", reason="x"))
        ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
        ledger.give(ledger.claims(AgentResume, "olga", agent_id="bot", reason="x"))
        ledger.chains().verify(the(ledger, "agent", "bot"))
    assert len(the(ledger, "agent", "bot").commands) <= 8
