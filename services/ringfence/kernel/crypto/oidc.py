"""Verification of identity tokens of external issuers (JWT, RFC 7519, by the rules of RFC 8725). It does no I/O.

External tokens go through PyJWT, which supports RSA. `ringfence.kernel.crypto.jws` is for Ringfence's own messages.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, get_args

from pydantic import ValidationError

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.base.text import visible_name
from ringfence.kernel.base.validation_problems import explain
from ringfence.kernel.crypto.claims import LEEWAY_S
from ringfence.kernel.crypto.keys import b64decode
from ringfence.messages.codes import AnyCode, Code
from ringfence.messages.trust import OidcAlgorithm, OidcKey

if TYPE_CHECKING:
    # Imported by the first token: many programs that import this module never see one.
    import jwt

ALGORITHMS: tuple[str, ...] = get_args(OidcAlgorithm)
MAX_TOKEN_BYTES = 16 * 1024
MAX_KEYS = 32
_MIN_RSA_BITS = 2048
_TYPES = (None, "JWT", "JOSE")
"""Values of `typ` that an identity token may have. An access token says `at+jwt` (RFC 9068)."""
_USUAL: dict[tuple[Any, Any], OidcAlgorithm] = {
    ("RSA", None): "RS256",
    ("EC", "P-256"): "ES256",
    ("OKP", "Ed25519"): "EdDSA",
}
"""The default algorithm by key type and curve, for keys that name none."""


class TokenError(RingfenceError):
    """Raised when an identity token is invalid. `code` says why; the message never holds the token."""

    def __init__(self, message: str, *, code: AnyCode) -> None:
        super().__init__(message, code=code)


class JwksError(RingfenceError):
    """Raised when a JWK set (RFC 7517 5) is malformed, or has no key that may verify identity tokens."""

    code = Code.JWKS_INVALID


@dataclass(frozen=True, slots=True)
class IdentityToken:
    issuer: str
    subject: str
    issued_at_s: int
    expires_at_s: int
    kid: str
    """The key of the issuer that verified the token."""
    digest: str
    """SHA-256 (hex) of the signed part, by which the token is remembered.

    The whole text would not do: an ECDSA signature has a second valid form.
    """
    claims: Mapping[str, Any]


def unverified_issuer(token: str) -> str:
    """Return the unverified `iss` of a token. It may serve to find the keys for verification, never to decide.

    Raises TokenError (`token_malformed`) if there is none.
    """
    issuer = _unverified(token, 1).get("iss")
    if not isinstance(issuer, str):
        raise TokenError("the token has no `iss`", code=Code.TOKEN_MALFORMED)
    return issuer


def unverified_kid(token: str) -> str:
    """Return the unverified `kid` of a token. Raises TokenError (`token_malformed`)."""
    kid = _unverified(token, 0).get("kid")
    if not isinstance(kid, str) or not kid:
        raise TokenError("the token does not name its key (`kid`)", code=Code.TOKEN_MALFORMED)
    return kid


def verify_token(
    token: str,
    keys: Sequence[OidcKey],
    *,
    issuer: str,
    audience: str | tuple[str, ...],
    at_s: float,
    max_age_s: int,
    leeway_s: int = LEEWAY_S,
) -> IdentityToken:
    """Verify a token and return its claims.

    Args:
        token: a JWS in compact serialisation.
        keys: the keys of the issuer.
        issuer: the exact value that `iss` must have.
        audience: the only value that `aud` may have. A token that is for others too may come from one of them. Of
            several given here any one is accepted.
        at_s: the time to verify at (seconds since 1970). For a token that came by Kafka it is the append time.
        max_age_s: the greatest age since `iat`, whatever `exp` says.
        leeway_s: the greatest clock skew of the issuer.

    Raises:
        TokenError: `token_malformed`, `alg_not_allowed`, `key_unknown`, `signature_invalid`, `iss_unexpected`,
            `aud_unexpected`, `expired`, `not_yet_valid`, `iat_in_future` or `too_old`.
    """
    header, kid = _header(token), unverified_kid(token)
    key = next((key for key in keys if key.kid == kid), None)
    if key is None:
        raise TokenError(
            f"{issuer} has no key {visible_name(kid[:80])!r} that is known here", code=Code.KEY_UNKNOWN
        )
    if header.get("alg") != key.alg:
        raise TokenError(
            f"alg is {str(header.get('alg'))[:16]!r}, that of the key is {key.alg}", code=Code.ALG_NOT_ALLOWED
        )
    import jwt

    try:
        payload = jwt.PyJWS().decode_complete(token, _public_key(key), algorithms=[key.alg])["payload"]
        claims = json_object(payload)
    except jwt.InvalidSignatureError:
        raise TokenError(
            f"the signature is not by key {visible_name(kid[:80])} of {issuer}", code=Code.SIGNATURE_INVALID
        ) from None
    except (jwt.PyJWTError, JwksError, ValueError):
        raise TokenError("not a JWT that can be read in one way only", code=Code.TOKEN_MALFORMED) from None
    _check_parties(claims, issuer, audience)
    issued, ends = _check_times(claims, at_s, max_age_s, leeway_s)
    subject = claims.get("sub")
    if not isinstance(subject, str) or not subject:
        raise TokenError("the token has no `sub`", code=Code.TOKEN_MALFORMED)
    return IdentityToken(
        issuer, subject, int(issued), int(ends), kid, digest(token.rpartition(".")[0]), claims
    )


def _check_parties(claims: Mapping[str, Any], issuer: str, audience: str | tuple[str, ...]) -> None:
    """Check `iss` and `aud`. Raises TokenError."""
    if claims.get("iss") != issuer:
        raise TokenError(
            f"iss is {str(claims.get('iss'))[:200]!r}, expected {issuer!r}", code=Code.ISS_UNEXPECTED
        )
    accepted = (audience,) if isinstance(audience, str) else audience
    presented = claims.get("aud")
    if isinstance(presented, list) and len(presented) == 1:
        (presented,) = presented
    if not isinstance(presented, str) or presented not in accepted:
        raise TokenError(
            f"aud is {str(presented)[:200]!r}; ask for a token for {accepted[0]!r} alone",
            code=Code.AUD_UNEXPECTED,
        )


def _check_times(
    claims: Mapping[str, Any], at_s: float, max_age_s: int, leeway_s: int
) -> tuple[float, float]:
    """Return `iat` and `exp`. Raises TokenError unless the token is in force at `at_s`, and young enough."""
    issued, ends = _moment(claims, "iat"), _moment(claims, "exp")
    if at_s >= ends + leeway_s:
        raise TokenError(f"expired {at_s - ends:.0f} s ago; get a new one", code=Code.EXPIRED)
    if issued > at_s + leeway_s:
        raise TokenError(f"iat lies {issued - at_s:.0f} s ahead; compare the clocks", code=Code.IAT_IN_FUTURE)
    if "nbf" in claims and _moment(claims, "nbf") > at_s + leeway_s:
        raise TokenError("nbf lies ahead; compare the clocks, or wait", code=Code.NOT_YET_VALID)
    if at_s - issued > max_age_s + leeway_s:
        raise TokenError(
            f"issued {at_s - issued:.0f} s ago, and may be {max_age_s} s old; get a new one",
            code=Code.TOO_OLD,
        )
    return issued, ends


def _moment(claims: Mapping[str, Any], name: str) -> float:
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise TokenError(f"the token has no `{name}` that is a time", code=Code.TOKEN_MALFORMED)
    return value


def _header(token: str) -> dict[str, Any]:
    header = _unverified(token, 0)
    if "crit" in header or "b64" in header:
        raise TokenError(
            "its header asks for what is not understood here (crit, b64)", code=Code.TOKEN_MALFORMED
        )
    typ = header.get("typ")
    if (typ.upper() if isinstance(typ, str) else typ) not in _TYPES:
        raise TokenError(f"typ is {str(typ)[:40]!r}: this is no identity token", code=Code.TOKEN_MALFORMED)
    if header.get("alg") not in ALGORITHMS:
        raise TokenError(
            f"alg is {str(header.get('alg'))[:16]!r}; it may be {', '.join(ALGORITHMS)}",
            code=Code.ALG_NOT_ALLOWED,
        )
    return header


def _unverified(token: str, part: int) -> dict[str, Any]:
    if len(token) > MAX_TOKEN_BYTES:
        raise TokenError(
            f"a token of {len(token)} bytes; the limit is {MAX_TOKEN_BYTES}", code=Code.TOKEN_MALFORMED
        )
    parts = token.split(".")
    try:
        if len(parts) != 3:
            raise ValueError("not three parts")
        return json_object(b64decode(parts[part]))
    except ValueError:
        raise TokenError("not a JWT in compact serialisation", code=Code.TOKEN_MALFORMED) from None


# --- keys -------------------------------------------------------------------------------------------------------------


def read_jwks(text: str | bytes) -> tuple[OidcKey, ...]:
    """Return the keys of a JWK set that may verify identity tokens. Encryption keys and unsupported kinds are skipped.

    A key that names no algorithm has the default of its type (RSA: RS256). Raises JwksError if no key is left, if two
    keys have one name, or if an RSA key is too short.
    """
    try:
        listed = json_object(text.encode() if isinstance(text, str) else text)["keys"]
        usable = [key for each in listed if (key := _usable(each)) is not None]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise JwksError('not a JWKS: it has no list "keys" of JWKs (RFC 7517, 5)') from None
    if not usable:
        raise JwksError(f"the JWKS has no key for {', '.join(ALGORITHMS)}")
    if len(usable) > MAX_KEYS:
        raise JwksError(f"the JWKS has {len(usable)} keys; the limit is {MAX_KEYS}")
    if len({key.kid for key in usable}) < len(usable):
        raise JwksError("two keys of the JWKS have one name (kid)")
    for key in usable:
        _public_key(key)
    return tuple(usable)


def _usable(jwk: dict[str, Any]) -> OidcKey | None:
    """Return a JWK as a key, or None if it has another purpose. Private members are never copied."""
    kind = (jwk.get("kty"), jwk.get("crv"))
    usual = _USUAL.get(kind)
    alg = jwk.get("alg", usual)
    if usual is None or alg not in (usual, "PS256" if usual == "RS256" else usual):
        return None
    if jwk.get("use") == "enc" or "verify" not in jwk.get("key_ops", ["verify"]):
        return None
    if not jwk.get("kid"):
        raise JwksError("a key of the JWKS has no name (kid), so that no token can name it")
    members = ("kid", "kty", "n", "e") if usual == "RS256" else ("kid", "kty", "crv", "x", "y")
    try:
        return OidcKey.model_validate({"alg": alg, **{name: jwk[name] for name in members if name in jwk}})
    except ValidationError as error:
        raise JwksError(f"a key of the JWKS is malformed: {explain(error)}") from None


def _public_key(key: OidcKey) -> jwt.PyJWK:
    import jwt
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey

    try:
        jwk = jwt.PyJWK(json.loads(key.model_dump_json(exclude_none=True)), algorithm=key.alg)
    except (jwt.PyJWTError, ValueError):
        raise JwksError(f"key {visible_name(key.kid[:80])} of the JWKS is malformed") from None
    if isinstance(jwk.key, RSAPublicKey) and jwk.key.key_size < _MIN_RSA_BITS:
        raise JwksError(
            f"key {visible_name(key.kid[:80])} of the JWKS has {jwk.key.key_size} bits; it must have {_MIN_RSA_BITS}"
        )
    return jwk
