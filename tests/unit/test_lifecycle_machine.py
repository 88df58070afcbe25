"""Any order of commands by anybody, at any time, held back, sent again: against a model that a person would explain.

The registry does what the model says, every reader has what the registry has, and a registry that makes records of
whatever was ever signed, as it likes, raises no agent from the dead and no key.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import KeyRecord, Scope
from ringfence.messages.registry import (
    AgentActivate,
    AgentDecommission,
    AgentRegister,
    AgentResume,
    AgentRotateKey,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    AgentTransfer,
    AgentTransferConsent,
    EmbeddedCommand,
    UserDisable,
)
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry, permission

pytestmark = pytest.mark.timeout(300)
PEOPLE = ("root", "olga", "otto", "sam", "suzy", "uma")
OTHERS = ("eve", "a forger", "the agent")
"""Nobody knows eve; the forger signs in the name of sam; the agent signs with a key that it has."""
AGENTS = ("bot", "crab")
WIDE, NARROW = (permission("env/**"),), (permission("env/a"),)
FAR_S = START_MS // 1000 + 10 * 365 * 86_400
# Made once: what hypothesis repeats is to be repeatable.
KEYS = tuple(SigningKey.generate(f"spiffe://{TD}/agent/any") for _ in range(20))
STRANGER = SigningKey.generate(f"spiffe://{TD}/user/eve")
WIDENING = (AgentActivate, AgentSetCeiling, AgentTransfer, AgentRotateKey, AgentResume)
Given = tuple[Any, SigningKey | None]
How = tuple[str, str, int, bool]
"""By whom, about which agent, how far the signer's clock is off in seconds, and whether it is kept for later."""
HOW = st.tuples(
    st.sampled_from([*["the sponsor", "olga"] * 5, *PEOPLE, *OTHERS]),
    st.sampled_from(["bot", "bot", "bot", "crab"]),
    st.sampled_from([0, 0, 0, 0, -2, -90, 20, 60]),
    st.sampled_from([False, False, True]),
)
KEY = st.sampled_from([None, None, None, 0, 1, 2])
"""Which of `KEYS`; None for the next that nobody has had, while there is one."""
USER = st.sampled_from(["sam", "suzy", "uma"])


@dataclass
class Bot:
    """An agent as a person would explain it."""

    sponsor: str
    status: str
    keys: dict[str, int]
    """Each with its end."""
    ceiling: Scope = ()
    by_operator: bool = False
    replaced: frozenset[str] = frozenset()
    compromised: frozenset[str] = frozenset()
    unasked: bool = False
    """Whether its sponsor was made accountable without their consent."""


@dataclass
class Person:
    """What somebody was, and since when."""

    since_ms: int
    roles: frozenset[str] = frozenset()


@dataclass
class Model:
    """Who may do what, in the order of the rules."""

    people: dict[str, list[Person]]
    bots: dict[str, Bot] = field(default_factory=dict)
    signed: dict[str, list[Any]] = field(default_factory=dict)
    """The orders that still count for an agent."""
    revisions: dict[str, int] = field(default_factory=dict)
    latest_ms: int = 0

    def roles(self, name: str, at_ms: int) -> frozenset[str] | None:
        """The roles that somebody had just before; None of nobody, and of who is disabled."""
        if name == "root":
            return frozenset({"operator"})
        before = [person for person in self.people.get(name, []) if person.since_ms < at_ms]
        return before[-1].roles if before and "disabled" not in before[-1].roles else None

    def after(self, claims: Any, who: str, at_ms: int) -> Bot | None:
        """The agent after a command, or None where that is refused."""
        at_s, roles = at_ms // 1000, self.roles(who, at_ms)
        changed_ms = self.people[who][-1].since_ms if who in self.people else -1
        if roles is None or at_ms < self.latest_ms or at_ms <= changed_ms:
            return None
        if at_ms / 1000 >= claims.exp or claims.iat > at_ms / 1000 + LEEWAY_S:
            return None
        bot = self.bots.get(claims.agent_id)
        if isinstance(claims, AgentRegister):
            own = who == claims.sponsor and "sponsor" in roles
            if bot is not None or not (own or "operator" in roles) or not self._sponsors(claims, at_ms):
                return None
            if not self._is_free(claims.keys[0], at_s):
                return None
            status = "registered" if claims.inactive else "active"
            return Bot(claims.sponsor, status, {claims.keys[0].kid: claims.keys[0].not_after}, claims.ceiling)
        own = bot is not None and who == bot.sponsor and "sponsor" in roles
        if bot is None or bot.status == "decommissioned" or not (own or "operator" in roles):
            return None
        last_s = max(one.iat for one in self.signed[claims.agent_id])
        if _may_widen(claims) and claims.iat < last_s:
            return None
        return self._changed(bot, claims, own=own, operator="operator" in roles, at_ms=at_ms)

    def _changed(self, bot: Bot, claims: Any, *, own: bool, operator: bool, at_ms: int) -> Bot | None:
        match claims:
            case AgentActivate() if own and bot.status == "registered":
                return replace(bot, status="active", unasked=False)
            case AgentSetCeiling():
                return replace(bot, ceiling=claims.ceiling)
            case AgentTransfer() if self._sponsors(claims, at_ms):
                if not self._agreed(bot, claims, operator=operator, at_ms=at_ms):
                    return None
                return replace(bot, sponsor=claims.sponsor, unasked=bool(claims.without_consent))
            case AgentSuspend() if bot.status != "registered":
                return replace(bot, status="suspended", by_operator=bot.by_operator or not own)
            case AgentResume() if bot.status == "suspended" and (operator or not bot.by_operator):
                return replace(bot, status="active", by_operator=False)
            case AgentDecommission():
                return replace(bot, status="decommissioned")
            case AgentRotateKey() if claims.key is None or self._is_free(claims.key, at_ms // 1000):
                return _rotated(bot, claims, at_ms // 1000)
        return None

    def _agreed(self, bot: Bot, claims: Any, *, operator: bool, at_ms: int) -> bool:
        """Whether the new sponsor takes the agent over, or an operator says that they were not asked."""
        if claims.without_consent:
            return operator
        if claims.consent is None:
            return bool(claims.iss == f"spiffe://{TD}/user/{claims.sponsor}")
        consent = parse(claims.consent).unverified_claims(AgentTransferConsent)
        by_whom = (f"spiffe://{TD}/user/{claims.sponsor}", claims.agent_id)
        as_of = (bot.sponsor, self.revisions[claims.agent_id])
        fits = (consent.iss, consent.agent_id) == by_whom and (
            consent.from_sponsor,
            consent.revision,
        ) == as_of
        return fits and at_ms / 1000 < consent.exp

    def _sponsors(self, claims: Any, at_ms: int) -> bool:
        return "sponsor" in (self.roles(claims.sponsor, at_ms) or ())

    def _is_free(self, key: KeyRecord, at_s: int) -> bool:
        return at_s < key.not_after and not any(key.kid in bot.keys for bot in self.bots.values())

    def took(self, claims: Any, bot: Bot, at_ms: int) -> None:
        """Remember what was accepted and changed something."""
        id = claims.agent_id
        self.bots[id], self.latest_ms = bot, max(self.latest_ms, at_ms)
        self.revisions[id] = self.revisions.get(id, 0) + 1
        known = self.signed.setdefault(id, [])
        if isinstance(claims, AgentSetCeiling):
            known = [one for one in known if not isinstance(one, AgentSetCeiling)]
        stops = [one for one in known if isinstance(one, AgentSuspend | AgentResume)]
        if isinstance(claims, AgentSuspend) and stops and isinstance(stops[-1], AgentResume):
            known = _without_own_stops(known, claims.iss)
        self.signed[id] = [*known, claims]


def _without_own_stops(orders: list[Any], iss: str) -> list[Any]:
    """Without what one person suspended before and is resumed again; what others suspended stays, with its resuming."""
    others = [one for one in orders if not (isinstance(one, AgentSuspend) and one.iss == iss)]
    return [
        one
        for number, one in enumerate(others)
        if not isinstance(one, AgentResume) or _is_suspended(others[:number])
    ]


def _is_suspended(orders: list[Any]) -> bool:
    stops = [one for one in orders if isinstance(one, AgentSuspend | AgentResume)]
    return bool(stops) and isinstance(stops[-1], AgentSuspend)


def _rotated(bot: Bot, claims: AgentRotateKey, at_s: int) -> Bot | None:
    old = set(bot.keys) if claims.replaces is None else set(claims.replaces)
    if old - set(bot.keys):
        return None
    ends = {kid: min(end, at_s + claims.overlap_s) if kid in old else end for kid, end in bot.keys.items()}
    lost = old if claims.compromised else set()
    return replace(
        bot,
        keys={**ends, **({claims.key.kid: claims.key.not_after} if claims.key else {})},
        replaced=bot.replaced | old,
        compromised=bot.compromised | lost,
    )


def _may_widen(claims: Any) -> bool:
    """A rotation without a new key only ends keys."""
    ends_keys = isinstance(claims, AgentRotateKey) and claims.key is None
    return isinstance(claims, WIDENING) and not ends_keys


class Lives(RuleBasedStateMachine):
    """See the module."""

    @initialize(inactive=st.sampled_from([None, True]))
    def start(self, inactive: bool | None) -> None:
        self.ledger = InMemoryRegistry()
        self.ledger.organisation()
        roles = {"olga": "operator", "otto": "operator", "sam": "sponsor", "suzy": "sponsor"}
        self.model = Model(
            {name: [Person(0, frozenset({roles[name]} if name in roles else ()))] for name in PEOPLE[1:]}
        )
        self.model.latest_ms = self.ledger.memory.latest_ms
        self.reader = self.ledger.reader()
        self.fresh = 0
        self.held: list[Given] = []
        self.given: list[Given] = []
        self.known: dict[str, list[EmbeddedCommand]] = {id: [] for id in AGENTS}
        """Everything about an agent that a registry could ever lay hands on."""
        self._tell_reader("user")
        bot = {
            "agent_id": "bot",
            "sponsor": "sam",
            "description": "x",
            "ceiling": NARROW,
            "inactive": inactive,
        }
        self._deliver(self.ledger.claims(AgentRegister, "sam", **bot, keys=(KEYS[0].record(FAR_S),)), None)

    # --- time and people ---

    @rule(ms=st.sampled_from([1, 700, 1000, 90_000, 400_000]))
    def wait(self, ms: int) -> None:
        self.ledger.clock.ms += ms

    @rule(who=st.sampled_from(["sam", "suzy", "uma"]), sponsor=st.sampled_from([True, True, False]))
    def hire(self, who: str, sponsor: bool) -> None:
        self._set("olga", who, ("sponsor",) if sponsor else ())

    @rule(operator=st.booleans())
    def promote(self, operator: bool) -> None:
        self._set("root", "otto", ("operator",) if operator else ())

    @rule(who=st.sampled_from(["otto", "sam", "suzy"]), sure=st.integers(0, 3))
    def dismiss(self, who: str, sure: int) -> None:
        if sure < 3:
            return
        self.ledger.clock.ms += 1
        self._changed(who, self.ledger.claims(UserDisable, "olga", user_id=who, reason="left"), {"disabled"})

    def _set(self, by: str, who: str, roles: tuple[str, ...]) -> None:
        self.ledger.clock.ms += 1
        self._changed(who, self.ledger.user_set(by, who, roles), set(roles))

    def _changed(self, who: str, claims: Any, roles: set[str]) -> None:
        at_ms = self.ledger.clock.ms
        if self.ledger.give(claims, passing_ms=0) is not None:
            self.model.people[who].append(Person(at_ms, frozenset(roles)))
            self.model.latest_ms = max(self.model.latest_ms, at_ms)
            self._tell_reader("user")

    # --- agents ---

    @rule(how=HOW, key=KEY, sponsor=USER, inactive=st.booleans())
    def register(self, how: How, key: int | None, sponsor: str, inactive: bool) -> None:
        keys, asleep = (self._key(key).record(FAR_S),), True if inactive else None
        fields = {"sponsor": sponsor, "description": "x", "keys": keys, "ceiling": NARROW, "inactive": asleep}
        self._order(how, AgentRegister, **fields)

    @rule(how=HOW)
    def activate(self, how: How) -> None:
        self._order(how, AgentActivate)

    @rule(how=HOW, ceiling=st.sampled_from([NARROW, WIDE]))
    def set_ceiling(self, how: How, ceiling: Scope) -> None:
        self._order(how, AgentSetCeiling, ceiling=ceiling)

    @rule(how=HOW, to=USER, consent_of=st.sampled_from([None, *["the new one"] * 4, "sam", "suzy"]))
    def transfer(self, how: How, to: str, consent_of: str | None) -> None:
        """With a consent to the agent as it is now; it may be by somebody else, and be handed in late."""
        consent = None
        if consent_of is not None:
            consent = self.ledger.transfer_consent(to if consent_of == "the new one" else consent_of, how[1])
        self._order(how, AgentTransfer, sponsor=to, consent=consent)

    @rule(how=HOW, to=USER)
    def transfer_unasked(self, how: How, to: str) -> None:
        self._order(how, AgentTransfer, sponsor=to, without_consent=True)

    @rule(
        how=HOW, key=KEY, overlap_s=st.sampled_from([None, 0, 60, 3600]), life_s=st.sampled_from([100, 10**8])
    )
    def rotate(self, how: How, key: int | None, overlap_s: int | None, life_s: int) -> None:
        self._rotate(how, key, overlap_s, life_s)

    @rule(how=HOW, key=KEY, overlap_s=st.sampled_from([None, 60]), old=st.integers(0, 3))
    def rotate_one(self, how: How, key: int | None, overlap_s: int | None, old: int) -> None:
        self._rotate(how, key, overlap_s, 10**8, replaces=(KEYS[old].kid,))

    def _rotate(self, how: How, key: int | None, overlap_s: int | None, life_s: int, **fields: Any) -> None:
        """Without an overlap the old keys are compromised, and with a short life there is no new one then."""
        lost = True if overlap_s is None else None
        without = lost and life_s < 10**8
        record = None if without else self._key(key).record(self.ledger.clock.ms // 1000 + life_s)
        self._order(how, AgentRotateKey, key=record, overlap_s=overlap_s or 0, compromised=lost, **fields)

    def _key(self, number: int | None) -> SigningKey:
        if number is not None:
            return KEYS[number]
        self.fresh = min(self.fresh + 1, len(KEYS) - 1)
        return KEYS[self.fresh]

    @rule(how=HOW)
    def suspend(self, how: How) -> None:
        self._order(how, AgentSuspend, reason="x")

    @rule(how=HOW)
    def resume(self, how: How) -> None:
        self._order(how, AgentResume, reason="x")

    @rule(how=HOW, sure=st.integers(0, 4))
    def decommission(self, how: How, sure: int) -> None:
        if sure == 4:  # rarely: it ends the story
            self._order(how, AgentDecommission, reason="x")

    def _order(self, how: How, kind: type[Any], **fields: Any) -> None:
        """Somebody signs a command, and sends it, or keeps it for later."""
        who, id, skew_s, hold = how
        if who == "the sponsor":
            who = self.model.bots[id].sponsor if id in self.model.bots else "sam"
        signer, iss = None, f"spiffe://{TD}/user/{who}"
        match who:
            case "root":
                iss = self.ledger.root.id
            case "eve":
                signer = STRANGER
            case "a forger":
                signer, iss = STRANGER, f"spiffe://{TD}/user/sam"
            case "the agent":
                signer, iss = KEYS[0], f"spiffe://{TD}/agent/{id}"
        iat = self.ledger.clock.ms // 1000 + skew_s
        claims = self.ledger.claims(kind, "root", iss=iss, iat=iat, exp=iat + 300, agent_id=id, **fields)
        self.known[id].append(self.ledger.embed(claims, self.ledger.clock.ms, signer))
        if hold:
            self.held.append((claims, signer))
        else:
            self._deliver(claims, signer)

    @precondition(lambda self: self.held)
    @rule(which=st.integers(0, 100))
    def send_late(self, which: int) -> None:
        self._deliver(*self.held.pop(which % len(self.held)))

    @precondition(lambda self: self.given)
    @rule(which=st.integers(0, 100))
    def replay(self, which: int) -> None:
        """What was accepted once is known by its record, and handled no more; what was refused is asked anew."""
        claims, signer = self.given[which % len(self.given)]
        if self.ledger.memory.embedded(claims.iss, claims.jti) is None:
            self._deliver(claims, signer)

    def _deliver(self, claims: Any, signer: SigningKey | None) -> None:
        at_ms, id = self.ledger.clock.ms, claims.agent_id
        who = "nobody" if signer is not None else claims.iss.rpartition("/")[2]
        expected = self.model.after(claims, who, at_ms)
        self.given.append((claims, signer))
        try:
            change = self.ledger.give(claims, signer, passing_ms=0)
            refused = None
        except (CommandRefusedError, InvalidMessageError) as error:
            change, refused = None, str(error)
        if expected is None or refused is not None:
            assert expected is None, f"{claims.typ} by {who} was refused: {refused}"
            assert refused is not None, f"{claims.typ} by {who} was accepted"
            return
        assert (change is None) == (expected == self.model.bots.get(id))
        if change is not None:
            self.model.took(claims, expected, at_ms)
            self._tell_reader("agent")

    # --- who reads ---

    def _tell_reader(self, *kinds: SubjectKind) -> None:
        for kind in kinds:
            for entry in self.ledger.directory.entries(kind):
                assert self.ledger.admit(entry.compact.decode(), self.reader) is None

    @precondition(lambda self: self.model.bots)
    @rule(seed=st.integers(0, 2**32))
    def lie(self, seed: int) -> None:
        """A registry in other hands publishes records of whatever was signed: what is over stays over."""
        rng = random.Random(seed)
        for _ in range(8):
            self._lie(rng)

    def _lie(self, rng: random.Random) -> None:
        id = rng.choice(sorted(self.model.bots))
        entry = self.reader.agent(id)
        assert entry is not None
        commands, revision = self._made_up(rng, entry.record.commands, self.known[id]), entry.revision + 1
        try:
            # What nobody can fold to anything is published as what was before.
            record = self.ledger.follow(commands, revision)
        except (CommandRefusedError, InvalidMessageError, ChainError):
            record = self.ledger.record(entry.state, commands, revision)
        victim = self._reader_like_the_others()
        problem = self.ledger.admit(self.ledger.sign_record(record.state, commands, revision), victim)
        try:
            found = victim.agent(id)
        except ChainError:
            return
        assert found is not None
        assert problem is None or found.state == entry.state
        _assert_over_is_over(entry.state, found.state)

    def _made_up(
        self, rng: random.Random, kept: Sequence[EmbeddedCommand], known: list[EmbeddedCommand]
    ) -> list[EmbeddedCommand]:
        """The commands so far, perhaps without one, or with others that were signed at whatever time."""
        commands, now_ms = list(kept), self.ledger.clock.ms
        if rng.random() < 0.3:
            commands.pop(rng.randrange(len(commands)))
        added = rng.sample(known, k=min(len(known), rng.choice([0, 1, 1, 1, 2])))
        if rng.random() < 0.8:
            added = [one.model_copy(update={"appended_at_ms": now_ms}) for one in added]
        commands += added
        if rng.random() < 0.2:
            commands.sort(key=lambda command: command.appended_at_ms)
        return commands or list(kept)

    def _reader_like_the_others(self) -> Directory:
        reader = self.ledger.reader()
        kinds: tuple[SubjectKind, ...] = ("user", "agent")
        for kind in kinds:
            for entry in self.reader.entries(kind):
                assert self.ledger.admit(entry.compact.decode(), reader) is None
        return reader

    @invariant()
    def agree(self) -> None:
        """Model, registry and reader say the same of every agent and every key."""
        if not hasattr(self, "model"):
            return
        for id, bot in self.model.bots.items():
            for directory in (self.ledger.directory, self.reader):
                entry = directory.agent(id)
                assert entry is not None
                assert _seen(entry.state) == bot
            for key in KEYS:
                at_s = self.ledger.clock.ms / 1000
                found = self.reader.agent_key(f"spiffe://{TD}/agent/{id}", key.kid, at_s)
                assert (found is not None) == (at_s < bot.keys.get(key.kid, 0))
        for id in set(AGENTS) - set(self.model.bots):
            assert self.reader.agent(id) is None


def _seen(state: AgentState) -> Bot:
    return Bot(
        state.sponsor,
        state.status,
        {key.kid: key.not_after for key in state.keys},
        state.ceiling,
        state.suspended_by_operator,
        frozenset(state.replaced),
        frozenset(state.compromised),
        bool(state.without_consent),
    )


def _assert_over_is_over(before: AgentState, after: AgentState) -> None:
    old, new = _seen(before), _seen(after)
    assert new.status == "decommissioned" or old.status != "decommissioned"
    assert all(new.keys[kid] <= end for kid, end in old.keys.items())
    assert old.compromised <= new.compromised
    assert old.replaced <= new.replaced


TestLives = Lives.TestCase
TestLives.settings = settings(max_examples=20, stateful_step_count=60, deadline=None)
