"""Signed messages: JWTs whose `typ` names the message, in compact serialisation (RFC 7515, 7519, 8725).

Signing and verifying go straight to `cryptography`: PyJWT's path costs nearly twice the time, and this is the hottest
code there is. A test holds both against each other.
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
from ringfence.kernel.base.text import visible, visible_name, with_article
from ringfence.kernel.crypto.claims import check_audience, check_times
from ringfence.kernel.crypto.keys import PublicKey, SigningKey, b64decode, b64encode
from ringfence.messages.base import WORDS_FOR_PATTERNS, Claims, typ_header

C = TypeVar("C", bound=Claims)

MAX_JWS_BYTES = 512 * 1024
KeyFinder = Callable[[str, str], PublicKey | None]
"""(`iss`, `kid`) to the key that may speak for that signer now, or None."""


@dataclass(frozen=True, slots=True)
class _Header:
    alg: str
    kid: str
    typ: str
    jwk: dict[str, Any] | None


class UnverifiedJws(NamedTuple):
    """A JWS taken apart, nothing of it verified. Good for one thing: to find out whose key to verify it with."""

    compact: str
    header: _Header
    payload: bytes
    signing_input: bytes
    signature: bytes

    def unverified_claims(self, model: type[C]) -> C:
        """The claims as `model`, before verification: use them to look up keys, never to decide.

        Raises InvalidMessageError where `typ` names another message, or the claims are not of its shape.
        """
        if self.header.typ != typ_header(model):
            raise InvalidMessageError(
                f"typ is {self.header.typ[:80]!r}, expected {typ_header(model)!r}", code="typ_unexpected"
            )
        try:
            return model.model_validate_json(self.payload)
        except ValidationError as error:
            raise InvalidMessageError(
                f"not {with_article(model.typ)}: {explain(error)}", code="claims_invalid"
            ) from None

    def check_one_reading(self) -> None:
        """For what a person is shown, perhaps by a program of another make: what is signed says one thing to everybody.

        Raises InvalidMessageError where the claims are no I-JSON (RFC 7493): a name twice, of which one reader takes
        the first and another the last.
        """
        try:
            json_object(self.payload)
        except ValueError as error:
            raise InvalidMessageError(
                f"its claims can be read in two ways: {error}", code="ambiguous"
            ) from None


class Signed(NamedTuple, Generic[C]):
    """A verified message: its claims, and the exact text that was signed."""

    claims: C
    compact: str

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of the compact JWS."""
        return digest(self.compact)


def explain(error: ValidationError) -> str:
    """What pydantic found wrong, by field, without the values (they could be secret)."""
    items = error.errors(include_url=False)
    # A list all of whose members are wrong is said to be too short as well.
    around = {item["loc"][:depth] for item in items for depth in range(1, len(item["loc"]))}
    found = [
        # Names of unknown fields are a stranger's words.
        f"{'.'.join(visible_name(str(part)[:80]) for part in item['loc']) or 'it'}: "
        + WORDS_FOR_PATTERNS.get(str(item.get("ctx", {}).get("pattern")), visible(item["msg"]))
        for item in items
        if item["loc"] not in around
    ]
    return "; ".join(found[:5])[:500]


@lru_cache(maxsize=4096)
def _encoded_header(alg: str, kid: str, typ: str) -> bytes:
    return (
        b64encode(json.dumps({"alg": alg, "kid": kid, "typ": typ}, separators=(",", ":")).encode()).encode()
        + b"."
    )


def sign(claims: Claims, key: SigningKey, *, header_jwk: bool = False) -> str:
    """The compact JWS of `claims` by `key`. `header_jwk` adds the public key to the header (for the root alone)."""
    if header_jwk:
        jwk = key.public.model_dump(exclude_none=True)
        fields = {"alg": key.alg, "kid": key.kid, "typ": typ_header(type(claims)), "jwk": jwk}
        head = b64encode(json.dumps(fields, separators=(",", ":")).encode()).encode() + b"."
        text = head + _payload(claims)
    else:
        text = signing_input(claims, key)
    return compact_jws(text, key.sign(text))


def sign_payload(model: type[Claims], payload: bytes, key: SigningKey) -> str:
    """The compact JWS of claims that are JSON already, of the shape of `model`."""
    text = _encoded_header(key.alg, key.kid, typ_header(model)) + b64encode(payload).encode()
    return compact_jws(text, key.sign(text))


def signing_input(claims: Claims, key: SigningKey) -> bytes:
    """What `key` signs of `claims`: with `compact_jws`, `sign` in two steps."""
    return _encoded_header(key.alg, key.kid, typ_header(type(claims))) + _payload(claims)


def compact_jws(signing_input: bytes, signature: bytes) -> str:
    """The compact JWS of what was signed and its signature."""
    return f"{signing_input.decode()}.{b64encode(signature)}"


def _payload(claims: Claims) -> bytes:
    return b64encode(claims.model_dump_json(exclude_none=True).encode()).encode()


_MAX_REMEMBERED = 512
"""A header of Ringfence is shorter, also one with the root's key: strangers' are not kept, of whatever length."""


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
    """When a message of whatever shape says that it was signed (`iat`), before verification; None where it does not."""
    try:
        iat = orjson.loads(jws.payload)["iat"]
    except (ValueError, KeyError, TypeError):
        return None
    return iat if isinstance(iat, int) else None


def kid_of(compact: str) -> str:
    """The `kid` of a JWS that was verified before, without taking it apart once more.

    Raises InvalidMessageError where its header is none.
    """
    try:
        return _header(compact.partition(".")[0]).kid
    except (ValueError, RecursionError):
        raise InvalidMessageError("not a JWS in compact serialisation", code="not_a_jws") from None


def parse(compact: str | bytes) -> UnverifiedJws:
    """Take a compact JWS apart. Raises InvalidMessageError where it is none, or is over 512 KiB."""
    if len(compact) > MAX_JWS_BYTES:
        raise InvalidMessageError(
            f"a JWS of {len(compact)} bytes; the limit is {MAX_JWS_BYTES}", code="too_large"
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
        raise InvalidMessageError("not a JWS in compact serialisation", code="not_a_jws") from None


def verify(
    jws: UnverifiedJws,
    model: type[C],
    find_key: KeyFinder,
    *,
    audience: str,
    appended_at_ms: int | None = None,
    verified: C | None = None,
) -> Signed[C]:
    """Verify a message and return its claims.

    Args:
        jws: what `parse` returned.
        model: the message that is expected here; its `typ` must stand in the header.
        find_key: says which key may sign for an `iss` (this is where authority and key validity are decided).
        audience: the trust domain.
        appended_at_ms: the broker's append time of the record; `exp` and `iat` are judged against it. None where the
            message does not expire, or where its expiry was judged when it was first read.
        verified: what this returned for the same text before. A signature that held goes on holding; whether its key
            may sign, and the times, are looked at anew.

    Raises:
        SignatureError: unknown key, other algorithm than the key's, or a bad signature.
        ExpiredError: appended after `exp`, or `exp` too far from `iat`, or `iat` or `nbf` in the broker's future.
        InvalidMessageError: another `typ` or `aud`, or claims not of the message's shape.
    """
    claims = verified or jws.unverified_claims(model)
    key = _signing_key(jws, model, claims.iss, claims.aud, find_key, audience)
    if verified is None:
        _check_signature(jws, model, claims.iss, key)
    if appended_at_ms is not None:
        check_times(claims, appended_at_ms)
    return Signed(claims, jws.compact)


def verify_payload(
    jws: UnverifiedJws, model: type[Claims], find_key: KeyFinder, *, audience: str
) -> dict[str, Any]:
    """Verify a message as `verify` does, and return its claims as the JSON that they are, unlooked at.

    For what is large and whose signer is this service itself: the shape is the caller's to judge. Raises as
    `verify` does.
    """
    if jws.header.typ != typ_header(model):
        raise InvalidMessageError(f"not {with_article(model.typ)}", code="typ_unexpected")
    try:
        claims: dict[str, Any] = orjson.loads(jws.payload)
        iss, aud = str(claims["iss"]), str(claims["aud"])
    except (ValueError, KeyError, TypeError):
        raise InvalidMessageError(f"not {with_article(model.typ)}", code="claims_invalid") from None
    _check_signature(jws, model, iss, _signing_key(jws, model, iss, aud, find_key, audience))
    return claims


def _signing_key(
    jws: UnverifiedJws, model: type[Claims], iss: str, aud: str, find_key: KeyFinder, audience: str
) -> PublicKey:
    """The key that may sign this and says that it did."""
    check_audience(aud, audience)
    key = find_key(iss, jws.header.kid)
    if key is None:
        raise SignatureError(
            f"no valid key {visible_name(jws.header.kid[:43])} of {visible_name(iss[:512])} may sign {model.typ}",
            code="key_unknown",
        )
    if jws.header.alg != key.alg:
        raise SignatureError(f"alg is {jws.header.alg[:16]!r}, the key's is {key.alg}", code="alg_unexpected")
    return key


def _check_signature(jws: UnverifiedJws, model: type[Claims], iss: str, key: PublicKey) -> None:
    if not key.verifies(jws.signature, jws.signing_input):
        raise SignatureError(
            f"the signature of this {model.typ} by {visible_name(iss[:512])} does not verify"
        )
