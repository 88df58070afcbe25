"""What a console may read: for a person whose passkey said so, on listed routes, as long as both still may."""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.api import CONSOLE_ROUTES, MAX_API_TOKEN_S, ApiToken, ConsoleToken, api_audience
from ringfence.messages.registry import MAX_SESSION_S, SessionStatement, UserDisable
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.records.api_access import (
    Authenticator,
    Caller,
    ForbiddenError,
    UnauthenticatedError,
)
from tests.support.in_memory_registry import TD, InMemoryRegistry
from tests.support.passkeys import ORIGINS, RP_ID, SESSION_ORIGIN, SoftwarePasskey
from tests.support.user_keys import add_key, end_key

YEAR_S = 365 * 86_400


def request(bearer: str, path: str = "/v1/inventory", method: str = "GET") -> Any:
    return SimpleNamespace(headers={"authorization": bearer}, method=method, scope={"path": path})


@dataclass
class Bench:
    """uma has a passkey, and signed in at a console of the trust bundle."""

    ledger: InMemoryRegistry
    console: SigningKey
    passkey: SoftwarePasskey
    policy: Authenticator

    @property
    def now_s(self) -> int:
        return self.ledger.clock.ms // 1000

    def statement(self, by: SigningKey | None = None, **fields: Any) -> str:
        claims = self.ledger.claims(
            SessionStatement, "uma",
            **{
                "exp": self.now_s + MAX_SESSION_S, "user_id": "uma", "console_kid": self.console.kid,
                "cookie_digest": hashlib.sha256(b"cookie").hexdigest(), **fields,
            },
        )  # fmt: skip
        return sign(claims, by or self.passkey)

    def token(self, session: str | None = None, by: SigningKey | None = None, **fields: Any) -> str:
        key = by or self.console
        claims = ConsoleToken(
            **{
                "iss": key.id, "aud": api_audience(TD, "policy"), "iat": self.now_s, "jti": f"t{time.monotonic_ns()}",
                "exp": self.now_s + MAX_API_TOKEN_S, "session": session or self.statement(), **fields,
            }
        )  # fmt: skip
        return f"Bearer {sign(claims, key)}"

    def reads(self, bearer: str, path: str = "/v1/inventory", method: str = "GET") -> Caller:
        return self.policy.authenticate(request(bearer, path, method))

    def refused(self, bearer: str) -> str:
        with pytest.raises(UnauthenticatedError) as refused:
            self.reads(bearer)
        return str(refused.value)


@pytest.fixture
def bench() -> Bench:
    ledger = InMemoryRegistry()
    ledger.organisation()
    console = SigningKey.generate(f"spiffe://{TD}/service/console")
    policy = SigningKey.generate(f"spiffe://{TD}/service/policy")
    now_s = ledger.clock.ms // 1000

    def identity(key: SigningKey, role: Any) -> ServiceIdentity:
        return ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(now_s + YEAR_S),))

    bundle = TrustBundle(
        iss=ledger.root.id, aud=TD, iat=now_s, exp=now_s + YEAR_S, jti="second", version=2, rp_id=RP_ID,
        origins=ORIGINS,
        services=(
            identity(ledger.registry, "registry"), identity(console, "console"), identity(policy, "policy"),
        ),
    )  # fmt: skip
    assert ledger.trust.load(sign(bundle, ledger.root, header_jwk=True), now_s)
    passkey = SoftwarePasskey.make(ledger.key("uma").id)
    ledger.give(add_key(ledger, "olga", "uma", passkey))
    return Bench(
        ledger,
        console,
        passkey.but(origin=SESSION_ORIGIN),
        Authenticator(ledger.directory, "policy", ledger.clock),
    )


def test_signed_in_user_reads_with_their_own_rights(bench: Bench) -> None:
    assert bench.reads(bench.token()).user.user_id == "uma"


def test_a_session_counts_for_its_hours_and_not_after(bench: Bench) -> None:
    session = bench.statement()
    bench.ledger.clock.ms += (MAX_SESSION_S - 60) * 1000
    assert bench.reads(bench.token(session)).user.user_id == "uma"
    bench.ledger.clock.ms += 120_000
    assert "refused" in bench.refused(bench.token(session))


def test_a_token_counts_once(bench: Bench) -> None:
    bearer = bench.token()
    bench.reads(bearer)
    assert "used before" in bench.refused(bearer)


def test_a_token_is_for_one_service(bench: Bench) -> None:
    assert "aud" in bench.refused(bench.token(aud=api_audience(TD, "audit")))
    assert "aud" in bench.refused(bench.token(aud=TD))


def test_a_token_lives_a_minute(bench: Bench) -> None:
    assert "lives longer" in bench.refused(bench.token(exp=bench.now_s + MAX_API_TOKEN_S + 1))


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE"])
def test_only_get_is_answered(bench: Bench, method: str) -> None:
    with pytest.raises(ForbiddenError):
        bench.reads(bench.token(), method=method)


@pytest.mark.parametrize(
    "path",
    [
        "/v1/reach",
        "/v1/decisions/x/explanation/more",
        "/access/v1/evaluation",
        "/v1/agents/a/b/usage",
        "/v1/inventory/",
    ],
)
def test_path_that_is_not_listed_is_refused(bench: Bench, path: str) -> None:
    with pytest.raises(ForbiddenError):
        bench.reads(bench.token(), path)


def test_path_that_only_the_host_header_says_is_refused(bench: Bench) -> None:
    """`request.url` of some versions of Starlette begins with the sender's `Host`, and so may its path."""
    asked = request(bench.token(), "/v1/events")
    asked.url = SimpleNamespace(path="/v1/inventory")
    with pytest.raises(ForbiddenError):
        bench.policy.authenticate(asked)


def test_a_listed_route_has_one_segment_for_each_name(bench: Bench) -> None:
    assert bench.reads(bench.token(), "/v1/agents/bot/usage").user.user_id == "uma"


def test_services_without_a_list_refuse_everything(bench: Bench) -> None:
    issuer = Authenticator(bench.ledger.directory, "issuer", bench.ledger.clock)
    assert "issuer" not in CONSOLE_ROUTES
    for path in ("", "/", "/v1/inventory"):
        with pytest.raises(ForbiddenError):
            issuer.authenticate(request(bench.token(aud=api_audience(TD, "issuer")), path))


def test_stolen_session_statement_is_useless_without_the_console_key(bench: Bench) -> None:
    session = bench.statement()
    thief = SigningKey.generate(bench.console.id)
    assert "no valid key" in bench.refused(bench.token(session, by=thief))
    # Nor as a bearer token by itself.
    assert "refused" in bench.refused(f"Bearer {session}")


def test_another_consoles_key_does_not_read_by_a_session_that_names_the_first(bench: Bench) -> None:
    session = bench.statement(console_kid=SigningKey.generate(bench.console.id).kid)
    assert "another console" in bench.refused(bench.token(session))


def test_no_other_service_reads_by_a_session(bench: Bench) -> None:
    session = bench.statement(console_kid=bench.ledger.registry.kid)
    assert "no valid key" in bench.refused(bench.token(session, by=bench.ledger.registry))


def test_the_consoles_key_by_itself_is_nobody(bench: Bench) -> None:
    claims = ApiToken(
        iss=bench.console.id, aud=api_audience(TD, "policy"), iat=bench.now_s, exp=bench.now_s + 60, jti="own"
    )
    assert "is no user" in bench.refused(f"Bearer {sign(claims, bench.console)}")


def test_a_key_file_opens_no_session(bench: Bench) -> None:
    session = bench.statement(by=bench.ledger.key("uma"))
    assert "passkey" in bench.refused(bench.token(session))


def test_statement_signed_on_the_sign_page_is_no_session(bench: Bench) -> None:
    elsewhere = bench.passkey.but(origin="http://localhost:8551")
    assert "no session origin" in bench.refused(bench.token(bench.statement(by=elsewhere)))


def test_a_session_is_of_who_signed_it(bench: Bench) -> None:
    assert "passkey" in bench.refused(bench.token(bench.statement(user_id="olga")))


def test_a_disabled_user_reads_nothing_any_more(bench: Bench) -> None:
    session = bench.statement()
    bench.reads(bench.token(session))
    bench.ledger.give(bench.ledger.claims(UserDisable, "olga", user_id="uma", reason="left"))
    assert "refused" in bench.refused(bench.token(session))


def test_an_ended_passkey_reads_nothing_any_more(bench: Bench) -> None:
    session = bench.statement()
    bench.reads(bench.token(session))
    bench.ledger.give(end_key(bench.ledger, "olga", "uma", bench.passkey.kid))
    bench.ledger.clock.ms += 2000
    assert "refused" in bench.refused(bench.token(session))


def test_a_role_that_was_taken_away_counts_at_the_next_call(bench: Bench) -> None:
    entry = bench.ledger.directory.user("uma")
    assert entry is not None
    keys = entry.state.keys
    bench.ledger.give(bench.ledger.user_set("olga", "uma", roles=("auditor",), keys=keys))
    session = bench.statement()
    assert bench.reads(bench.token(session)).sees_all
    bench.ledger.give(bench.ledger.user_set("olga", "uma", roles=(), keys=keys))
    assert not bench.reads(bench.token(session)).sees_all


def test_a_console_that_the_root_took_off_reads_nothing(bench: Bench) -> None:
    ledger, session = bench.ledger, bench.statement()
    bundle = TrustBundle(
        iss=ledger.root.id, aud=TD, iat=bench.now_s, exp=bench.now_s + YEAR_S, jti="third", version=3,
        rp_id=RP_ID, origins=ORIGINS,
        services=(
            ServiceIdentity(
                id=ledger.registry.id, roles=("registry",), keys=(ledger.registry.record(bench.now_s + YEAR_S),)
            ),
        ),
    )  # fmt: skip
    assert ledger.trust.load(sign(bundle, ledger.root, header_jwk=True), bench.now_s)
    assert "no valid key" in bench.refused(bench.token(session))
