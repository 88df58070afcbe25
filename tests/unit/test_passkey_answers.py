"""What a program takes from the sign page: exactly what it asked, by a passkey of that person, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest

from ringfence.client.errors import InvalidCallError
from ringfence.client.passkeys.questions import compose, question_link, server_link, sign_origin
from ringfence.client.passkeys.signer import check_answer
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import Claims
from ringfence.messages.registry import AgentSuspend, UserSet
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry
from tests.support.passkeys import SESSION_ORIGIN, SIGN_ORIGIN, SoftwarePasskey
from tests.support.user_keys import add_key, new_passkey

NOW_S = START_MS // 1000 + 3600


@pytest.fixture
def registry() -> InMemoryRegistry:
    """An organisation in which pia has one passkey."""
    made = InMemoryRegistry()
    made.organisation()
    made.give(made.register("sam", "deploy-bot", "sam"))
    return made


@pytest.fixture
def passkey(registry: InMemoryRegistry) -> SoftwarePasskey:
    return enrolled(registry, "pia")


def enrolled(registry: InMemoryRegistry, user: str) -> SoftwarePasskey:
    """Somebody new, with a passkey that an operator added."""
    made = new_passkey(user)
    registry.give(registry.user_set("olga", user, ("sponsor",), keys=()))
    registry.give(add_key(registry, "olga", user, made))
    return made


def suspend(**changed: Any) -> AgentSuspend:
    fields: dict[str, Any] = {
        "iss": f"spiffe://{TD}/user/pia", "aud": TD, "iat": NOW_S, "exp": NOW_S + 900, "jti": "asked",
        "agent_id": "deploy-bot", "reason": "odd",
    }  # fmt: skip
    return AgentSuspend(**(fields | changed))


def taken(registry: InMemoryRegistry, answer: object, now_s: int = NOW_S + 60) -> Any:
    return check_answer(suspend(), answer, registry.directory, trust_domain=TD, now_ms=now_s * 1000).claims


def test_what_the_page_stamps_may_differ(registry: InMemoryRegistry, passkey: SoftwarePasskey) -> None:
    stamped = suspend(iat=NOW_S + 50, jti="of the page")
    assert taken(registry, sign(stamped, passkey)) == stamped


@pytest.mark.parametrize(
    "changed",
    [
        {"reason": "other"},
        {"agent_id": "other-bot"},
        {"exp": NOW_S + 901},
        {"also": 1},
    ],
    ids=str,
)
def test_another_message_is_not_what_was_asked(
    registry: InMemoryRegistry, passkey: SoftwarePasskey, changed: dict[str, Any]
) -> None:
    with pytest.raises(InvalidCallError, match="something else"):
        taken(registry, sign(suspend(**changed), passkey))


def test_who_else_signs_is_not_who_was_asked(registry: InMemoryRegistry, passkey: SoftwarePasskey) -> None:
    with pytest.raises(InvalidCallError, match="not signed by a passkey"):
        taken(registry, sign(suspend(), registry.key("sam")))
    with pytest.raises(InvalidMessageError):
        taken(registry, sign(suspend(), SoftwarePasskey.make(passkey.id)))
    toms = enrolled(registry, "tom")
    with pytest.raises(InvalidCallError, match="something else"):
        taken(registry, sign(suspend(iss=toms.id), toms))


@pytest.mark.parametrize("answer", [None, 1, {}, "x", "a.b.c"], ids=str)
def test_what_is_no_answer_is_refused(registry: InMemoryRegistry, answer: object) -> None:
    with pytest.raises((InvalidCallError, InvalidMessageError)):
        taken(registry, answer)


def test_an_answer_from_the_console_or_that_is_too_old_is_refused(
    registry: InMemoryRegistry, passkey: SoftwarePasskey
) -> None:
    with pytest.raises(InvalidMessageError, match="no sign origin"):
        taken(registry, sign(suspend(), passkey.but(origin=SESSION_ORIGIN)))
    with pytest.raises(InvalidMessageError):
        taken(registry, sign(suspend(), passkey), NOW_S + 601)


# --- questions --------------------------------------------------------------------------------------------------------


def question(registry: InMemoryRegistry, claims: Claims) -> Any:
    text = compose(
        "pia", claims, registry.directory, registry.trust, evidence={"more": "a.b.c"}, return_to="http://x"
    )
    return json.loads(text)


def test_a_question_has_the_message_without_what_the_page_stamps_and_the_records_once(
    registry: InMemoryRegistry, passkey: SoftwarePasskey
) -> None:
    asked = question(registry, suspend(agent_id="deploy-bot"))
    assert asked["user"] == "pia"
    assert asked["message"] == {
        "typ": "agent.suspend", "claims": {"agent_id": "deploy-bot", "reason": "odd", "exp": NOW_S + 900},
    }  # fmt: skip
    assert asked["return_to"] == "http://x"
    assert asked["evidence"]["more"] == "a.b.c"
    assert asked["evidence"]["trust"] == registry.trust.compact.decode()
    assert len(asked["evidence"]["records"]) == len(set(asked["evidence"]["records"])) == 2


def test_what_no_passkey_signs_is_not_asked(registry: InMemoryRegistry, passkey: SoftwarePasskey) -> None:
    command: UserSet = registry.user_set("olga", "eve")
    with pytest.raises(InvalidCallError, match="needs a key file"):
        question(registry, command)


def test_without_the_record_or_the_bundle_nobody_is_asked(
    registry: InMemoryRegistry, passkey: SoftwarePasskey
) -> None:
    with pytest.raises(InvalidCallError, match="no agent nobody"):
        question(registry, suspend(agent_id="nobody"))
    with pytest.raises(UnavailableError):
        compose("pia", suspend(), registry.directory, TrustStore(TD, "x"), evidence={})


def test_links_lead_to_the_page_that_the_bundle_names(registry: InMemoryRegistry) -> None:
    assert sign_origin(registry.trust, NOW_S) == SIGN_ORIGIN
    assert question_link(SIGN_ORIGIN, b"{}").startswith(f"{SIGN_ORIGIN}/#q=")
    assert (
        server_link(SIGN_ORIGIN, "http://127.0.0.1:1/a&b")
        == f"{SIGN_ORIGIN}/#from=http%3A%2F%2F127.0.0.1%3A1%2Fa%26b"
    )
