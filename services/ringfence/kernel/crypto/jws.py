"""Signed messages: JWTs in JWS compact serialisation, whose `typ` header names the message (RFC 7515, 7519, 8725).

`parse` takes a JWS apart, and `verify` checks its type, issuer, audience, key, signature and times. Signing and
verifying call `cryptography` directly: PyJWT takes nearly twice the time, and this is the hottest code of the services.
A test compares the two. The checks of single claims are in `claims.py`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Generic, NamedTuple, TypeVar

import orjson
from pydantic import ValidationError

from ringfence.kernel.base.errors import InvalidMessageError, SignatureError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.base.text import visible_name, with_article
from ringfence.kernel.base.validation_problems import explain
from ringfence.kernel.crypto.claims import check_audience, check_times
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode
from ringfence.kernel.crypto.webauthn import WEBAUTHN_ALG, PasskeyKey, VerificationKey, sign_count_of
from ringfence.messages.base import Claims, typ_header
from ringfence.messages.codes import Code

C = TypeVar("C", bound=Claims)

MAX_JWS_BYTES = 512 * 1024
_MAX_REMEMBERED = 512
"""Only headers up to this length are cached. Those of Ringfence are shorter, also with the root's key; a stranger's may
have any length.
"""

KeyFinder = Callable[[str, str], VerificationKey | None]
"""Finds a verification key: takes `iss` and `kid`, returns the key if it may sign for that issuer now, else None."""


@dataclass(frozen=True, slots=True)
class _Header:
    alg: str
    kid: str
    typ: str
    jwk: dict[str, Any] | None


class UnverifiedJws(NamedTuple):
    """A parsed JWS of which nothing is verified. Use it only to find out which key may verify it."""

    compact: str
    header: _Header
    payload: bytes
    signing_input: bytes
    signature: bytes

    def unverified_claims(self, model: type[C]) -> C:
        """The claims as `model`, before verification. Use them to look up keys, never to decide.

        Raises InvalidMessageError if `typ` names another message, or if the claims do not have the shape of `model`.
        """
        if self.header.typ != typ_header(model):
            raise InvalidMessageError(
                f"typ is {self.header.typ[:80]!r}, expected {typ_header(model)!r}", code=Code.TYP_UNEXPECTED
            )
        try:
            return model.model_validate_json(self.payload)
        except ValidationError as error:
            raise InvalidMessageError(
                f"not {with_article(model.typ)}: {explain(error)}", code=Code.CLAIMS_INVALID
            ) from None

    def check_one_reading(self) -> None:
        """Check that every JSON parser reads the claims alike. For claims that a person is shown, perhaps by another
        program.

        Raises InvalidMessageError if the claims are not I-JSON (RFC 7493). With a duplicate name, for example, one
        reader would take the first value and another the last.
        """
        try:
            json_object(self.payload)
        except ValueError as error:
            raise InvalidMessageError(
                f"its claims can be read in two ways: {error}", code=Code.AMBIGUOUS
            ) from None


class Signed(NamedTuple, Generic[C]):
    """A verified message: its claims, and the exact text that was signed."""

    claims: C
    compact: str

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the compact JWS."""
        return digest(self.compact)


@lru_cache(maxsize=4096)
def _encoded_header(alg: str, kid: str, typ: str) -> bytes:
    return (
        b64encode(json.dumps({"alg": alg, "kid": kid, "typ": typ}, separators=(",", ":")).encode()).encode()
        + b"."
    )


def sign(claims: Claims, key: SigningKey, *, header_jwk: bool = False) -> str:
    """Sign `claims` with `key`, and return the compact JWS.

    `header_jwk` adds the public key to the header. Only the root signs like that.
    """
    if header_jwk:
        jwk = key.public.model_dump(exclude_none=True)
        fields = {"alg": key.alg, "kid": key.kid, "typ": typ_header(type(claims)), "jwk": jwk}
        head = b64encode(json.dumps(fields, separators=(",", ":")).encode()).encode() + b"."
        text = head + _payload(claims)
    else:
        text = signing_input(claims, key)
    return compact_jws(text, key.sign(text))


def sign_payload(model: type[Claims], payload: bytes, key: SigningKey) -> str:
    """Sign claims that are already JSON and have the shape of `model`. Returns the compact JWS."""
    text = _encoded_header(key.alg, key.kid, typ_header(model)) + b64encode(payload).encode()
    return compact_jws(text, key.sign(text))


def signing_input(claims: Claims, key: SigningKey) -> bytes:
    """The bytes that `key` has to sign. `signing_input` and `compact_jws` together are `sign` in two steps."""
    return _encoded_header(key.alg, key.kid, typ_header(type(claims))) + _payload(claims)


def compact_jws(signing_input: bytes, signature: bytes) -> str:
    return f"{signing_input.decode()}.{b64encode(signature)}"


def _payload(claims: Claims) -> bytes:
    return b64encode(claims.model_dump_json(exclude_none=True).encode()).encode()


def _header(segment: str) -> _Header:
    return _remembered_header(segment) if len(segment) <= _MAX_REMEMBERED else _decoded_header(segment)


def _decoded_header(segment: str) -> _Header:
    fields = json_object(b64decode(segment))
    if "crit" in fields or "b64" in fields:
        raise ValueError("header not understood")
    alg, kid, typ = fields.get("alg"), fields.get("kid"), fields.get("typ")
    if not (isinstance(alg, str) and isinstance(kid, str) and isinstance(typ, str)):
        raise ValueError("header lacks alg, kid or typ")
    return _Header(alg, kid, typ, fields.get("jwk"))


_remembered_header = lru_cache(maxsize=4096)(_decoded_header)


def unverified_time(jws: UnverifiedJws) -> int | None:
    """The signing time (`iat`) that a message of any shape claims, before verification; None if it has none."""
    try:
        iat = orjson.loads(jws.payload)["iat"]
    except (ValueError, KeyError, TypeError):
        return None
    return iat if isinstance(iat, int) else None


def message_digest(compact: str | bytes) -> str:
    """SHA-256 (hex) of the JWS Signing Input (RFC 7515, section 2): whether two texts are the same message.

    The whole text does not say so. An ECDSA signature (r, s) has a second form (r, n-s), which anybody can make and
    which verifies as well.
    """
    text = compact if isinstance(compact, bytes) else compact.encode()
    return digest(text.rpartition(b".")[0])


def kid_of(compact: str) -> str:
    """The `kid` of a compact JWS that was verified before; only the header is parsed.

    Raises InvalidMessageError if the header is malformed.
    """
    return _unverified_header(compact).kid


def _unverified_header(compact: str) -> _Header:
    try:
        return _header(compact.partition(".")[0])
    except (ValueError, RecursionError):
        raise InvalidMessageError("not a JWS in compact serialisation", code=Code.NOT_A_JWS) from None


def is_by_passkey(compact: str) -> bool:
    """Whether a compact JWS claims to be signed by a passkey; only the header is parsed.

    Raises InvalidMessageError if the header is malformed.
    """
    return _unverified_header(compact).alg == WEBAUTHN_ALG


def sign_count(compact: str) -> int | None:
    """The signCount that an authenticator gave with a verified message; None of messages that no passkey signed.

    For the trail alone. Raises InvalidMessageError if the message is malformed.
    """
    return sign_count_of(parse(compact).signature) if is_by_passkey(compact) else None


def parse(compact: str | bytes) -> UnverifiedJws:
    """Parse a compact JWS; nothing is verified. Raises InvalidMessageError if it is malformed or over 512 KiB."""
    if len(compact) > MAX_JWS_BYTES:
        raise InvalidMessageError(
            f"a JWS of {len(compact)} bytes; the limit is {MAX_JWS_BYTES}", code=Code.TOO_LARGE
        )
    try:
        text = compact.decode("ascii") if isinstance(compact, bytes) else compact
        head, body, tail = text.split(".")
        return UnverifiedJws(
            text,
            _header(head),
            b64decode(body),
            text[: len(head) + 1 + len(body)].encode(),
            b64decode(tail),
        )
    except (ValueError, RecursionError):
        raise InvalidMessageError("not a JWS in compact serialisation", code=Code.NOT_A_JWS) from None


def verify(
    jws: UnverifiedJws,
    model: type[C],
    find_key: KeyFinder,
    *,
    audience: str,
    appended_at_ms: int | None = None,
    verified: C | None = None,
) -> Signed[C]:
    """Verify a message, and return its claims.

    Args:
        jws: what `parse` returned.
        model: the expected message; its `typ` must be in the header.
        find_key: returns the key that may sign for an `iss`. Authority and validity of keys are decided there.
        audience: the trust domain.
        appended_at_ms: the broker's append time of the record, against which `iat`, `nbf` and `exp` are checked. None
            if the message does not expire, or if its times were checked when it was first read.
        verified: the claims that this function returned for the same text before. The signature is not verified again;
            the key's authority and the times are. An assertion of a passkey is verified each time, since it rests on
            the origins of its append time.

    Raises:
        SignatureError: the key is unknown, the algorithm is not the key's, or the signature is wrong; or a passkey
            signed what passkeys may not sign.
        ExpiredError: appended after `exp`, `exp` too far from `iat`, or `iat` or `nbf` in the broker's future; or too
            long after a passkey signed it. It is raised for verified signatures only.
        InvalidMessageError: unexpected `typ` or `aud`, or claims that do not have the shape of the message.
    """
    claims = verified or jws.unverified_claims(model)
    key = _signing_key(jws, model, claims.iss, claims.aud, find_key, audience)
    if verified is None or isinstance(key, PasskeyKey):
        _check_signature(jws, model, claims.iss, key)
    if appended_at_ms is not None:
        check_times(claims, appended_at_ms)
    if isinstance(key, PasskeyKey) and model.passkey_use == "sign":
        key.check_fresh(claims.iat)
    return Signed(claims, jws.compact)


def verify_payload(
    jws: UnverifiedJws, model: type[Claims], find_key: KeyFinder, *, audience: str
) -> dict[str, Any]:
    """Verify a message as `verify` does, and return its claims as plain JSON, without validating their shape.

    For large messages that this service itself signed: the caller checks what it needs. Raises as `verify` does.
    """
    if jws.header.typ != typ_header(model):
        raise InvalidMessageError(f"not {with_article(model.typ)}", code=Code.TYP_UNEXPECTED)
    try:
        claims: dict[str, Any] = orjson.loads(jws.payload)
        iss, aud = str(claims["iss"]), str(claims["aud"])
    except (ValueError, KeyError, TypeError):
        raise InvalidMessageError(f"not {with_article(model.typ)}", code=Code.CLAIMS_INVALID) from None
    key = _signing_key(jws, model, iss, aud, find_key, audience)
    if isinstance(key, PasskeyKey):  # its freshness is not checked here
        raise SignatureError(f"{model.typ} is verified as a service's", code=Code.PASSKEY_NOT_ALLOWED)
    _check_signature(jws, model, iss, key)
    return claims


def _signing_key(
    jws: UnverifiedJws, model: type[Claims], iss: str, aud: str, find_key: KeyFinder, audience: str
) -> VerificationKey:
    """The key that may have signed this message, by its issuer, `kid` and `alg`. Raises as `verify` does."""
    check_audience(aud, audience)
    key = find_key(iss, jws.header.kid)
    if key is None:
        raise SignatureError(
            f"no valid key {visible_name(jws.header.kid[:43])} of {visible_name(iss[:512])} may sign {model.typ}",
            code=Code.KEY_UNKNOWN,
        )
    if jws.header.alg != key.alg:
        raise SignatureError(
            f"alg is {jws.header.alg[:16]!r}, the key's is {key.alg}", code=Code.ALG_UNEXPECTED
        )
    return key


def _check_signature(jws: UnverifiedJws, model: type[Claims], iss: str, key: VerificationKey) -> None:
    if isinstance(key, PasskeyKey):
        if model.passkey_use is None:
            raise SignatureError(
                f"no passkey may sign {model.typ}; sign it with a key file", code=Code.PASSKEY_NOT_ALLOWED
            )
        problem = key.problem(jws.signature, jws.signing_input, model.passkey_use)
        if problem is not None:
            raise SignatureError(
                f"the passkey's signature of this {model.typ} by {visible_name(iss[:512])} does not verify: {problem}"
            )
    elif not key.verifies(jws.signature, jws.signing_input):
        raise SignatureError(
            f"the signature of this {model.typ} by {visible_name(iss[:512])} does not verify"
        )
