"""A resource server's view: which tokens it accepts, and what they allow. The issuer is a real app, in process."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ringfence.client.errors import TokenRejectedError
from ringfence.client.resource_server.verifier import TokenVerifier
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.keys import SigningKey, b64encode, public_key
from ringfence.messages.api import ApiToken

ISSUER = "http://issuer.example"
AUDIENCE = "spiffe://acme.example/target/staging"
TARGET = SigningKey.generate(AUDIENCE)


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = int(time.time())

    def now_ms(self) -> int:
        return self.now * 1000


@dataclass
class Issuer:
    """An issuer: its keys, what it says about leases, and who asked."""

    keys: dict[str, ec.EllipticCurvePrivateKey] = field(
        default_factory=lambda: {"k1": ec.generate_private_key(ec.SECP256R1())}
    )
    active: bool = True
    up: bool = True
    named: str = ISSUER
    key_fetches: int = 0
    askers: list[str] = field(default_factory=list)

    def app(self) -> Starlette:
        def jwk(kid: str, key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            fields = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(key.public_key()))
            return {**fields, "kid": kid, "alg": "ES256", "use": "sig"}

        async def discovery(_: Request) -> Response:
            document = {
                "issuer": self.named,
                "jwks_uri": f"{ISSUER}/jwks",
                "introspection_endpoint": f"{ISSUER}/oauth2/introspect",
            }
            return JSONResponse(document, status_code=200 if self.up else 503)

        async def jwks(_: Request) -> Response:
            self.key_fetches += 1
            alien = {"kty": "oct", "k": "c2VjcmV0", "kid": "hs"}
            return JSONResponse({"keys": [alien, *(jwk(kid, key) for kid, key in self.keys.items())]})

        async def introspect(request: Request) -> Response:
            bearer = request.headers["authorization"].removeprefix("Bearer ")
            claims = verify(
                parse(bearer),
                ApiToken,
                lambda iss, kid: public_key(TARGET.public),
                audience="acme.example/issuer",
            ).claims
            assert claims.exp - claims.iat <= 60
            self.askers.append(claims.iss)
            return JSONResponse(
                {"active": self.active and bool(parse_qs((await request.body()).decode())["token"])}
            )

        return Starlette(
            routes=[
                Route("/.well-known/openid-configuration", discovery),
                Route("/jwks", jwks),
                Route("/oauth2/introspect", introspect, methods=["POST"]),
            ]
        )

    def token(
        self, clock: Clock, *, kid: str = "k1", typ: str = "at+jwt", drop: str = "", **claims: Any
    ) -> str:
        body: dict[str, Any] = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": "spiffe://acme.example/agent/deploy-bot",
            "jti": "6f1c0a4e-0000-5000-8000-000000000001",
            "iat": clock.now,
            "exp": clock.now + 300,
            "task": "5d3c4c1e-9b0a-5f0e-8a49-0e7d6a1c2b3a",
            "sponsor": "sam",
            "on_behalf_of": "maria",
            "authorization_details": [
                {
                    "type": "urn:ringfence:permission",
                    "target": "staging",
                    "verbs": ["deploy"],
                    "resources": ["env/staging/*"],
                }
            ],
            **claims,
        }
        body.pop(drop, None)
        return jwt.encode(body, self.keys[kid], algorithm="ES256", headers={"kid": kid, "typ": typ})


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def issuer() -> Issuer:
    return Issuer()


@pytest.fixture
async def http(issuer: Issuer) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(transport=httpx.ASGITransport(issuer.app())) as client:
        yield client


@pytest.fixture
def verifier(http: httpx.AsyncClient, clock: Clock) -> TokenVerifier:
    return TokenVerifier(ISSUER, AUDIENCE, http=http, clock=clock)


async def test_a_good_token_says_who_for_whom_and_what(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    token = await verifier.verify_header(f"Bearer {issuer.token(clock)}")
    assert token.agent == "spiffe://acme.example/agent/deploy-bot"
    assert (token.sponsor, token.on_behalf_of, token.key_thumbprint) == ("sam", "maria", None)
    assert token.allows("deploy", "env/staging/web")
    for verb, resource in [
        ("read", "env/staging/web"),
        ("deploy", "env/production/web"),
        ("deploy", "env/staging/a/b"),
        ("deploy", "env/staging/*"),  # a wildcard is no resource
        ("deploy", "env/staging/../production/web"),
        ("deploy", "env/staging/%2e%2e"),
        ("DEPLOY", "env/staging/web"),
    ]:
        assert not token.allows(verb, resource), (verb, resource)
    with pytest.raises(TokenRejectedError) as refused:
        token.require("deploy", "env/production/web")
    assert refused.value.code == "insufficient_scope"


async def test_a_permission_with_an_unknown_limit_allows_nothing(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    limited = {
        "type": "urn:ringfence:permission", "target": "staging", "verbs": ["deploy"], "resources": ["**"],
        "only_on": "sundays",
    }  # fmt: skip
    token = await verifier.verify(issuer.token(clock, authorization_details=[limited]))
    assert not token.allows("deploy", "env/staging/web")


async def test_permissions_of_another_type_allow_nothing(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    other = {"type": "urn:other", "target": "staging", "verbs": ["deploy"], "resources": ["**"]}
    token = await verifier.verify(issuer.token(clock, authorization_details=[other]))
    assert token.permissions == ()
    assert not token.allows("deploy", "env/staging/web")


@pytest.mark.parametrize(
    "changed",
    [
        {"aud": "spiffe://acme.example/target/production"},
        {"iss": "http://elsewhere.example"},
        {"typ": "JWT"},
        {"typ": "ringfence.lease+jwt"},
        {"exp": 1},
        {"exp": "2999-01-01"},
        {"iat": 2**40},
        {"drop": "exp"},
        {"drop": "jti"},
        {"drop": "task"},
        {"on_behalf_of": ""},
        {"sponsor": None},
        {"authorization_details": [{"type": "urn:ringfence:permission", "target": "staging"}]},
        {"authorization_details": ["all"]},
        {"cnf": {"jkt": "bound-to-a-key"}},
        {"cnf": {"x5t#S256": "bound-to-a-certificate"}},
        {"cnf": {"kid": "a-key", "x5t#S256": "bound-to-a-certificate"}},
        {"cnf": {"kid": ""}},
        {"cnf": {}},
        {"cnf": None},
    ],
    ids=str,
)
async def test_token_for_another_audience_issuer_or_time_is_rejected(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock, changed: dict[str, Any]
) -> None:
    with pytest.raises(TokenRejectedError):
        await verifier.verify(issuer.token(clock, **changed))


async def test_a_token_ends_at_its_exp_to_the_second(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    token = issuer.token(clock)
    clock.now += 299
    await verifier.verify(token)
    clock.now += 1
    with pytest.raises(TokenRejectedError, match="expired"):
        await verifier.verify(token)


@pytest.mark.parametrize("alg", ["none", "HS256"])
async def test_the_algorithm_is_not_the_tokens_to_choose(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock, alg: str
) -> None:
    body = jwt.decode(issuer.token(clock), options={"verify_signature": False})
    forged = jwt.encode(
        body, "secret-secret-secret-secret-secret" if alg == "HS256" else "", algorithm=alg,
        headers={"kid": "hs", "typ": "at+jwt"},
    )  # fmt: skip
    with pytest.raises(TokenRejectedError):
        await verifier.verify(forged)


async def test_a_token_names_the_algorithm_of_its_key(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    """One that the right key signed, and whose header says otherwise."""
    body = issuer.token(clock).split(".")[1]
    for alg, good in (("ES256", True), ("RS256", False)):
        header = {"typ": "at+jwt", "alg": alg, "kid": "k1"}
        text = f"{b64encode(json.dumps(header).encode())}.{body}"
        signature = jwt.algorithms.ECAlgorithm(hashes.SHA256).sign(text.encode(), issuer.keys["k1"])
        token = f"{text}.{b64encode(signature)}"
        if good:
            await verifier.verify(token)
        else:
            with pytest.raises(TokenRejectedError):
                await verifier.verify(token)


async def test_a_changed_token_is_rejected(verifier: TokenVerifier, issuer: Issuer, clock: Clock) -> None:
    head, _, signature = issuer.token(clock).split(".")
    body = issuer.token(clock, sub="spiffe://acme.example/agent/other").split(".")[1]
    with pytest.raises(TokenRejectedError):
        await verifier.verify(f"{head}.{body}.{signature}")


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Basic abc", "Bearer not.a.jwt", "Bearer x"]
)
async def test_headers_without_a_token(verifier: TokenVerifier, header: str | None) -> None:
    with pytest.raises(TokenRejectedError):
        await verifier.verify_header(header)


async def test_keys_are_cached_and_a_new_one_is_found(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    for _ in range(3):
        await verifier.verify(issuer.token(clock))
    assert issuer.key_fetches == 1
    issuer.keys["k2"] = ec.generate_private_key(ec.SECP256R1())
    clock.now += 11
    await verifier.verify(issuer.token(clock, kid="k2"))
    assert issuer.key_fetches == 2


async def test_unknown_keys_do_not_make_every_call_ask_the_issuer(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    stranger = Issuer()
    stranger.keys = {"strange": stranger.keys["k1"]}
    for _ in range(5):
        with pytest.raises(TokenRejectedError, match="publishes no key"):
            await verifier.verify(stranger.token(clock, kid="strange"))
    assert issuer.key_fetches == 1


async def test_a_key_that_was_withdrawn_is_forgotten(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    await verifier.verify(issuer.token(clock))
    clock.now += 301
    token = issuer.token(clock)
    issuer.keys = {"k2": ec.generate_private_key(ec.SECP256R1())}
    with pytest.raises(TokenRejectedError, match="publishes no key"):
        await verifier.verify(token)


async def test_introspection_cuts_a_token_that_is_not_old(
    http: httpx.AsyncClient, issuer: Issuer, clock: Clock
) -> None:
    verifier = TokenVerifier(ISSUER, AUDIENCE, TARGET, http=http, clock=clock)
    token = issuer.token(clock)
    await verifier.verify(token)
    assert issuer.askers == [AUDIENCE]
    issuer.active = False
    with pytest.raises(TokenRejectedError) as refused:
        await verifier.verify(token)
    assert refused.value.code == "inactive"


async def test_an_issuer_that_does_not_answer_lets_nothing_pass(
    http: httpx.AsyncClient, issuer: Issuer, clock: Clock
) -> None:
    verifier = TokenVerifier(ISSUER, AUDIENCE, TARGET, http=http, clock=clock)
    token = issuer.token(clock)
    issuer.up = False
    with pytest.raises(UnavailableError):
        await verifier.verify(token)


async def test_another_issuers_discovery_is_not_believed(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    issuer.named = "http://elsewhere.example"
    with pytest.raises(UnavailableError, match="elsewhere"):
        await verifier.verify(issuer.token(clock))


# --- what a token says ------------------------------------------------------------------------------------------------


async def test_a_token_is_read_whole(verifier: TokenVerifier, issuer: Issuer, clock: Clock) -> None:
    chain = {
        "sub": "spiffe://acme.example/agent/deploy-bot",
        "act": {"sub": "spiffe://acme.example/agent/lead"},
    }
    token = await verifier.verify(issuer.token(clock, act=chain))
    assert token.act == ("spiffe://acme.example/agent/deploy-bot", "spiffe://acme.example/agent/lead")
    assert token.lease_id == token.claims["jti"] == "6f1c0a4e-0000-5000-8000-000000000001"
    assert token.task == token.claims["task"]
    assert token.expires_at == token.claims["exp"] == clock.now + 300
    assert token.claims["act"] == chain
    assert "authorization_details" not in repr(token), "claims may be long"
    assert (await verifier.verify(issuer.token(clock))).act == ()


@pytest.mark.parametrize(
    "changed",
    [
        {"act": {"sub": 1}}, {"act": {}}, {"act": "bot"}, {"act": {"sub": "a", "act": []}}, {"act": {"sub": ""}},
        {"sponsor": 1}, {"sponsor": ""}, {"task": None}, {"on_behalf_of": ["maria"]},
        {"authorization_details": [{"type": "urn:ringfence:permission"}]},
        {"authorization_details": [1]}, {"authorization_details": {"type": "x"}},
        {
            "authorization_details": [
                {"type": "urn:ringfence:permission", "target": "*", "verbs": ["a"], "resources": ["b"]}
            ]
        },
        {"cnf": {"kid": 1}}, {"cnf": {"jkt": 1}}, {"cnf": ["jkt"]}, {"cnf": ["x"]}, {"cnf": "x"},
    ],
)  # fmt: skip
async def test_a_token_in_another_form_is_rejected(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock, changed: dict[str, Any]
) -> None:
    with pytest.raises(TokenRejectedError) as refused:
        await verifier.verify(issuer.token(clock, **changed))
    assert refused.value.code == "invalid_token"


async def test_a_token_without_details_allows_nothing(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    for token in (
        issuer.token(clock, drop="authorization_details"), issuer.token(clock, authorization_details=None),
    ):  # fmt: skip
        assert (await verifier.verify(token)).permissions == ()


async def test_a_key_that_is_only_named_binds_nothing(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    assert (await verifier.verify(issuer.token(clock, cnf={"kid": "a-key"}))).key_thumbprint is None
    with pytest.raises(TokenRejectedError, match="DPoP"):
        await verifier.verify(issuer.token(clock, cnf={"kid": "a-key", "jkt": "j" * 43}))


# --- when it counts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["iat", "nbf"])
async def test_a_token_may_be_half_a_minute_early(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock, name: str
) -> None:
    early: dict[str, Any] = {name: clock.now + 30}
    assert (await verifier.verify(issuer.token(clock, **early))).sponsor == "sam"
    with pytest.raises(TokenRejectedError, match="not valid yet"):
        await verifier.verify(issuer.token(clock, **{**early, name: clock.now + 31}))


async def test_times_are_by_the_clock_that_is_given_and_not_the_machines(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    for moved in (-(10**7), 2 * 10**7):
        clock.now += moved
        assert (await verifier.verify(issuer.token(clock, nbf=clock.now))).sponsor == "sam"


@pytest.mark.parametrize("value", [1.5, "1", None])
@pytest.mark.parametrize("name", ["exp", "iat", "nbf"])
async def test_times_are_whole_seconds(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock, name: str, value: Any
) -> None:
    with pytest.raises(TokenRejectedError):
        await verifier.verify(issuer.token(clock, **{name: value}))


# --- how it is shown --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["bearer {}", "BEARER   {} ", "Bearer {}"])
async def test_a_header_is_read_as_http_reads_it(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock, header: str
) -> None:
    assert (await verifier.verify_header(header.format(issuer.token(clock)))).sponsor == "sam"


@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "{}", "Basic {}", "DPoP {}", "Bearer {} {}"]
)
async def test_a_token_in_another_header_is_none(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock, header: str | None
) -> None:
    token = issuer.token(clock)
    with pytest.raises(TokenRejectedError) as refused:
        await verifier.verify_header(header and header.format(token, token))
    assert refused.value.code == "invalid_token"


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({}, None),
        ({"verb": "deploy", "resource": "env/staging/web"}, None),
        ({"verb": "read", "resource": "env/staging/web"}, "insufficient_scope"),
        ({"verb": "deploy"}, "insufficient_scope"),
        ({"resource": "env/staging/web"}, "insufficient_scope"),
    ],
)
async def test_a_request_is_asked_about_its_verb_and_its_resource(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock, asked: dict[str, str], code: str | None
) -> None:
    headers = {"authorization": f"Bearer {issuer.token(clock)}"}
    if code is None:
        verified = await verifier.verify_request("GET", "https://shop.example/x", headers, **asked)
        assert verified.sponsor == "sam"
        return
    with pytest.raises(TokenRejectedError) as refused:
        await verifier.verify_request("GET", "https://shop.example/x", headers, **asked)
    assert (refused.value.code, refused.value.scheme) == (code, "Bearer")


async def test_a_bearer_token_needs_no_proof_and_is_none_with_one(
    verifier: TokenVerifier, issuer: Issuer, clock: Clock
) -> None:
    headers = {"authorization": f"DPoP {issuer.token(clock)}", "dpop": "a.b.c"}
    with pytest.raises(TokenRejectedError, match="bound to no key") as refused:
        await verifier.verify_request("GET", "https://shop.example/x", headers)
    assert (refused.value.code, refused.value.scheme) == ("invalid_token", "DPoP")


# --- whose client it is -----------------------------------------------------------------------------------------------


async def test_a_client_of_its_own_is_closed_and_one_that_was_given_is_not(http: httpx.AsyncClient) -> None:
    given, own = TokenVerifier(ISSUER, AUDIENCE, http=http), TokenVerifier(ISSUER, AUDIENCE)
    await given.close()
    assert not http.is_closed
    client = own._http
    async with own:
        opened = client.is_closed
    assert (opened, client.is_closed) == (False, True)
    assert client.timeout.connect == 5.0
    slow = TokenVerifier(ISSUER, AUDIENCE, timeout_s=9.0)
    assert slow._http.timeout.read == 9.0
    await slow.close()


async def test_without_a_clock_the_time_is_the_machines(http: httpx.AsyncClient, issuer: Issuer) -> None:
    verifier, now = TokenVerifier(ISSUER, AUDIENCE, http=http), Clock()
    assert (await verifier.verify(issuer.token(now))).sponsor == "sam"
    now.now -= 1000
    with pytest.raises(TokenRejectedError, match="expired"):
        await verifier.verify(issuer.token(now))
