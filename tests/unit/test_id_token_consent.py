"""An OIDC ID token as a user's word that a task is on their behalf, for registry and readers."""

from __future__ import annotations

import base64
import hashlib
from typing import Any

import jwt
import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.messages.registry import TaskAssign, TaskTerms, UserDisable
from ringfence.messages.trust import OidcIssuer
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.consent import MAX_AGE_S, canonical_terms, nonce_of
from tests.support.in_memory_registry import TD, InMemoryRegistry, permission
from tests.support.oidc_tokens import TokenIssuer
from tests.support.unknown_field_cases import NAME, planted

ISSUER = TokenIssuer("https://login.acme.example", "ES256")


def trusting(ledger: InMemoryRegistry, *issuers: OidcIssuer) -> None:
    """The next trust bundle has these issuers."""
    bundle = ledger.trust.require()
    following = bundle.model_copy(update={"version": bundle.version + 1, "oidc_issuers": issuers})
    ledger.trust.load(sign(following, ledger.root, header_jwk=True), ledger.clock.ms / 1000)


@pytest.fixture
def ledger() -> InMemoryRegistry:
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(ledger.register("sam", "bot", "sam"))
    trusting(ledger, ISSUER.pinned("users"))
    return ledger


def claims_of(ledger: InMemoryRegistry, terms: TaskTerms, **more: Any) -> dict[str, Any]:
    given = {"sub": "uma", "nonce": nonce_of(terms), **more}
    return ISSUER.claims(given.pop("aud", TD), ledger.clock.ms / 1000, **given)


def assign(
    ledger: InMemoryRegistry, token: str, terms: TaskTerms, user: str = "uma", **fields: Any
) -> TaskAssign:
    return ledger.assign("sam", "bot", terms=terms, on_behalf_of=user, id_token=token, **fields)


def refused(ledger: InMemoryRegistry, claims: TaskAssign) -> str:
    with pytest.raises(CommandRefusedError) as caught:
        ledger.give(claims)
    return f"{caught.value.code}: {caught.value}"


def test_a_token_over_the_terms_is_the_users_word_for_registry_and_readers(ledger: InMemoryRegistry):
    terms = ledger.terms("bot")
    change = ledger.give(assign(ledger, ISSUER.token(claims_of(ledger, terms)), terms))
    assert change is not None
    task = ledger.directory.task(change.state.task_id)  # type: ignore[union-attr]
    assert task is not None
    assert (task.state.on_behalf_of, task.state.assigned_by) == ("uma", "sam")
    ledger.chains().verify(task.record)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"nonce": "other"}, "nonce"),
        ({"nonce": None}, "nonce"),
        ({"aud": "elsewhere.example"}, "aud"),
        ({"aud": [TD, "elsewhere.example"]}, "aud"),
        ({"sub": "adam"}, "not uma's"),
        ({"sub": "UMA"}, "not uma's"),
        ({"iat": -MAX_AGE_S - 60}, "issued"),
        ({"iat": 3600}, "ahead"),
        ({"exp": -60}, "expired"),
        ({"iss": "https://other.example"}, "pinned"),
    ],
)
def test_a_token_that_says_something_else(ledger: InMemoryRegistry, change: dict[str, Any], why: str):
    terms, now_s = ledger.terms("bot"), ledger.clock.ms // 1000
    moved = {name: now_s + value if name in ("iat", "exp") else value for name, value in change.items()}
    token = ISSUER.token(claims_of(ledger, terms, **moved))
    said = refused(ledger, assign(ledger, token, terms))
    assert said.startswith("on_behalf_of_unsigned")
    assert why in said


def test_a_token_of_an_issuer_that_the_bundle_limits_in_a_way_that_is_not_known(ledger: InMemoryRegistry):
    """For new tasks: those that rest on such a token already are what they were."""
    before = ledger.terms("bot")
    change = ledger.give(assign(ledger, ISSUER.token(claims_of(ledger, before)), before))
    assert change is not None
    for issuer in planted(ISSUER.pinned("users")):
        trusting(ledger, issuer)
        terms = ledger.terms("bot")
        said = refused(ledger, assign(ledger, ISSUER.token(claims_of(ledger, terms)), terms))
        assert said.startswith(
            f'unknown_field: unknown field "{NAME}" in issuer {ISSUER.issuer} in the trust bundle'
        )
        assert ledger.directory.task(change.state.task_id) is not None  # type: ignore[union-attr]
    trusting(ledger, ISSUER.pinned("users"))
    terms = ledger.terms("bot")
    assert ledger.give(assign(ledger, ISSUER.token(claims_of(ledger, terms)), terms)) is not None


def test_a_token_to_other_terms(ledger: InMemoryRegistry):
    terms = ledger.terms("bot")
    token = ISSUER.token(claims_of(ledger, terms))
    for other in ({"purpose": "else"}, {"scope": (permission("**"),)}, {"not_after": terms.not_after + 1}):
        assert "nonce" in refused(ledger, assign(ledger, token, terms.model_copy(update=other)))


def test_a_token_by_a_key_that_is_not_pinned(ledger: InMemoryRegistry):
    terms = ledger.terms("bot")
    thief = TokenIssuer(ISSUER.issuer, "ES256")
    claims = claims_of(ledger, terms)
    assert "signature" in refused(ledger, assign(ledger, thief.token(claims), terms))
    assert "no key" in refused(ledger, assign(ledger, thief.token(claims, kid="key-2"), terms))


def test_a_token_that_nobody_signed_or_with_a_public_key_as_its_secret(ledger: InMemoryRegistry):
    terms = ledger.terms("bot")
    claims = claims_of(ledger, terms)
    none = jwt.encode(claims, "", algorithm="none", headers={"kid": "key-1"})
    assert "alg" in refused(
        ledger, assign(ledger, none + base64.urlsafe_b64encode(b"x").decode().rstrip("="), terms)
    )
    secret = ISSUER.jwk()["x"].encode()
    symmetric = jwt.encode(claims, secret, algorithm="HS256", headers={"kid": "key-1"})
    assert "alg" in refused(ledger, assign(ledger, symmetric, terms))


def test_a_token_counts_once(ledger: InMemoryRegistry):
    terms = ledger.terms("bot")
    token = ISSUER.token(claims_of(ledger, terms))
    ledger.give(assign(ledger, token, terms))
    assert refused(ledger, assign(ledger, token, terms)).startswith("consent_used")


def test_a_token_is_used_up_for_a_registry_that_starts_anew(ledger: InMemoryRegistry):
    from ringfence.registry.store import Memory

    terms = ledger.terms("bot")
    token = ISSUER.token(claims_of(ledger, terms))
    ledger.give(assign(ledger, token, terms))
    reader = ledger.reader()
    memory = Memory(reader, ledger.trust, 0)
    for kind in ("user", "agent", "task"):
        for entry in ledger.directory.entries(kind):
            ledger.admit(entry.compact.decode(), reader)
    ledger.directory, ledger.memory = reader, memory
    assert refused(ledger, assign(ledger, token, terms)).startswith("consent_used")


def test_a_token_of_a_user_who_was_disabled(ledger: InMemoryRegistry):
    terms = ledger.terms("bot")
    ledger.give(ledger.claims(UserDisable, "olga", user_id="uma", reason="left"))
    assert "no active user" in refused(ledger, assign(ledger, ISSUER.token(claims_of(ledger, terms)), terms))


def test_a_token_beside_a_consent(ledger: InMemoryRegistry):
    terms = ledger.terms("bot")
    both = assign(ledger, ISSUER.token(claims_of(ledger, terms)), terms, consent=ledger.consent("uma", terms))
    assert "one of them" in refused(ledger, both)


def test_an_issuer_of_instances_speaks_for_no_user(ledger: InMemoryRegistry):
    trusting(ledger, ISSUER.pinned("instances"))
    terms = ledger.terms("bot")
    assert "pinned" in refused(ledger, assign(ledger, ISSUER.token(claims_of(ledger, terms)), terms))


def test_user_claim_of_an_id_token_comes_from_the_trust_bundle(ledger: InMemoryRegistry):
    pinned = ISSUER.pinned("users").model_copy(
        update={"user_claim": "preferred_username", "user_suffix": "@acme.example"}
    )
    trusting(ledger, pinned)
    terms = ledger.terms("bot")
    for name, counts in (("uma@acme.example", True), ("uma@evil.example", False), ("uma", False)):
        token = ISSUER.token(claims_of(ledger, terms, preferred_username=name, sub=name))
        if counts:
            assert ledger.give(assign(ledger, token, terms)) is not None
        else:
            assert "not uma's" in refused(ledger, assign(ledger, token, terms))


@pytest.mark.parametrize(
    ("verified", "counts"),
    [(None, False), (True, True), ("true", True), (False, False), ("false", False), (1.5, False)],
)
def test_an_address_that_the_issuer_has_not_verified_is_nobodys(
    ledger: InMemoryRegistry, verified: Any, counts: bool
):
    """Some issuers let their users say any address, and say so beside it."""
    pinned = {"user_claim": "email", "user_suffix": "@acme.example"}
    trusting(ledger, ISSUER.pinned("users").model_copy(update=pinned))
    terms, more = ledger.terms("bot"), {} if verified is None else {"email_verified": verified}
    token = ISSUER.token(claims_of(ledger, terms, sub="x", email="uma@acme.example", **more))
    if counts:
        assert ledger.give(assign(ledger, token, terms)) is not None
    else:
        why = "email_unverified: the ID token does not say" if verified is None else "not uma's"
        assert why in refused(ledger, assign(ledger, token, terms))


def test_an_issuer_of_which_the_root_says_that_it_verifies_addresses_need_not(ledger: InMemoryRegistry):
    pinned = {"user_claim": "email", "user_suffix": "@acme.example", "emails_verified": True}
    trusting(ledger, ISSUER.pinned("users").model_copy(update=pinned))
    terms = ledger.terms("bot")
    token = ISSUER.token(claims_of(ledger, terms, sub="x", email="uma@acme.example"))
    assert ledger.give(assign(ledger, token, terms)) is not None
    other = ledger.terms("bot", purpose="another")
    token = ISSUER.token(claims_of(ledger, other, sub="x", email="uma@acme.example", email_verified=False))
    assert "not uma's" in refused(ledger, assign(ledger, token, other))


def test_a_task_of_before_that_rests_on_an_address_is_still_believed(ledger: InMemoryRegistry):
    pinned = {"user_claim": "email", "user_suffix": "@acme.example", "emails_verified": True}
    trusting(ledger, ISSUER.pinned("users").model_copy(update=pinned))
    terms = ledger.terms("bot")
    change = ledger.give(
        assign(ledger, ISSUER.token(claims_of(ledger, terms, sub="x", email="uma@acme.example")), terms)
    )
    assert change is not None
    trusting(ledger, ISSUER.pinned("users").model_copy(update={**pinned, "emails_verified": None}))
    task = ledger.directory.task(change.state.task_id)  # type: ignore[union-attr]
    assert task is not None
    ledger.chains().verify(task.record)


def test_a_registry_cannot_make_a_task_of_a_token_that_does_not_count(ledger: InMemoryRegistry):
    terms = ledger.terms("bot")
    change = ledger.give(assign(ledger, ISSUER.token(claims_of(ledger, terms)), terms))
    assert change is not None
    stale = ISSUER.token(claims_of(ledger, terms, iat=ledger.clock.ms // 1000 - 2 * MAX_AGE_S))
    command = ledger.embed(assign(ledger, stale, terms))
    with pytest.raises(ChainError, match="issued"):
        ledger.chains().verify(ledger.record(change.state, (command,)))


GOLDEN = (
    '{"agent_id":"deploy-bot","not_after":1790003600,"purpose":"Zürich: \\"release\\" 41",'
    '"scope":[{"resources":["env/staging/*"],"target":"platform","verbs":["deploy","read"]}]}'
)


def test_the_nonce_is_what_the_page_says(ledger: InMemoryRegistry):
    """docs/users.md has this example, for those who compute it elsewhere."""
    terms = TaskTerms.model_validate_json(GOLDEN)
    assert canonical_terms(terms).decode() == GOLDEN
    expected = base64.urlsafe_b64encode(hashlib.sha256(GOLDEN.encode()).digest()).decode().rstrip("=")
    assert nonce_of(terms) == expected == "6fvFlN-W_EDmdpBFhOwojw6PTbeAWlc2aFws_ifx19I"
