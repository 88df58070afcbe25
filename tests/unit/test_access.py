"""Who is turned away at an HTTP API, and what they hear: whose key it is, why it does not count; others nothing.

An API token is for one service, and counts once.
"""

from __future__ import annotations

from typing import Any, get_args

import pytest

from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.api import (
    MAX_API_TOKEN_S,
    ApiToken,
    api_audience,
)
from ringfence.messages.base import ServiceRole
from ringfence.messages.registry import UserDisable
from ringfence.model.identity.api_tokens import api_token
from ringfence.model.records import api_access
from ringfence.model.records.api_access import Authenticator, UnauthenticatedError
from tests.support.in_memory_registry import TD, InMemoryRegistry

SERVICES: tuple[ServiceRole, ...] = get_args(ServiceRole)


@pytest.fixture
def ledger() -> InMemoryRegistry:
    made = InMemoryRegistry()
    made.organisation()
    return made


def of_service(ledger: InMemoryRegistry, service: ServiceRole = "policy") -> Authenticator:
    return Authenticator(ledger.directory, service, ledger.clock)


def token(ledger: InMemoryRegistry, who: str, key: SigningKey | None = None, **fields: Any) -> str:
    now_s = ledger.clock.ms // 1000
    claims = ledger.claims(ApiToken, who, **{"aud": api_audience(TD, "policy"), "exp": now_s + 60, **fields})
    return f"Bearer {sign(claims, key or ledger.key(who))}"


def told(ledger: InMemoryRegistry, authorization: str, by: Authenticator | None = None) -> str:
    with pytest.raises(UnauthenticatedError) as refused:
        (by or of_service(ledger)).user(authorization)
    return str(refused.value)


def disable(ledger: InMemoryRegistry, who: str) -> None:
    ledger.give(ledger.claims(UserDisable, "olga", user_id=who, reason="left"))


def test_a_disabled_user_is_told_so(ledger: InMemoryRegistry):
    before = token(ledger, "uma")
    assert of_service(ledger).user(before).user.user_id == "uma"
    disable(ledger, "uma")
    assert "user uma is disabled" in told(ledger, before)


def test_ended_key_is_refused_with_its_end_and_the_remedy(ledger: InMemoryRegistry):
    old, end_s = ledger.key("uma"), ledger.clock.ms // 1000 + 600
    ledger.give(ledger.user_set("olga", "uma", keys=(old.record(end_s),)))
    ledger.clock.ms = end_s * 1000
    says = told(ledger, token(ledger, "uma"))
    assert f"key {old.kid} of user uma ended at " in says
    assert "ringfence user set --public-key" in says


def test_future_key_is_refused_with_its_start(ledger: InMemoryRegistry):
    next_key, now_s = SigningKey.generate(ledger.key("uma").id), ledger.clock.ms // 1000
    keys = (ledger.key_record(ledger.key("uma")), next_key.record(now_s + 9000, now_s + 600))
    ledger.give(ledger.user_set("olga", "uma", keys=keys))
    assert f"key {next_key.kid} of user uma counts only from " in told(ledger, token(ledger, "uma", next_key))


@pytest.mark.parametrize("who", ["uma", "nobody"])
def test_a_stranger_learns_nothing_of_who_is_disabled(ledger: InMemoryRegistry, who: str):
    disable(ledger, "uma")
    stranger = SigningKey.generate(ledger.key(who).id)
    says = told(ledger, token(ledger, who, stranger))
    assert says == (f"the bearer token is refused: no valid key {stranger.kid} of {stranger.id} may sign api")


def test_agent_key_is_refused_as_no_user(ledger: InMemoryRegistry):
    agent = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    bearer = f"Bearer {api_token(agent, 'policy', now_ms=ledger.clock.ms)}"
    assert f"{agent.id} is no user" in told(ledger, bearer)


def test_token_with_a_forged_signature_learns_nothing_of_the_key(ledger: InMemoryRegistry):
    disable(ledger, "uma")
    right = token(ledger, "uma").split(".")
    forged = ".".join([*right[:2], token(ledger, "sam").split(".")[2]])
    assert "no valid key" in told(ledger, forged)


def test_an_old_token_in_other_hands_tells_nothing(ledger: InMemoryRegistry):
    old = token(ledger, "uma")
    disable(ledger, "uma")
    ledger.clock.ms += 61_000
    assert "no valid key" in told(ledger, old)


def test_a_key_that_is_not_of_its_name_tells_nothing(ledger: InMemoryRegistry):
    """Nobody's record may lead a token to be verified by a key that its `kid` does not name."""
    assert "no valid key" in told(ledger, token(ledger, "uma", ledger.key("sam")))


# --- for one service --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("service", SERVICES)
def test_a_token_opens_the_service_that_it_is_for_and_no_other(
    ledger: InMemoryRegistry, service: ServiceRole
):
    bearer = f"Bearer {api_token(ledger.key('uma'), service, now_ms=ledger.clock.ms)}"
    for other in SERVICES:
        if other != service:
            says = told(ledger, bearer, of_service(ledger, other))
            assert f"aud is '{TD}/{service}', which is not this service; sign one for '{TD}/{other}'" in says
    assert of_service(ledger, service).user(bearer).user.user_id == "uma"


@pytest.mark.parametrize(
    "aud", [TD, "other.example", "other.example/policy", f"{TD}/", f"{TD}/policy/", "policy"]
)
def test_another_audience_is_refused(ledger: InMemoryRegistry, aud: str):
    assert "is not this service" in told(ledger, token(ledger, "uma", aud=aud))


# --- once -------------------------------------------------------------------------------------------------------------


def test_a_token_counts_once_until_its_end_and_is_then_forgotten(ledger: InMemoryRegistry):
    here, bearer = of_service(ledger), token(ledger, "uma")
    assert here.user(bearer).user.user_id == "uma"
    for later_ms in (0, 1, 59_998):
        ledger.clock.ms += later_ms
        assert "it was used before, and counts once; sign one for each call" in told(ledger, bearer, here)
    assert len(here._used) == 1
    ledger.clock.ms += 1
    assert "after its exp" in told(ledger, bearer, here)
    here.user(token(ledger, "sam"))
    assert len(here._used) == 1  # that of sam


def test_once_means_the_token_and_not_its_bytes(ledger: InMemoryRegistry):
    """Signing the same claims once more makes no other token of them; the same `jti` of others is theirs."""
    here = of_service(ledger)
    here.user(token(ledger, "uma", jti="one"))
    assert "it was used before" in told(ledger, token(ledger, "uma", jti="one"), here)
    assert here.user(token(ledger, "sam", jti="one")).user.user_id == "sam"


def test_a_clock_that_was_set_back_brings_no_token_back(ledger: InMemoryRegistry):
    here, bearer = of_service(ledger), token(ledger, "uma")
    here.user(bearer)
    ledger.clock.ms += 3600_000
    here.user(token(ledger, "sam"))  # what is over is forgotten
    ledger.clock.ms -= 3600_000
    assert "it was used before" in told(ledger, bearer, here)


def test_of_a_signer_whose_clock_is_ahead_a_token_is_remembered_as_long_as_it_counts(
    ledger: InMemoryRegistry,
):
    here, now_s = of_service(ledger), ledger.clock.ms // 1000
    ahead = now_s + LEEWAY_S
    bearer = token(ledger, "uma", iat=ahead, exp=ahead + MAX_API_TOKEN_S)
    here.user(bearer)
    ledger.clock.ms += (LEEWAY_S + MAX_API_TOKEN_S) * 1000 - 1
    assert "it was used before" in told(ledger, bearer, here)
    assert "iat lies" in told(ledger, token(ledger, "uma", iat=ahead + 100, exp=ahead + 101), here)


def test_refused_token_is_not_marked_as_used(ledger: InMemoryRegistry):
    """A token that was sent to the wrong place still counts at the right one; nor do strangers fill the memory."""
    here, elsewhere, bearer = of_service(ledger), of_service(ledger, "audit"), token(ledger, "uma")
    told(ledger, bearer, elsewhere)
    stranger = SigningKey.generate(ledger.key("uma").id)
    for _ in range(20):
        told(ledger, token(ledger, "uma", stranger), here)
    assert len(here._used) == len(elsewhere._used) == 0
    assert here.user(bearer).user.user_id == "uma"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"exp": 3600}, "it lives longer than 60 s"),
        ({"exp": 0}, "after its exp"),
        ({"jti": ""}, "jti"),
        ({"jti": None}, "jti"),
    ],
)
def test_a_token_without_an_id_or_with_too_long_a_life_is_refused(
    ledger: InMemoryRegistry, wrong: dict[str, Any], says: str
):
    if "exp" in wrong:
        wrong = {"exp": ledger.clock.ms // 1000 + wrong["exp"]}
        bearer = token(ledger, "uma", **wrong)
    else:
        claims = ledger.claims(ApiToken, "uma", aud=api_audience(TD, "policy")).model_copy(update=wrong)
        bearer = f"Bearer {sign(claims, ledger.key('uma'))}"
    assert says in told(ledger, bearer)


def test_user_that_fills_its_token_memory_blocks_no_other_user(
    ledger: InMemoryRegistry, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(api_access, "MAX_REMEMBERED", 100)
    here, sent = of_service(ledger), 0
    with pytest.raises(UnavailableError):
        for sent in range(200):  # noqa: B007
            here.user(token(ledger, "uma"))
    assert sent == 50
    assert here.user(token(ledger, "sam")).user.user_id == "sam"
    ledger.clock.ms += 61_000
    assert here.user(token(ledger, "uma")).user.user_id == "uma"
