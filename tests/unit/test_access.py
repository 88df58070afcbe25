"""Who is turned away at an HTTP API, and what they hear: whose key it is, why it does not count; others nothing."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.kernel.jws import sign
from ringfence.kernel.keys import SigningKey
from ringfence.messages.api import ApiToken
from ringfence.messages.registry import UserDisable
from ringfence.model.access import UnauthenticatedError, authenticate_user
from tests.ledger import TD, Ledger


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger()
    made.organisation()
    return made


def token(ledger: Ledger, who: str, key: SigningKey | None = None, **fields: Any) -> str:
    now_s = ledger.clock.ms // 1000
    claims = ledger.claims(ApiToken, who, **{"exp": now_s + 60, **fields})
    return f"Bearer {sign(claims, key or ledger.key(who))}"


def told(ledger: Ledger, authorization: str) -> str:
    with pytest.raises(UnauthenticatedError) as refused:
        authenticate_user(authorization, ledger.directory, TD, ledger.clock.ms)
    return str(refused.value)


def disable(ledger: Ledger, who: str) -> None:
    ledger.give(ledger.claims(UserDisable, "olga", user_id=who, reason="left"))


def test_a_disabled_user_is_told_so(ledger: Ledger):
    before = token(ledger, "uma")
    assert authenticate_user(before, ledger.directory, TD, ledger.clock.ms).user.user_id == "uma"
    disable(ledger, "uma")
    assert "user uma is disabled" in told(ledger, before)


def test_whose_key_has_ended_is_told_when(ledger: Ledger):
    old, end_s = ledger.key("uma"), ledger.clock.ms // 1000 + 600
    ledger.give(ledger.user_set("olga", "uma", keys=(old.record(end_s),)))
    ledger.clock.ms = end_s * 1000
    says = told(ledger, token(ledger, "uma"))
    assert f"key {old.kid} of user uma ended at " in says
    assert "ringfence user set --public-key" in says


def test_whose_key_is_to_come_is_told_from_when_on(ledger: Ledger):
    next_key, now_s = SigningKey.generate(ledger.key("uma").id), ledger.clock.ms // 1000
    keys = (ledger.key_record(ledger.key("uma")), next_key.record(now_s + 9000, now_s + 600))
    ledger.give(ledger.user_set("olga", "uma", keys=keys))
    assert f"key {next_key.kid} of user uma counts only from " in told(ledger, token(ledger, "uma", next_key))


@pytest.mark.parametrize("who", ["uma", "nobody"])
def test_a_stranger_learns_nothing_of_who_is_disabled(ledger: Ledger, who: str):
    disable(ledger, "uma")
    stranger = SigningKey.generate(ledger.key(who).id)
    says = told(ledger, token(ledger, who, stranger))
    assert says == (f"the bearer token is refused: no valid key {stranger.kid} of {stranger.id} may sign api")


def test_who_is_no_user_is_told_who_is_answered(ledger: Ledger):
    agent = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    now_s = ledger.clock.ms // 1000
    claims = ApiToken(iss=agent.id, aud=TD, iat=now_s, exp=now_s + 60, jti="j")
    assert f"{agent.id} is no user" in told(ledger, f"Bearer {sign(claims, agent)}")


def test_who_names_anothers_key_learns_nothing(ledger: Ledger):
    disable(ledger, "uma")
    right = token(ledger, "uma").split(".")
    forged = ".".join([*right[:2], token(ledger, "sam").split(".")[2]])
    assert "no valid key" in told(ledger, forged)


def test_an_old_token_in_other_hands_tells_nothing(ledger: Ledger):
    old = token(ledger, "uma")
    disable(ledger, "uma")
    ledger.clock.ms += 61_000
    assert "no valid key" in told(ledger, old)


def test_a_key_that_is_not_of_its_name_tells_nothing(ledger: Ledger):
    """Nobody's record may lead a token to be verified by a key that its `kid` does not name."""
    assert "no valid key" in told(ledger, token(ledger, "uma", ledger.key("sam")))
