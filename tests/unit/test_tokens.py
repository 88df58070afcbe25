"""Access tokens: what they say of a lease, which key signs them, and how one key follows another."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from joserfc.jwk import RSAKey

from ringfence.backends import (
    BackendContext,
    JwtBackend,
    PostgresBackend,
    RedisBackend,
    TokenKey,
    TokenKeyError,
    TokenKeys,
    built_in,
)
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey, b64encode
from ringfence.messages.credential import Coordinates
from ringfence.messages.lease import Lease
from ringfence.messages.registry import BackendSettings, TargetRecord, TargetState
from ringfence.model.leases.lifecycle import origin_of, record_id
from tools.schemas.examples import EXAMPLES

KEY = TokenKey(SigningKey.generate("spiffe://acme.example/service/issuer"))
RSA_PRIVATE = rsa.generate_private_key(public_exponent=65537, key_size=2048)
RSA = TokenKey(RSA_PRIVATE)
AT = Coordinates(
    topic="ringfence.credential.decision.v1", partition=2, offset=41, appended_at_ms=1_790_000_000_123
)
ISSUER = "https://issuer.acme.example"


def lease(**fields: Any) -> Lease:
    claims = cast(Lease, EXAMPLES[Lease])
    jti = record_id(origin_of(claims.lease_id, AT), 1)
    return claims.model_copy(update={"status": "active", "seq": 1, "jti": jti, "cause": None, **fields})


def target(audience: str | None = None, *, keys: bool = True, **settings: Any) -> TargetState:
    state = cast(TargetRecord, EXAMPLES[TargetRecord]).state
    backend = BackendSettings.model_validate({"kind": "jwt", "audience": audience, **settings})
    return state.model_copy(update={"backend": backend, "keys": state.keys if keys else ()})


def backend(*signing: TokenKey) -> JwtBackend:
    keys = TokenKeys(signing) if signing else None
    made = built_in(BackendContext("acme.example", f"{ISSUER}/", keys))["jwt"]
    assert isinstance(made, JwtBackend)
    return made


def pem(key: rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def written(file: Path, text: bytes, mode: int = 0o600) -> Path:
    file.write_bytes(text)
    file.chmod(mode)
    return file


# --- what they say ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [KEY, RSA], ids=["ES256", "RS256"])
async def test_a_token_is_what_pyjwt_takes_for_one(key: TokenKey) -> None:
    one, there = lease(), target("https://staging.acme.example", alg=key.alg)
    made = backend(key)
    credential = await made.mint(one, there)
    options: Any = {"verify_exp": False, "verify_iat": False, "verify_nbf": False}
    claims = jwt.decode(
        credential.value, jwt.PyJWK(key.jwk()), algorithms=[key.alg], audience="https://staging.acme.example",
        issuer=ISSUER, options=options,
    )  # fmt: skip
    assert jwt.get_unverified_header(credential.value) == {"alg": key.alg, "kid": key.kid, "typ": "at+jwt"}
    assert claims == made.claims(one, there) | {
        "authorization_details": [
            {
                "type": "urn:ringfence:permission",
                "target": p.target,
                "verbs": list(p.verbs),
                "resources": list(p.resources),
            }
            for p in one.scope
        ]
    }
    assert (credential.kind, credential.token_type, credential.expires_at) == ("jwt", "Bearer", one.deadline)


def test_without_an_audience_a_token_is_for_the_targets_spiffe_id() -> None:
    assert backend(KEY).claims(lease(), target())["aud"] == "spiffe://acme.example/target/staging"


def test_a_chain_of_agents_is_nested_with_the_holder_outermost() -> None:
    claims = backend(KEY).claims(lease(act=("leaf", "middle", "root-bot")), target())
    prefix = "spiffe://acme.example/agent/"
    assert claims["act"] == {
        "sub": f"{prefix}leaf",
        "act": {"sub": f"{prefix}middle", "act": {"sub": f"{prefix}root-bot"}},
    }


async def test_a_token_is_bound_to_the_agents_key_where_the_target_demands_a_proof() -> None:
    made = backend(KEY)
    bound = await made.mint(lease(key_thumbprint="thumb"), target(dpop="required"))
    assert bound.token_type == "DPoP"
    assert made.claims(lease(key_thumbprint="thumb"), target(dpop="required"))["cnf"] == {"jkt": "thumb"}
    # RFC 9449, 7.2: with `cnf.jkt` it would be refused as a bearer token by whoever knows both kinds.
    assert made.claims(lease(key_thumbprint="thumb"), target())["cnf"] == {"kid": "thumb"}
    shown_by_a_gateway = lease(key_thumbprint="thumb", delivery="gateway")
    assert "cnf" not in made.claims(shown_by_a_gateway, target())
    for unfit in (lease(key_thumbprint=None), lease(delivery="gateway")):
        problem = made.problem(unfit, target(dpop="required"))
        assert problem is not None
        assert "only it can use one" in problem


@pytest.mark.parametrize(
    "settings",
    [{"dpop": "sometimes"}, {"dpop": True}, {"alg": "HS256"}, {"alg": "RS256"}, {"depop": "required"}],
)
def test_unsupported_token_setting_is_refused_before_minting(settings: dict[str, Any]) -> None:
    problem = backend(KEY).problem(lease(), target(**settings))
    assert problem == "Ringfence is not set up to make tokens for target staging; ask an operator"
    assert backend(KEY).problem(lease(), target()) is None


def test_a_token_can_be_recalled_where_its_target_can_ask() -> None:
    assert backend().revocability(target()) == "instant"
    assert backend().revocability(target(keys=False)) == "ttl"
    others = built_in(BackendContext("acme.example", ISSUER))
    for kind in (PostgresBackend, RedisBackend):
        assert others[kind.kind].revocability(target(keys=False)) == "session"


# --- the keys ---------------------------------------------------------------------------------------------------------


async def test_the_keys_know_the_tokens_of_each_and_no_others() -> None:
    keys, others = (
        TokenKeys([KEY], [RSA]),
        TokenKeys([TokenKey(SigningKey.generate("spiffe://acme.example/x"))]),
    )
    for key in (KEY, RSA):
        token = (await backend(key).mint(lease(), target(alg=key.alg))).value
        claims = keys.verified(token)
        assert claims is not None
        assert claims["jti"] == lease().lease_id
        assert others.verified(token) is None
        head, body, tail = token.split(".")
        forged = SigningKey.generate("spiffe://acme.example/x").sign(f"{head}.{body}".encode()).hex()
        for broken in (
            "",
            "a.b.c",
            f"{head}.{body}.",
            f"{head}.{body[:-2]}.{tail}",
            f"{head}.{body}.{forged}",
        ):
            assert keys.verified(broken) is None


def test_the_algorithm_is_the_keys() -> None:
    """A token that names the RSA key and the other algorithm, or the other way round, is of neither."""
    keys = TokenKeys([KEY, RSA])
    for key, alg in ((KEY, "RS256"), (RSA, "ES256")):
        token = jwt.encode(
            {"jti": "x"}, RSA_PRIVATE if alg == "RS256" else ec.generate_private_key(ec.SECP256R1()),
            algorithm=alg, headers={"typ": "at+jwt", "kid": key.kid},
        )  # fmt: skip
        assert keys.verified(token) is None


def test_a_token_names_the_algorithm_of_its_key() -> None:
    """One that the right key signed, and whose header says otherwise."""
    keys = TokenKeys([KEY])
    for alg, known in (("ES256", True), ("RS256", False), ("none", False)):
        header = {"typ": "at+jwt", "alg": alg, "kid": KEY.kid}
        text = f"{b64encode(json.dumps(header).encode())}.{b64encode(b'{}')}"
        signature = b64encode(KEY._pair.sign(text.encode()))
        assert (keys.verified(f"{text}.{signature}") is not None) is known


def test_one_key_of_each_algorithm_signs_and_all_are_published() -> None:
    following = TokenKey(SigningKey.generate("spiffe://acme.example/service/issuer"))
    keys = TokenKeys([KEY, RSA], [following])
    assert keys.algorithms == ("ES256", "RS256")
    assert (keys.signer("ES256"), keys.signer("RS256")) == (KEY, RSA)
    published = keys.jwks()["keys"]
    assert [key["kid"] for key in published] == [KEY.kid, RSA.kid, following.kid]
    assert all(key["use"] == "sig" and not {"d", "p", "q"} & key.keys() for key in published)
    with pytest.raises(TokenKeyError, match="RS256"):
        TokenKeys([KEY]).signer("RS256")
    with pytest.raises(TokenKeyError, match="one algorithm"):
        TokenKeys([KEY, following])
    with pytest.raises(TokenKeyError, match="twice"):
        TokenKeys([KEY], [KEY])


def test_kids_are_thumbprints() -> None:
    """RFC 7638, as another library has it."""
    assert RSAKey.import_key(pem(RSA_PRIVATE).decode()).thumbprint() == RSA.kid


def test_tokens_are_signed_with_es256_or_rs256_alone(tmp_path: Path) -> None:
    with pytest.raises(TokenKeyError, match="EdDSA"):
        TokenKey(SigningKey.generate("spiffe://acme.example/x", "EdDSA"))
    with pytest.raises(TokenKeyError, match="1024"):
        TokenKey(rsa.generate_private_key(public_exponent=65537, key_size=1024))
    with pytest.raises(TokenKeyError, match="no RSA key"):
        TokenKey.load(written(tmp_path / "p256.pem", pem(ec.generate_private_key(ec.SECP256R1()))))


def test_key_files(tmp_path: Path) -> None:
    own = SigningKey.generate("spiffe://acme.example/service/issuer")
    own.save(tmp_path / "own.json")
    assert TokenKey.load(tmp_path / "own.json").kid == own.kid
    assert TokenKey.load(written(tmp_path / "rsa.pem", pem(RSA_PRIVATE))).kid == RSA.kid
    with pytest.raises(TokenKeyError, match="chmod 600"):
        TokenKey.load(written(tmp_path / "open.pem", pem(RSA_PRIVATE), 0o640))
    with pytest.raises(TokenKeyError, match="cannot read"):
        TokenKey.load(tmp_path / "nothing.pem")
    with pytest.raises(KeyFileError, match="does not hold a private key"):
        TokenKey.load(written(tmp_path / "garbage.json", b"{}"))
    half = pem(RSA_PRIVATE)[:400]
    with pytest.raises(TokenKeyError, match="without a password") as caught:
        TokenKey.load(written(tmp_path / "half.pem", half))
    assert caught.value.__suppress_context__


async def test_a_revoker_has_no_key_and_undoes_all_the_same() -> None:
    await backend().undo(lease().lease_id, target_id="staging")
    with pytest.raises(TokenKeyError):
        await backend().mint(lease(), target())
