"""Transfers of agents: nobody is made accountable unasked, but by an operator, and then the record says so."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Claims
from ringfence.messages.registry import (
    AgentActivate,
    AgentSetCeiling,
    AgentState,
    EmbeddedCommand,
    UserDisable,
)
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.model.records.command_chain import ChainError
from tests.support.in_memory_registry import InMemoryRegistry, permission

WIDE = (permission("env/**"),)


@pytest.fixture
def ledger() -> InMemoryRegistry:
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.register("sam", "bot", "sam"))
    return ledger


def refused(ledger: InMemoryRegistry, claims: Claims, **when: Any) -> str:
    """The code with which the registry refuses a command."""
    with pytest.raises(CommandRefusedError) as caught:
        ledger.give(claims, **when)
    return caught.value.code


def bot(ledger: InMemoryRegistry) -> AgentState:
    entry = ledger.directory.agent("bot")
    assert entry is not None
    return entry.state


def commands_of_bot(ledger: InMemoryRegistry) -> list[EmbeddedCommand]:
    entry = ledger.directory.agent("bot")
    assert entry is not None
    return list(entry.record.commands)


def test_a_sponsor_hands_an_agent_over_with_the_consent_of_the_new_one(ledger: InMemoryRegistry):
    transfer = ledger.transfer("sam", "bot", "suzy")
    given = ledger.directory.chains.authorise(parse(ledger.signed(transfer)), ledger.clock.ms)
    assert given.consent_by == "suzy"  # whom audit names
    assert ledger.give(transfer) is not None
    assert (bot(ledger).sponsor, bot(ledger).without_consent) == ("suzy", None)


def test_a_sponsor_dumps_an_agent_on_nobody(ledger: InMemoryRegistry):
    bare = ledger.transfer("sam", "bot", "suzy", consent=None)
    assert refused(ledger, bare) == "consent_missing"
    assert refused(ledger, ledger.transfer("sam", "bot", "suzy", without_consent=True)) == "not_operator"
    assert bot(ledger).sponsor == "sam"


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"from_sponsor": "otto"}, "consent_other_terms"),
        ({"agent_id": "another"}, "consent_invalid"),
        ({"revision": 2}, "consent_stale"),
        ({"exp": 1}, "consent_invalid"),
    ],
)
def test_a_consent_is_to_one_transfer_of_one_agent_as_it_is(
    ledger: InMemoryRegistry, fields: dict[str, Any], code: str
):
    if "exp" in fields:
        fields = {"iat": ledger.clock.ms // 1000 - 400, "exp": ledger.clock.ms // 1000 - 100}
    consent = ledger.transfer_consent("suzy", "bot", **fields)
    assert refused(ledger, ledger.transfer("sam", "bot", "suzy", consent=consent)) == code


def test_only_the_new_sponsor_consents(ledger: InMemoryRegistry):
    forged = ledger.transfer_consent("suzy", "bot", SigningKey.generate(ledger.key("suzy").id))
    for consent in (ledger.transfer_consent("sam", "bot"), ledger.transfer_consent("uma", "bot"), forged):
        assert refused(ledger, ledger.transfer("sam", "bot", "suzy", consent=consent)) == "consent_invalid"


def test_a_consent_does_not_outlive_a_change_of_the_agent(ledger: InMemoryRegistry):
    """What suzy saw is what she takes over: its sponsor does not widen it behind her back."""
    consent = ledger.transfer_consent("suzy", "bot")
    ledger.give(ledger.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=WIDE))
    assert refused(ledger, ledger.transfer("sam", "bot", "suzy", consent=consent)) == "consent_stale"


def test_a_consent_counts_once(ledger: InMemoryRegistry):
    consent = ledger.transfer_consent("suzy", "bot")
    ledger.give(ledger.transfer("sam", "bot", "suzy", consent=consent))
    ledger.give(ledger.transfer("suzy", "bot", "sam"))
    assert refused(ledger, ledger.transfer("sam", "bot", "suzy", consent=consent)) == "consent_stale"


def test_an_operator_transfers_without_consent_and_the_record_says_so(ledger: InMemoryRegistry):
    assert refused(ledger, ledger.transfer("olga", "bot", "suzy", consent=None)) == "consent_missing"
    ledger.give(ledger.transfer("olga", "bot", "suzy", without_consent=True))
    assert (bot(ledger).sponsor, bot(ledger).without_consent) == ("suzy", True)
    # suzy takes it on herself: her signature under the transfer is her consent.
    ledger.give(ledger.transfer("suzy", "bot", "suzy", consent=None))
    assert (bot(ledger).sponsor, bot(ledger).without_consent) == ("suzy", None)


def test_an_operator_transfers_an_orphan(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(UserDisable, "olga", user_id="sam", reason="left"))
    ledger.give(ledger.transfer("olga", "bot", "suzy", without_consent=True))
    assert (bot(ledger).sponsor, bot(ledger).without_consent) == ("suzy", True)


def test_activation_by_the_new_sponsor_is_consent(ledger: InMemoryRegistry):
    ledger.give(ledger.register("olga", "crab", "sam", inactive=True))
    ledger.give(ledger.transfer("olga", "crab", "suzy", without_consent=True))
    ledger.give(ledger.claims(AgentActivate, "suzy", agent_id="crab"))
    entry = ledger.directory.agent("crab")
    assert entry is not None
    assert entry.state.without_consent is None


@pytest.mark.parametrize(
    "lie", ["none", "forged", "by another", "from another", "twice", "without an operator"]
)
def test_a_lying_registry_makes_up_no_consent(ledger: InMemoryRegistry, lie: str):
    """Readers verify each consent that a record has, and that it was used once."""
    commands = commands_of_bot(ledger)
    consent: str | None = ledger.transfer_consent("suzy", "bot")
    fields: dict[str, Any] = {}
    match lie:
        case "none":
            consent = None
        case "forged":
            consent = ledger.transfer_consent("suzy", "bot", SigningKey.generate(ledger.key("suzy").id))
        case "by another":
            consent = ledger.transfer_consent("uma", "bot")
        case "from another":
            consent = ledger.transfer_consent("suzy", "bot", from_sponsor="otto")
        case "twice":
            commands.append(ledger.embed(ledger.transfer("sam", "bot", "suzy", consent=consent)))
            ledger.clock.ms += 1000
            commands.append(ledger.embed(ledger.transfer("olga", "bot", "sam", without_consent=True)))
            ledger.clock.ms += 1000
        case "without an operator":
            consent, fields = None, {"without_consent": True}
    commands.append(ledger.embed(ledger.transfer("sam", "bot", "suzy", consent=consent, **fields)))
    state = bot(ledger).model_copy(update={"sponsor": "suzy", **fields})
    with pytest.raises(ChainError):
        ledger.directory.chains.verify(ledger.record(state, commands, len(commands)))
