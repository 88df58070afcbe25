"""A registry that lies leaves out, swaps, repeats or misdates commands, and no reader believes it."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode
from ringfence.messages.registry import (
    AgentResume,
    AgentSetCeiling,
    AgentSuspend,
    AnyRecord,
    UserDisable,
)
from ringfence.model.records.command_chain import ChainError, Chains
from tests.support.forged_records import broken, forged, the
from tests.support.in_memory_registry import START_MS, InMemoryRegistry, permission

WIDE, NARROW = (permission("env/**"),), (permission("env/a"),)


@pytest.fixture
def ledger() -> InMemoryRegistry:
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.register("sam", "bot", "sam", ceiling=NARROW))
    return ledger


# --- time -------------------------------------------------------------------------------------------------------------


def test_registry_cannot_use_an_expired_command(ledger: InMemoryRegistry):
    bot = the(ledger, "agent", "bot")
    claims = ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE)
    late = ledger.embed(claims, claims.exp * 1000)
    assert "after its exp" in broken(ledger, forged(ledger, bot, (*bot.commands, late), ceiling=WIDE))


def test_registry_cannot_use_a_command_of_a_former_operator(ledger: InMemoryRegistry):
    uma = the(ledger, "user", "uma")
    ledger.give(ledger.user_set("otto", "olga", []))
    command = ledger.embed(ledger.user_set("olga", "uma", ["operator"]))
    assert "only an operator" in broken(
        ledger, forged(ledger, uma, (*uma.commands, command), roles=("operator",))
    )


@pytest.mark.parametrize("how", ["disabled", "key ended", "key not begun", "key over"])
def test_registry_cannot_use_a_key_that_does_not_count_then(ledger: InMemoryRegistry, how: str):
    key, now_s = ledger.key("olga"), ledger.clock.ms // 1000
    match how:
        case "disabled":
            ledger.give(ledger.claims(UserDisable, "otto", user_id="olga", reason="x"))
        case "key ended":
            fresh = SigningKey.generate(key.id)
            ledger.give(ledger.user_set("otto", "olga", ["operator"], keys=(ledger.key_record(fresh),)))
        case "key not begun":
            later = (key.record(now_s + 10_000, not_before=now_s + 5_000),)
            ledger.give(ledger.user_set("otto", "olga", ["operator"], keys=later))
        case _:
            ledger.give(ledger.user_set("otto", "olga", ["operator"], keys=(key.record(now_s + 1),)))
            ledger.clock.ms += 5000
    uma = the(ledger, "user", "uma")
    command = ledger.embed(ledger.user_set("olga", "uma", ["operator"]))
    assert "no valid key" in broken(
        ledger, forged(ledger, uma, (*uma.commands, command), roles=("operator",))
    )


def test_commands_signed_before_a_disablement_stay_valid(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(UserDisable, "otto", user_id="olga", reason="left"))
    chains = ledger.chains()
    for id in ("sam", "suzy", "uma"):
        chains.verify(the(ledger, "user", id))  # olga made them
    chains.verify(the(ledger, "agent", "bot"))


def test_a_key_that_ended_and_was_given_again_counts_only_while_it_was_there(ledger: InMemoryRegistry):
    first, second = ledger.key("olga"), SigningKey.generate(ledger.key("olga").id)
    moments = []
    for keys in ((second,), (first, second), (second,)):
        moments.append(ledger.clock.ms)
        records = tuple(map(ledger.key_record, keys))
        ledger.give(ledger.user_set("otto", "olga", ["operator"], keys=records))
    chains = ledger.chains()
    before, ended, again, ended_again = (
        chains.user_key(first.id, first.kid, at) for at in (moments[0], *(m + 1 for m in moments))
    )
    assert (before is not None, ended, again is not None, ended_again) == (True, None, True, None)


def test_commands_of_one_millisecond_do_not_see_each_other(ledger: InMemoryRegistry):
    """eve is made an operator and gives a command in the same millisecond: she was none just before."""
    at = ledger.clock.ms
    ledger.give(ledger.user_set("olga", "eve", ["operator"]))
    uma = the(ledger, "user", "uma")
    command = ledger.user_set("eve", "uma", ["sponsor"])
    same = forged(ledger, uma, (*uma.commands, ledger.embed(command, at)), roles=("sponsor",))
    assert "no valid key" in broken(ledger, same)
    after = forged(ledger, uma, (*uma.commands, ledger.embed(command, at + 1)), roles=("sponsor",))
    ledger.chains().verify(after)


def test_ones_own_record_is_folded_to_the_very_command_before(ledger: InMemoryRegistry):
    """olga loses her role and, in the same millisecond, gives a command about herself: she has no role for it."""
    at = ledger.clock.ms
    ledger.give(ledger.user_set("otto", "olga", []))
    olga = the(ledger, "user", "olga")
    own = ledger.embed(ledger.user_set("olga", "olga", ["operator"]), at)
    assert "only an operator" in broken(
        ledger, forged(ledger, olga, (*olga.commands, own), roles=("operator",))
    )


def test_a_key_that_was_replaced_in_the_very_moment_signs_nothing_about_its_owner(ledger: InMemoryRegistry):
    """In their own record, a user's keys are those after the very command before."""
    at, old = ledger.clock.ms, ledger.key("olga")
    fresh = ledger.key_record(SigningKey.generate(old.id))
    ledger.give(ledger.user_set("otto", "olga", ["operator"], keys=(fresh,)))
    olga = the(ledger, "user", "olga")
    own = ledger.embed(ledger.user_set("olga", "olga", ["operator"]), at, old)
    assert "no valid key" in broken(ledger, forged(ledger, olga, (*olga.commands, own)))


def test_disabled_user_has_no_role_from_then_on(ledger: InMemoryRegistry):
    before_ms = ledger.clock.ms
    ledger.give(ledger.claims(UserDisable, "otto", user_id="sam", reason="left"))
    chains = ledger.chains()
    assert chains.roles_at("sam", before_ms) == {"sponsor"}
    assert chains.roles_at("sam", ledger.clock.ms) == frozenset()
    assert chains.roles_at("nobody", ledger.clock.ms) == frozenset()


# --- dropping, swapping, repeating ------------------------------------------------------------------------------------


def test_registry_cannot_change_the_order_of_signing(ledger: InMemoryRegistry):
    """The wider ceiling was signed first, the narrower after it. Both still live; swapping them would raise it."""
    wide = ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE)
    ledger.clock.ms += 1000
    narrow = ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=())
    bot = the(ledger, "agent", "bot")
    now = ledger.clock.ms
    swapped = (*bot.commands, ledger.embed(narrow, now), ledger.embed(wide, now + 1))
    assert "signed before a later change" in broken(ledger, forged(ledger, bot, swapped, ceiling=WIDE))


def test_registry_cannot_use_an_earlier_resume_for_a_later_suspension(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="x"))
    resume = ledger.claims(AgentResume, "olga", agent_id="bot", reason="fine")
    ledger.give(resume)
    ledger.give(ledger.claims(AgentSuspend, "olga", agent_id="bot", reason="not fine"))
    bot = the(ledger, "agent", "bot")
    again = (*bot.commands, ledger.embed(resume))
    assert "signed before" in broken(
        ledger, forged(ledger, bot, again, status="active", suspended_by_operator=False)
    )


def test_registry_cannot_use_a_command_twice(ledger: InMemoryRegistry):
    """Within one second, the time of signing cannot tell; the command itself does."""
    bot = the(ledger, "agent", "bot")
    now = ledger.clock.ms
    resume = ledger.claims(AgentResume, "sam", agent_id="bot", reason="x")
    suspends = [ledger.claims(AgentSuspend, "sam", agent_id="bot", reason=reason) for reason in "ab"]
    commands = [suspends[0], resume, suspends[1], resume]
    embedded = [ledger.embed(claims, now + step) for step, claims in enumerate(commands)]
    record = forged(ledger, bot, (*bot.commands, *embedded), status="active")
    assert "embedded twice" in broken(ledger, record)


def test_registry_cannot_order_commands_against_their_times(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE))
    ledger.give(ledger.transfer("sam", "bot", "suzy"))
    bot, uma = the(ledger, "agent", "bot"), the(ledger, "user", "uma")
    assert "out of order" in broken(ledger, forged(ledger, bot, (*bot.commands[::2], bot.commands[1])))
    ledger.give(ledger.claims(UserDisable, "otto", user_id="uma", reason="x"))
    disabled = the(ledger, "user", "uma")
    backwards = forged(ledger, disabled, disabled.commands[::-1], status="active")
    assert uma.revision == 1
    assert "out of order" in broken(ledger, backwards)
    assert "out of order" in broken(ledger, backwards, uma=backwards)


def test_a_record_without_its_first_command_is_none(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE))
    bot = the(ledger, "agent", "bot")
    assert "there is no agent" in broken(ledger, forged(ledger, bot, bot.commands[1:]))


def test_a_changed_command_is_found_out(ledger: InMemoryRegistry):
    bot = the(ledger, "agent", "bot")
    head, body, tail = bot.commands[0].jws.split(".")
    wide = b64encode(b64decode(body).replace(b"env/a", b"env/*"))
    for jws in (f"{head}.{wide}.{tail}", f"{head}.{body}.{tail[:-8]}AAAAAAAA", "x.y.z"):
        command = bot.commands[0].model_copy(update={"jws": jws})
        assert "does not hold" in broken(ledger, forged(ledger, bot, (command,)))


def test_a_user_whose_history_was_rewritten_is_folded_anew(ledger: InMemoryRegistry):
    """What was believed of a record is not believed of the next one under the same name."""
    users: dict[str, Any] = {"olga": the(ledger, "user", "olga")}
    chains = ledger.chains(users)
    assert "operator" in chains.roles_at("olga", ledger.clock.ms)
    later = tuple(c.model_copy(update={"appended_at_ms": ledger.clock.ms}) for c in users["olga"].commands)
    users["olga"] = forged(ledger, users["olga"], later)
    assert chains.roles_at("olga", ledger.clock.ms) == frozenset()
    too_late = tuple(c.model_copy(update={"appended_at_ms": START_MS + 10**8}) for c in later)
    users["olga"] = forged(ledger, users["olga"], too_late)
    with pytest.raises(ChainError, match="after its exp"):
        chains.roles_at("olga", START_MS + 10**9)


def test_forgotten_fold_is_computed_again(ledger: InMemoryRegistry):
    """Until then a fold stands, whatever becomes of what it rests on; another trust bundle makes readers forget."""
    users: dict[str, Any] = {}

    def find(user_id: str) -> Any:
        return users.get(user_id) or ledger.directory.unverified("user", user_id)

    chains, now_ms = Chains(ledger.trust, find, ledger.directory.unverified), ledger.clock.ms
    sam, bot = chains.user_at("sam", now_ms), chains.agent_at("bot", now_ms)
    assert sam
    assert bot
    olga = the(ledger, "user", "olga")
    users["olga"] = forged(ledger, olga, (ledger.embed(ledger.user_set("eve", "olga", ["operator"])),))
    assert (chains.user_at("sam", now_ms), chains.agent_at("bot", now_ms)) == (sam, bot)
    chains.forget()
    with pytest.raises(ChainError):
        chains.agent_at("bot", now_ms)
    with pytest.raises(ChainError):
        chains.user_at("sam", now_ms)


def test_folded_user_is_cached(ledger: InMemoryRegistry):
    """Else whoever reads would verify all commands about an operator for each that they give."""
    users: dict[str, Any] = {"sam": the(ledger, "user", "sam")}
    chains, then_ms = ledger.chains(users), ledger.clock.ms
    first = chains.user_at("sam", then_ms)
    assert first is not None
    assert chains.user_at("sam", then_ms) is first
    ledger.give(ledger.claims(UserDisable, "olga", user_id="sam", reason="left"))
    users["sam"] = the(ledger, "user", "sam")
    assert chains.roles_at("sam", ledger.clock.ms) == frozenset()
    assert chains.user_at("sam", then_ms) is first


def over_agents(ledger: InMemoryRegistry, records: dict[str, AnyRecord]) -> Chains:
    """Chains over the ledger's users, and over these records of agents (also later on, in the mapping)."""
    return Chains(
        ledger.trust,
        lambda user_id: ledger.directory.unverified("user", user_id),  # type: ignore[arg-type,return-value]
        lambda kind, name: records.get(name) if kind == "agent" else None,
    )


def test_folded_agent_is_cached(ledger: InMemoryRegistry):
    """Else whoever reads would verify all that an agent ever was for each command that it gives."""
    records = {"bot": the(ledger, "agent", "bot")}
    chains, then_ms = over_agents(ledger, records), ledger.clock.ms
    first = chains.agent_at("bot", then_ms)
    assert first is not None
    assert chains.agent_at("bot", then_ms) is first
    ledger.give(ledger.claims(AgentSuspend, "sam", agent_id="bot", reason="x"))
    records["bot"] = the(ledger, "agent", "bot")
    now = chains.agent_at("bot", ledger.clock.ms)
    assert now is not None
    assert now.status == "suspended"
    assert chains.agent_at("bot", then_ms) is first


def test_an_agent_whose_history_was_rewritten_is_folded_anew(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE))
    records = {"bot": the(ledger, "agent", "bot")}
    chains, at_ms = over_agents(ledger, records), ledger.clock.ms
    wide = chains.agent_at("bot", at_ms)
    assert wide is not None
    assert wide.ceiling == WIDE
    command = ledger.embed(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=()), at_ms - 1)
    records["bot"] = forged(ledger, records["bot"], (records["bot"].commands[0], command))
    narrow = chains.agent_at("bot", at_ms)
    assert narrow is not None
    assert narrow.ceiling == ()
    spoilt = records["bot"].commands[0].model_copy(update={"jws": "x.y.z"})
    records["bot"] = forged(ledger, records["bot"], (spoilt, command))
    with pytest.raises(ChainError, match="does not hold"):
        chains.agent_at("bot", at_ms)


def test_an_agents_commands_are_not_ordered_against_their_times(ledger: InMemoryRegistry):
    """Out of order, a moment would not tell what the agent was then."""
    for who in ("sam", "olga"):
        ledger.give(ledger.claims(AgentSuspend, who, agent_id="bot", reason="x"))
    bot = the(ledger, "agent", "bot")
    backwards = forged(ledger, bot, (bot.commands[0], *bot.commands[:0:-1]))
    assert len(backwards.commands) == 3
    with pytest.raises(ChainError, match="out of order"):
        over_agents(ledger, {"bot": backwards}).agent_at("bot", ledger.clock.ms)
