"""What a program takes from the sign page: exactly what it asked, by a passkey of that person, and nothing else."""

from __future__ import annotations

import json
import re
import uuid
import zlib
from collections.abc import Callable
from typing import Any, cast

import pytest

from ringfence.client.admin import user_keys
from ringfence.client.admin.user_keys import KeyPackage
from ringfence.client.connection import Connection
from ringfence.client.errors import InvalidCallError
from ringfence.client.passkeys.questions import (
    BEGIN,
    END,
    PasskeyUser,
    check_answer,
    compose,
    question_link,
    server_link,
    sign_origin,
    unwrapped,
)
from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import b64decode, b64encode
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import Claims
from ringfence.messages.lease import RevocationRequest, Selector
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


def test_answer_may_differ_in_the_stamps_of_the_page(
    registry: InMemoryRegistry, passkey: SoftwarePasskey
) -> None:
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


def test_answer_of_another_signer_is_rejected(registry: InMemoryRegistry, passkey: SoftwarePasskey) -> None:
    with pytest.raises(InvalidCallError, match="not signed by a passkey"):
        taken(registry, sign(suspend(), registry.key("sam")))
    with pytest.raises(InvalidMessageError):
        taken(registry, sign(suspend(), SoftwarePasskey.make(passkey.id)))
    toms = enrolled(registry, "tom")
    with pytest.raises(InvalidCallError, match="something else"):
        taken(registry, sign(suspend(iss=toms.id), toms))


@pytest.mark.parametrize("answer", [None, 1, {}, "x", "a.b.c"], ids=str)
def test_malformed_answer_is_rejected(registry: InMemoryRegistry, answer: object) -> None:
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


def test_message_that_passkeys_cannot_sign_is_no_question(
    registry: InMemoryRegistry, passkey: SoftwarePasskey
) -> None:
    command: UserSet = registry.user_set("olga", "eve")
    with pytest.raises(InvalidCallError, match="needs a key file"):
        question(registry, command)


def test_the_task_of_a_revocation_is_shown(registry: InMemoryRegistry, passkey: SoftwarePasskey) -> None:
    change = registry.give(registry.assign("sam", "deploy-bot"))
    assert change is not None
    task_id = cast(Any, change.state).task_id
    for selector, count in ((Selector(task_id=task_id), 2), (Selector(task_id=str(uuid.uuid4())), 1)):
        claims = RevocationRequest(
            iss=f"spiffe://{TD}/user/pia", aud=TD, iat=NOW_S, jti="x", kind="revocation", selector=selector, reason="x"
        )  # fmt: skip
        assert len(question(registry, claims)["evidence"]["records"]) == count


def test_connection_key_of_a_passkey_user_signs_nothing(registry: InMemoryRegistry) -> None:
    """A connection of a person with a passkey has a key of its own making. What it signed would be nobody's."""
    connection = Connection(PasskeyUser("pia", print), ClientSettings(trust_domain=TD, trust_root="x" * 43))
    package = KeyPackage("sam", "a.b.c", "a.b.c", registry.key("sam").public, {})
    signing: list[Callable[[], object]] = [
        lambda: user_keys.invite(connection, "sam"),
        lambda: user_keys.endorse(connection, package),
    ]
    for sign_it in signing:
        with pytest.raises(InvalidCallError, match="passkey"):
            sign_it()


def test_without_the_record_or_the_bundle_nobody_is_asked(
    registry: InMemoryRegistry, passkey: SoftwarePasskey
) -> None:
    with pytest.raises(InvalidCallError, match="no agent nobody"):
        question(registry, suspend(agent_id="nobody"))
    with pytest.raises(UnavailableError):
        compose("pia", suspend(), registry.directory, TrustStore(TD, "x"), evidence={})


def test_a_question_in_a_link_is_short_and_comes_back_as_it_was(
    registry: InMemoryRegistry, passkey: SoftwarePasskey
) -> None:
    asked = compose("pia", suspend(), registry.directory, registry.trust, evidence={})
    link = question_link(SIGN_ORIGIN, asked)
    packed = zlib.decompress(b64decode(link.partition("#p=")[2]), -zlib.MAX_WBITS)
    assert wrapped(packed.decode()) == asked.decode()
    assert unwrapped(asked.decode()) == packed.decode()
    as_before = b64encode(zlib.compress(asked, 9))
    assert len(link) < len(as_before) * 0.7


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ('{"a":"' + b64encode(b'{"b":1}') + '"}', 1),
        ('{"a":"' + b64encode(b'{"b":"' + b64encode('{"c":"\u00fc"}'.encode()).encode() + b'"}') + '"}', 2),
        ('{"a":"eyJhIjoxfQ=="}', 1),  # what follows is no base64url
        ('{"a":"eyJhIjoxfR"}', 0),  # its last bits belong to nothing
        ('{"a":"' + b64encode(b'{"\xff":1}') + '"}', 0),
        ('{"a":"' + b64encode(b'{"\x01":1}') + '"}', 0),
        ('{"a":"eyJ","b":"reyJhIjoxfQ"}', 1),
    ],
)  # fmt: skip
def test_unwrapped_text_wraps_to_the_same(text: str, levels: int) -> None:
    packed = unwrapped(text)
    assert packed.count(BEGIN) == packed.count(END) == levels
    assert wrapped(packed) == text


def wrapped(packed: str) -> str:
    """What the page makes of it, said once more: the innermost first."""
    innermost = re.compile(f"{BEGIN}([^{BEGIN}{END}]*){END}")
    while innermost.search(packed):
        packed = innermost.sub(lambda found: b64encode(found[1].encode()), packed)
    return packed


def test_links_lead_to_the_page_that_the_bundle_names(registry: InMemoryRegistry) -> None:
    assert sign_origin(registry.trust, NOW_S) == SIGN_ORIGIN
    assert question_link(SIGN_ORIGIN, b"{}").startswith(f"{SIGN_ORIGIN}/#p=")
    assert (
        server_link(SIGN_ORIGIN, "http://127.0.0.1:1/a&b")
        == f"{SIGN_ORIGIN}/#from=http%3A%2F%2F127.0.0.1%3A1%2Fa%26b"
    )
