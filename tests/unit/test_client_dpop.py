"""Proofs of possession (RFC 9449): what an agent makes, and which a resource server takes."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import httpx
import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from hypothesis import given
from hypothesis import strategies as st

from ringfence.client.agent.dpop import access_token_hash, proof, target_uri
from ringfence.client.agent.httpx_auth import BearerAuth, DpopAuth
from ringfence.client.resource_server import dpop_proofs
from ringfence.client.resource_server.dpop_proofs import (
    MAX_PROOF_BYTES,
    MAX_PROOFS,
    NONCE_LIFE_S,
    PROOF_LIFE_S,
    Nonces,
    ProofChecker,
    ProofError,
    ProofsInMemory,
)
from ringfence.client.resource_server.verifier import TokenVerifier
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode
from tests.unit.test_client_verify import AUDIENCE, ISSUER, Clock, Issuer

KEY = SigningKey.generate("spiffe://acme.example/agent/deploy-bot")
URL = "https://shop.example/env/staging/web"
TOKEN = "the.access.token"


@pytest.fixture
def clock() -> Clock:
    return Clock()


def made(clock: Clock, *, key: SigningKey = KEY, header: dict[str, Any] | None = None, **claims: Any) -> str:
    """A proof that holds, but for what is changed."""
    jwk = key.public.model_dump(exclude_none=True)
    head = {"typ": "dpop+jwt", "alg": key.alg, "jwk": jwk, **(header or {})}
    head = {name: value for name, value in head.items() if value is not ...}
    body = {
        "jti": "1", "htm": "PUT", "htu": URL, "iat": clock.now, "ath": access_token_hash(TOKEN), **claims,
    }  # fmt: skip
    body = {name: value for name, value in body.items() if value is not ...}
    text = f"{b64encode(json.dumps(head).encode())}.{b64encode(json.dumps(body).encode())}"
    return f"{text}.{b64encode(key.sign(text.encode()))}"


async def check(
    checker: ProofChecker, proof: str, *, method: str = "PUT", url: str = URL, token: str | None = TOKEN,
    thumbprint: str = KEY.kid,
) -> None:  # fmt: skip
    await checker.check(proof, method=method, url=url, access_token=token, thumbprint=thumbprint)


# --- proofs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alg", ["ES256", "EdDSA"])
async def test_a_proof_is_what_the_rfc_says_and_counts_once(clock: Clock, alg: str) -> None:
    key = SigningKey.generate(KEY.id, alg)
    one = proof(key, "put", f"{URL}?build=1#top", access_token=TOKEN, now_s=clock.now)
    header = jwt.get_unverified_header(one)
    claims = jwt.decode(one, jwt.PyJWK(header["jwk"]), algorithms=[alg])
    assert (header["typ"], header["alg"], set(header["jwk"]) & {"d"}) == ("dpop+jwt", alg, set())
    assert (claims["htm"], claims["htu"], claims["iat"]) == ("PUT", URL, clock.now)
    assert claims["ath"] == access_token_hash(TOKEN)
    assert "nonce" not in claims
    checker = ProofChecker(clock=clock)
    await check(checker, one, url=f"{URL}?build=1", thumbprint=key.kid)
    with pytest.raises(ProofError, match="came before"):
        await check(checker, one, thumbprint=key.kid)
    await check(checker, proof(key, "PUT", URL, access_token=TOKEN, now_s=clock.now), thumbprint=key.kid)


@pytest.mark.parametrize(
    "changed",
    [
        {"htm": "GET"},
        {"htm": "put"},
        {"htm": ...},
        {"htu": "https://shop.example/env/staging"},
        {"htu": "https://shop.example/env/staging/web/"},
        {"htu": "http://shop.example/env/staging/web"},
        {"htu": "https://shop.example:8443/env/staging/web"},
        {"htu": "https://evil.example/env/staging/web"},
        {"htu": "https://shop.example@evil.example/env/staging/web"},
        {"htu": "/env/staging/web"},
        {"htu": ...},
        {"ath": access_token_hash("another.access.token")},
        {"ath": ...},
        {"iat": ...},
        {"iat": "now"},
        {"iat": True},
        {"iat": 1.5},
        {"htu": "https://shop.example/env/staging/\tweb"},
        {"htu": f" {URL}"},
        {"htu": f"{URL}\n"},
        {"exp": 1},
        {"exp": None},
        {"nbf": 2**40},
        {"nbf": True},
        {"nbf": "0"},
        {"jti": ...},
        {"jti": ""},
        {"jti": 1},
        {"jti": "x" * 257},
        {"header": {"typ": "JWT"}},
        {"header": {"typ": "at+jwt"}},
        {"header": {"typ": None}},
        {"header": {"typ": ...}},
        {"header": {"alg": ...}},
        {"header": {"jwk": ...}},
        {"header": {"alg": "none"}},
        {"header": {"alg": "HS256"}},
        {"header": {"alg": "EdDSA"}},
        {"header": {"crit": ["b64"]}},
        {"header": {"b64": False}},
        {"header": {"jwk": None}},
        {"header": {"jwk": {}}},
        {"header": {"jwk": {"kty": "oct", "k": "c2VjcmV0"}}},
        {"header": {"jwk": {**KEY.public.model_dump(exclude_none=True), "d": "AAAA"}}},
        {"header": {"jwk": {"kty": "EC", "crv": "P-256", "x": "AAAA", "y": "AAAA"}}},
        {"header": {"jwk": SigningKey.generate(KEY.id).public.model_dump(exclude_none=True)}},
    ],
    ids=lambda changed: re.sub(r"[\w-]{43}", "...", str(changed)),  # keys of one run,
)
async def test_proof_of_another_request_is_rejected(clock: Clock, changed: dict[str, Any]) -> None:
    checker = ProofChecker(clock=clock)
    with pytest.raises(ProofError) as refused:
        await check(checker, made(clock, **changed))
    assert refused.value.code == "invalid_dpop_proof"
    await check(checker, made(clock))  # and it used up nothing


@pytest.mark.parametrize("twice", ["htm", "jwk", "ath", "typ"])
async def test_ambiguous_proof_is_rejected(clock: Clock, twice: str) -> None:
    head, body, _ = made(clock).split(".")
    parts = [
        b64decode(part).decode().replace(f'"{twice}"', f'"{twice}": "x", "{twice}"', 1)
        for part in (head, body)
    ]
    text = ".".join(b64encode(part.encode()) for part in parts)
    with pytest.raises(ProofError):
        await check(ProofChecker(clock=clock), f"{text}.{b64encode(KEY.sign(text.encode()))}")


async def test_a_proof_is_for_one_token_by_its_own_key(clock: Clock) -> None:
    checker = ProofChecker(clock=clock)
    with pytest.raises(ProofError, match="another token"):
        await check(checker, made(clock), token="another.access.token")
    with pytest.raises(ProofError, match="another key"):
        await check(checker, made(clock, key=SigningKey.generate(KEY.id)))
    for garbage in ("", "a.b", "a.b.c", "a.b.c.d", made(clock)[:-4] + "AAAA", "é.é.é", "." * 3):
        with pytest.raises(ProofError):
            await check(checker, garbage)
    with pytest.raises(ProofError, match="longer"):
        await check(checker, "x" * (MAX_PROOF_BYTES + 1))


@pytest.mark.parametrize(("ath", "counts"), [(..., True), (access_token_hash(TOKEN), False), (None, False)])
async def test_a_proof_for_a_request_without_token_has_no_ath(clock: Clock, ath: Any, counts: bool) -> None:
    with contextlib.nullcontext() if counts else pytest.raises(ProofError, match="leave ath out"):
        await check(ProofChecker(clock=clock), made(clock, ath=ath), token=None)


async def test_a_proof_of_the_longest_length_and_with_the_longest_id_counts(clock: Clock) -> None:
    padding = (MAX_PROOF_BYTES - len(made(clock, pad=""))) * 3 // 4
    proofs = [made(clock, pad="x" * (padding + more)) for more in range(-3, 4)]
    (longest,) = [one for one in proofs if len(one) == MAX_PROOF_BYTES]
    await check(ProofChecker(clock=clock), longest)
    await check(ProofChecker(clock=clock), made(clock, jti="x" * 256))


class Remembered:
    """A memory of others, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, int, int]] = []

    async def remember(self, id: str, *, key: str, until_s: int, now_s: int) -> bool:
        self.asked.append((id, key, until_s, now_s))
        return True


async def test_a_memory_is_given_one_id_for_each_key_and_jti_until_the_proof_is_over(clock: Clock) -> None:
    memory, other = Remembered(), SigningKey.generate(KEY.id)
    checker = ProofChecker(memory=memory, clock=clock)
    for key, jti in ((KEY, "1"), (KEY, "1"), (KEY, "2"), (other, "1")):
        await check(checker, made(clock, key=key, jti=jti, iat=clock.now - 5), thumbprint=key.kid)
    assert [one[1:] for one in memory.asked] == [
        (key.kid, clock.now - 5 + PROOF_LIFE_S, clock.now) for key in (KEY, KEY, KEY, other)
    ]
    first, again, *others = [one[0] for one in memory.asked]
    assert first == again
    assert len({first, *others}) == 3


def test_limits_of_proofs_and_nonces() -> None:
    assert (PROOF_LIFE_S, NONCE_LIFE_S, MAX_PROOF_BYTES, MAX_PROOFS) == (60, 300, 8192, 200_000)


async def test_a_proof_is_of_the_last_minute(clock: Clock) -> None:
    checker = ProofChecker(clock=clock)
    for n, age_s in enumerate((PROOF_LIFE_S - 1, 0, -LEEWAY_S)):
        await check(checker, made(clock, iat=clock.now - age_s, jti=f"good-{n}"))
    for n, age_s in enumerate((PROOF_LIFE_S, 10**9, -LEEWAY_S - 1)):
        with pytest.raises(ProofError, match="clock"):
            await check(checker, made(clock, iat=clock.now - age_s, jti=f"bad-{n}"))


async def test_without_a_clock_the_age_of_a_proof_is_by_the_clock_of_the_machine(clock: Clock) -> None:
    checker = ProofChecker()
    now_s = SystemClock().now_ms() // 1000
    await check(checker, made(clock, iat=now_s))
    with pytest.raises(ProofError, match="clock"):
        await check(checker, made(clock, iat=now_s - 2 * PROOF_LIFE_S, jti="2"))


@pytest.mark.parametrize(
    ("claim", "from_now_s", "counts"),
    [
        ("nbf", LEEWAY_S, True),
        ("nbf", LEEWAY_S + 1, False),
        ("exp", 1, True),
        ("exp", 0, False),
    ],
)
async def test_a_proof_counts_from_its_nbf_until_its_exp(
    clock: Clock, claim: str, from_now_s: int, counts: bool
) -> None:
    claims: dict[str, Any] = {claim: clock.now + from_now_s}
    one = made(clock, **claims)
    with contextlib.nullcontext() if counts else pytest.raises(ProofError, match="not to count yet"):
        await check(ProofChecker(clock=clock), one)


@pytest.mark.parametrize(
    ("age_s", "counts"),
    [(NONCE_LIFE_S - 1, True), (NONCE_LIFE_S, False), (-LEEWAY_S, True), (-LEEWAY_S - 1, False)],
)
def test_a_nonce_counts_for_its_life_and_the_leeway_of_clocks(age_s: int, counts: bool) -> None:
    nonces = Nonces()
    assert nonces.counts(nonces.fresh(10_000), 10_000 + age_s) is counts


async def test_a_proof_does_not_come_again_as_long_as_its_time_counts(clock: Clock) -> None:
    checker = ProofChecker(clock=clock)
    early = made(clock, iat=clock.now + LEEWAY_S)
    await check(checker, early)
    for _ in range(PROOF_LIFE_S + LEEWAY_S + 5):
        clock.now += 1
        with pytest.raises(ProofError):
            await check(checker, early)


async def test_a_memory_that_is_full_takes_no_more_and_forgets_what_is_over(clock: Clock) -> None:
    checker = ProofChecker(memory=ProofsInMemory(limit=6), clock=clock)
    for n in range(3):
        await check(checker, made(clock, jti=str(n)))
    with pytest.raises(UnavailableError):
        await check(checker, made(clock, jti="3"))
    with pytest.raises(ProofError, match="came before"):
        await check(checker, made(clock, jti="0"))
    clock.now += PROOF_LIFE_S
    await check(checker, made(clock, jti="0"))


async def test_flood_of_one_key_leaves_room_for_proofs_of_others() -> None:
    memory = ProofsInMemory(limit=1000)

    async def fill(key: str, now_s: int = 50) -> int:
        taken = 0
        with contextlib.suppress(UnavailableError):
            while await memory.remember(f"{key} {taken}", key=key, until_s=now_s + 50, now_s=now_s):
                taken += 1
        return taken

    taken = [await fill(f"greedy-{number}") for number in range(5)]
    assert taken[0] == 500
    assert all(taken)
    assert await memory.remember("one", key="modest", until_s=100, now_s=50)
    assert await memory.remember("other", key="modest", until_s=150, now_s=100)
    assert await fill("greedy-0", now_s=100) == 500, "what is over takes no room"


# --- nonces -----------------------------------------------------------------------------------------------------------


async def test_a_nonce_counts_for_a_while_where_it_was_made(clock: Clock) -> None:
    nonces = Nonces()
    checker = ProofChecker(nonces=nonces, clock=clock)
    own = checker.nonce()
    for wrong in (..., None, 1, "", "x", "AAAA", Nonces().fresh(clock.now), f"{own}A"):
        with pytest.raises(ProofError) as refused:
            await check(checker, made(clock, nonce=wrong))
        assert refused.value.code == "use_dpop_nonce"
    clock.now += NONCE_LIFE_S - 1
    await check(checker, made(clock, nonce=own))
    clock.now += 1
    with pytest.raises(ProofError):
        await check(checker, made(clock, nonce=own, jti="2"))
    assert ProofChecker(clock=clock).nonce() is None


async def test_nonce_of_an_earlier_process_is_rejected(clock: Clock) -> None:
    nonces = Nonces()
    sent = made(clock, nonce=nonces.fresh(clock.now))
    await check(ProofChecker(clock=clock, nonces=nonces), sent)
    with pytest.raises(ProofError) as refused:
        await check(ProofChecker(clock=clock, nonces=Nonces()), sent)
    assert refused.value.code == "use_dpop_nonce"


def test_servers_with_one_secret_take_each_others_nonces() -> None:
    secret = b"s" * 32
    assert Nonces(secret).counts(Nonces(secret).fresh(1000), 1000)
    assert not Nonces(b"t" * 32).counts(Nonces(secret).fresh(1000), 1000)


# --- URLs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spelling",
    [
        "https://shop.example/env/staging/web?q=1",
        "https://shop.example/env/staging/web#x",
        "HTTPS://SHOP.example:443/env/staging/web",
        "https://shop.example/%65nv/staging/we%62",
    ],
)
def test_spellings_of_one_url(spelling: str) -> None:
    assert target_uri(spelling) == URL


def test_urls_that_differ() -> None:
    assert target_uri("http://shop.example") == "http://shop.example/"
    assert target_uri("http://[::1]:8080/x") == "http://[::1]:8080/x"
    assert target_uri("https://shop.example/a%2fb") == "https://shop.example/a%2Fb"
    assert target_uri("https://shop.example/A") != target_uri("https://shop.example/a")
    for wrong in (
        "", "/x", "shop.example/x", "ftp://shop.example/x", "https://", "https://a:b@shop.example/", "https://shop:x/",
        "https://shop.example/a/../b", "https://shop.example/a/%2e%2E/b", "https://shop.example/./b",
    ):  # fmt: skip
        with pytest.raises(ValueError):
            target_uri(wrong)


async def test_ever_new_urls_and_keys_take_no_more_than_a_fixed_number_of_cache_entries(clock: Clock) -> None:
    checker = ProofChecker(clock=clock)
    for number in range(1100):
        one = made(clock, header={"n": number}, htu=f"{URL}/{number}", jti=str(number))
        await check(checker, one, url=f"{URL}/{number}")
    for cached in (dpop_proofs._target_uri, dpop_proofs._proof_key):
        assert cached.cache_info().currsize == 1024


@given(st.text(alphabet="aZ09-._~%/é日 ", max_size=30))
def test_the_one_form_of_a_url_is_its_own(path: str) -> None:
    try:
        uri = target_uri(f"https://shop.example/{path}")
    except ValueError:
        return
    assert target_uri(uri) == uri


# --- httpx ------------------------------------------------------------------------------------------------------------


async def test_each_request_has_a_proof_of_its_own_and_the_nonce_that_was_given_last(clock: Clock) -> None:
    """Against a server that wants nonces, and changes them."""
    nonces = Nonces()
    checker = ProofChecker(nonces=nonces, clock=clock)
    seen: list[str] = []

    async def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.headers["DPoP"])
        headers = {"DPoP-Nonce": str(checker.nonce())}
        try:
            await check(checker, seen[-1], method=request.method, url=str(request.url))
        except ProofError as error:
            challenge = f'DPoP error="{error.code}", algs="ES256"'
            return httpx.Response(401, headers={**headers, "WWW-Authenticate": challenge})
        assert request.headers["Authorization"] == f"DPoP {TOKEN}"
        return httpx.Response(200, headers=headers, content=request.content)

    auth = DpopAuth(TOKEN, KEY, clock=clock)
    async with httpx.AsyncClient(transport=httpx.MockTransport(answer), auth=auth) as http:
        for tries in (2, 1, 1):  # the first learns that a nonce is wanted
            seen.clear()
            response = await http.put(f"{URL}?x=1", content=b"body")
            assert (response.status_code, response.content, len(seen)) == (200, b"body", tries)
        clock.now += NONCE_LIFE_S
        seen.clear()
        assert (await http.get(URL)).status_code == 200
        assert len(set(seen)) == 2


async def test_a_refusal_that_asks_for_no_nonce_is_not_tried_again() -> None:
    tries: list[str] = []

    def answer(request: httpx.Request) -> httpx.Response:
        tries.append(request.headers["Authorization"])
        challenge = 'DPoP error="invalid_token"'
        return httpx.Response(401, headers={"DPoP-Nonce": "x", "WWW-Authenticate": challenge})

    async with httpx.AsyncClient(transport=httpx.MockTransport(answer)) as http:
        assert (await http.get(URL, auth=DpopAuth(TOKEN, KEY))).status_code == 401
        assert (await http.get(URL, auth=BearerAuth(TOKEN))).status_code == 401
    assert tries == [f"DPoP {TOKEN}", f"Bearer {TOKEN}"]


def test_a_p256_key_of_somebody_else_proves_nothing() -> None:
    """The thumbprint is of the key that signed, not of one that the header names beside it."""
    other = ec.generate_private_key(ec.SECP256R1())
    forged = jwt.encode(
        {"htm": "PUT"}, other, algorithm="ES256",
        headers={"typ": "dpop+jwt", "jwk": KEY.public.model_dump(exclude_none=True)},
    )  # fmt: skip
    checker = ProofChecker()
    with pytest.raises(ProofError, match="does not verify"):
        checker._verify_signature(forged, KEY.kid)


# --- requests ---------------------------------------------------------------------------------------------------------


async def test_servers_that_share_a_memory_take_a_proof_once(clock: Clock) -> None:
    issuer, memory = Issuer(), ProofsInMemory()
    async with httpx.AsyncClient(transport=httpx.ASGITransport(issuer.app())) as http:
        one, other = (
            TokenVerifier(ISSUER, AUDIENCE, http=http, clock=clock, proof_memory=memory) for _ in range(2)
        )
        clock.now -= 10**6  # which no machine's clock shows
        token = issuer.token(clock, cnf={"jkt": KEY.kid})
        shown = proof(KEY, "GET", URL, access_token=token, now_s=clock.now)
        headers = {"authorization": f"DPoP {token}", "dpop": shown}
        assert (await one.verify_request("GET", URL, headers)).key_thumbprint == KEY.kid
        with pytest.raises(ProofError, match="came before"):
            await other.verify_request("GET", URL, headers)
