"""Identity tokens of issuers outside: what counts, and with which code the rest is refused."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import jwt
import pytest

from ringfence.cli.main import main
from ringfence.client.admin.trust_setup import (
    CeremonyError,
    TrustFolder,
    make_trust,
    remove_oidc_issuer,
    set_oidc_issuer,
)
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.oidc import JwksError, TokenError, read_jwks, unverified_issuer, verify_token
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.trust import OidcIssuer, TrustBundle
from tests.support.oidc_tokens import TokenIssuer

TD = "acme.example"
URL = "https://login.acme.example"
NOW = 1_790_000_000


@pytest.fixture(scope="module")
def issuer() -> TokenIssuer:
    return TokenIssuer(URL)


def judge(issuer: TokenIssuer, token: str, **how: Any):
    given = {"issuer": URL, "audience": TD, "at_s": NOW, "max_age_s": 300, **how}
    return verify_token(token, given.pop("keys", issuer.keys()), **given)


@pytest.mark.parametrize("alg", ["RS256", "PS256", "ES256", "EdDSA"])
def test_a_token_says_who_it_speaks_for(alg: str) -> None:
    issuer = TokenIssuer(URL, alg)
    token = issuer.token(issuer.claims(TD, NOW, nbf=NOW, groups=["a"]))
    found = judge(issuer, token)
    assert (found.issuer, found.subject, found.kid) == (URL, "sub-1", "key-1")
    assert (found.issued_at_s, found.expires_at_s, found.claims["groups"]) == (NOW, NOW + 600, ["a"])
    assert unverified_issuer(token) == URL


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"iss": URL + "/"}, "iss_unexpected"),
        ({"iss": None}, "iss_unexpected"),
        ({"aud": "other.example"}, "aud_unexpected"),
        ({"aud": [TD, "other.example"]}, "aud_unexpected"),
        ({"aud": []}, "aud_unexpected"),
        ({"aud": None}, "aud_unexpected"),
        ({"exp": NOW - 30}, "expired"),
        ({"exp": None}, "token_malformed"),
        ({"exp": "9999999999"}, "token_malformed"),
        ({"exp": True}, "token_malformed"),
        ({"iat": NOW + 31}, "iat_in_future"),
        ({"iat": None}, "token_malformed"),
        ({"iat": NOW - 331}, "too_old"),
        ({"nbf": NOW + 31}, "not_yet_valid"),
        ({"nbf": "soon"}, "token_malformed"),
        ({"sub": ""}, "token_malformed"),
        ({"sub": 7}, "token_malformed"),
    ],
)
def test_rejected_token_has_its_code(issuer: TokenIssuer, claims: dict[str, Any], code: str) -> None:
    given = {k: v for k, v in (issuer.claims(TD, NOW) | claims).items() if v is not None}
    # PyJWT signs no claims of wrong types, and others do.
    token = jwt.PyJWS().encode(json.dumps(given).encode(), issuer.key, "RS256", headers={"kid": "key-1"})
    with pytest.raises(TokenError) as refused:
        judge(issuer, token)
    assert refused.value.code == code
    assert token not in str(refused.value)


@pytest.mark.parametrize(
    "claims", [{"exp": NOW - 29}, {"iat": NOW + 29}, {"iat": NOW - 329}, {"aud": [TD]}, {"nbf": NOW + 29}]
)
def test_clocks_may_be_a_little_off(issuer: TokenIssuer, claims: dict[str, Any]) -> None:
    assert judge(issuer, issuer.token(issuer.claims(TD, NOW) | claims)).subject == "sub-1"


def test_two_forms_of_one_signature_are_one_token() -> None:
    issuer = TokenIssuer(URL, "ES256")
    token = issuer.token(issuer.claims(TD, NOW))
    signed, _, signature = token.rpartition(".")
    raw = jwt.utils.base64url_decode(signature)
    order = 0xFFFFFFFF00000000FFFFFFFFFFFFFFFFBCE6FAADA7179E84F3B9CAC2FC632551
    mirrored = raw[:32] + (order - int.from_bytes(raw[32:])).to_bytes(32)
    twin = f"{signed}.{jwt.utils.base64url_encode(mirrored).decode()}"
    assert twin != token
    assert judge(issuer, twin).digest == judge(issuer, token).digest


def test_a_token_for_one_of_several_audiences_counts(issuer: TokenIssuer) -> None:
    assert judge(issuer, issuer.token(issuer.claims("b", NOW)), audience=("a", "b")).claims["aud"] == "b"
    with pytest.raises(TokenError, match="ask for a token for 'a'"):
        judge(issuer, issuer.token(issuer.claims("c", NOW)), audience=("a", "b"))


def test_only_the_keys_own_algorithm_verifies(issuer: TokenIssuer) -> None:
    claims = issuer.claims(TD, NOW)
    # Signed by the same key, in a way that it is not for.
    pss = jwt.encode(claims, issuer.key, algorithm="PS256", headers={"kid": "key-1"})
    # The classic: the public key as a shared secret.
    hmac = jwt.encode(claims, issuer.jwk()["n"], algorithm="HS256", headers={"kid": "key-1"})
    none = jwt.encode(claims, "", algorithm="none", headers={"kid": "key-1"})
    for token in (pss, hmac, none):
        with pytest.raises(TokenError) as refused:
            judge(issuer, token)
        assert refused.value.code == "alg_not_allowed"


def test_another_key_is_unknown_and_one_of_the_same_name_does_not_verify(issuer: TokenIssuer) -> None:
    other = TokenIssuer(URL, kid="key-2")
    with pytest.raises(TokenError) as refused:
        judge(issuer, other.token(other.claims(TD, NOW)))
    assert refused.value.code == "key_unknown"
    other.kid = "key-1"
    with pytest.raises(TokenError) as refused:
        judge(issuer, other.token(other.claims(TD, NOW)))
    assert refused.value.code == "signature_invalid"


@pytest.mark.parametrize(
    "header",
    [
        {"kid": None},
        {"typ": "at+jwt"},
        {"typ": "ringfence.user.set+jwt"},
        {"crit": ["x"], "x": 1},
        {"b64": True},
    ],
)
def test_a_header_that_says_something_else_is_refused(issuer: TokenIssuer, header: dict[str, Any]) -> None:
    head = {k: v for k, v in ({"alg": "RS256", "kid": "key-1"} | header).items() if v is not None}
    segments = [json.dumps(head), json.dumps(issuer.claims(TD, NOW))]
    text = ".".join(base64.urlsafe_b64encode(s.encode()).rstrip(b"=").decode() for s in segments)
    signature = jwt.get_algorithm_by_name("RS256").sign(text.encode(), issuer.key)
    with pytest.raises(TokenError) as refused:
        judge(issuer, f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}")
    assert refused.value.code == "token_malformed"


@pytest.mark.parametrize("payload", [b"[]", b"7", b'{"iss": 1, "iss": 2}', b"\xff", b"{" * 5000])
def test_claims_that_can_be_read_in_two_ways_are_refused(issuer: TokenIssuer, payload: bytes) -> None:
    token = jwt.PyJWS().encode(payload, issuer.key, "RS256", headers={"kid": "key-1"})
    with pytest.raises(TokenError) as refused:
        judge(issuer, token)
    assert refused.value.code == "token_malformed"


@pytest.mark.parametrize("token", ["", "a.b", "a.b.c.d", "é.é.é", "x" * 20_000])
def test_malformed_token_is_rejected(issuer: TokenIssuer, token: str) -> None:
    with pytest.raises(TokenError) as refused:
        judge(issuer, token)
    assert refused.value.code == "token_malformed"


# --- JWKS ---


def test_of_a_jwks_the_public_signing_keys_are_taken(issuer: TokenIssuer) -> None:
    plain = {k: v for k, v in issuer.jwk().items() if k not in ("alg", "use")}
    others = [
        {**issuer.jwk(), "kid": "enc", "use": "enc"},
        {**issuer.jwk(), "kid": "rs512", "alg": "RS512"},
        {"kty": "oct", "kid": "shared", "k": "c2VjcmV0"},
        {"kty": "EC", "crv": "P-521", "kid": "p521", "x": "AA", "y": "AA"},
    ]
    private = {**plain, "kid": "with-d", "d": "c2VjcmV0"}
    found = read_jwks(json.dumps({"keys": [plain, private, *others]}))
    assert [(key.kid, key.alg) for key in found] == [("key-1", "RS256"), ("with-d", "RS256")]
    assert "c2VjcmV0" not in repr(found)


@pytest.mark.parametrize(
    ("jwks", "says"),
    [
        ("", "not a JWKS"),
        ('{"keys": 3}', "not a JWKS"),
        ('{"keys": ["x"]}', "not a JWKS"),
        ('{"keys": []}', "has no key for RS256"),
        ('{"keys": [{"kty": "RSA", "n": "AQAB", "e": "AQAB"}]}', "no name"),
        ('{"keys": [{"kty": "RSA", "kid": "a", "n": "$", "e": "AQAB"}]}', "malformed"),
        ('{"keys": [{"kty": "EC", "crv": "P-256", "kid": "a", "x": 3}]}', "malformed: x"),
    ],
)
def test_a_jwks_that_cannot_be_used_says_why(jwks: str, says: str) -> None:
    with pytest.raises(JwksError, match=says):
        read_jwks(jwks)


def test_a_short_key_and_a_name_that_comes_twice_are_refused(issuer: TokenIssuer) -> None:
    with pytest.raises(JwksError, match="has 1024 bits"):
        read_jwks(TokenIssuer(URL, bits=1024).jwks())
    with pytest.raises(JwksError, match="one name"):
        read_jwks(json.dumps({"keys": [issuer.jwk(), issuer.jwk()]}))


# --- the trust bundle ---


def test_the_root_signs_whose_tokens_count(tmp_path: Path, issuer: TokenIssuer) -> None:
    folder = TrustFolder(tmp_path)
    store = TrustStore(TD, make_trust(folder, TD, "olga"))
    store.load(folder.bundle.read_text().strip(), at_s := _iat(folder))
    assert store.oidc_issuer(URL, "users", at_s) is None
    before = store.require()
    set_oidc_issuer(folder, issuer.pinned("users"))
    assert store.load(folder.bundle.read_text().strip(), at_s)
    found = store.oidc_issuer(URL, "users", at_s)
    assert found == issuer.pinned("users")
    assert store.oidc_issuer(URL, "instances", at_s) is None, "people are no instances"
    assert store.oidc_issuer(URL + "/", "users", at_s) is None
    assert store.oidc_issuer(URL, "users", store.require().exp) is None
    assert store.require().services == before.services
    # Its new keys replace the old ones.
    set_oidc_issuer(folder, TokenIssuer(URL, kid="key-2").pinned("users"))
    assert store.load(folder.bundle.read_text().strip(), at_s)
    assert [key.kid for one in store.require().oidc_issuers for key in one.keys] == ["key-2"]
    remove_oidc_issuer(folder, URL)
    assert store.load(folder.bundle.read_text().strip(), at_s)
    assert (store.require().version, store.oidc_issuer(URL, "users", at_s)) == (4, None)
    with pytest.raises(CeremonyError, match="has no issuer"):
        remove_oidc_issuer(folder, URL)


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        (OidcIssuer(issuer=URL, uses=("users",)), "either pinned keys"),
        (
            OidcIssuer.model_validate({"issuer": URL, "uses": ("users",), "user-suffix": "@x"}),
            'did you mean "user_suffix"?',
        ),
        (OidcIssuer(issuer=URL, uses=("users", "instances"), discovery=True), "are pinned"),
        (OidcIssuer(issuer="http://10.0.0.1", uses=("instances",), discovery=True), "goes by HTTPS"),
    ],
)
def test_an_issuer_that_nothing_could_be_verified_of_is_not_signed(
    tmp_path: Path, wanted: OidcIssuer, says: str
) -> None:
    make_trust(TrustFolder(tmp_path), TD, "olga")
    with pytest.raises(CeremonyError, match=says):
        set_oidc_issuer(TrustFolder(tmp_path), wanted)
    with pytest.raises(CeremonyError, match="run: ringfence init"):
        remove_oidc_issuer(TrustFolder(tmp_path / "none"), URL)


def test_an_issuer_is_added_and_removed_by_command(
    tmp_path: Path, issuer: TokenIssuer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RINGFENCE_TRUST_DOMAIN", TD)
    folder, jwks = str(tmp_path / "trust"), tmp_path / "jwks.json"
    jwks.write_text(issuer.jwks())
    assert main(["init", "--folder", folder]) == 0
    add = ["init", "--folder", folder, "--oidc-issuer", URL]
    assert main(add) == 2
    assert main([*add, "--oidc-for", "people"]) == 2
    assert main([*add, "--oidc-for", "users"]) == 1
    assert main([*add, "--oidc-for", "users", "--jwks", str(tmp_path / "none")]) == 1
    capsys.readouterr()
    assert main([*add, "--oidc-for", "users", "--jwks", str(jwks)]) == 0
    assert f"Trust bundle 2 believes {URL} for users, by 1 pinned keys." in capsys.readouterr().out
    assert main(["init", "--folder", folder, "--remove-oidc-issuer", URL]) == 0
    assert "Trust bundle 3 believes nothing of" in capsys.readouterr().out


def _iat(folder: TrustFolder) -> int:
    return parse(folder.bundle.read_text().strip()).unverified_claims(TrustBundle).iat
