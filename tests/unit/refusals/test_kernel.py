"""Why the kernel refuses a message, a token, a file or a head of HTTP, a row for each code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from ringfence.kernel.base.private_files import check_output
from ringfence.kernel.base.secret_refs import read_secret
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.claims import LEEWAY_S, MAX_LIFE_S
from ringfence.kernel.crypto.jwe import EncryptionKey, ReplyKey, check_reply_key, enclose, seal
from ringfence.kernel.crypto.jws import MAX_JWS_BYTES, parse, sign, sign_payload, verify
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode, public_key
from ringfence.kernel.crypto.oidc import read_jwks, unverified_issuer, verify_token
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.http1.head import MAX_FIELDS, MAX_HEAD_BYTES, parse_request, take_head
from ringfence.kernel.kafka.connection import _tls
from ringfence.messages.api import ApiToken
from ringfence.messages.codes import Code
from ringfence.messages.registry import UserDisable
from ringfence.model.records.api_access import Authenticator
from tests.support.in_memory_registry import FixedClock, InMemoryRegistry
from tests.support.oidc_tokens import TokenIssuer
from tests.support.verdicts import refusal_code

TD: Final = "acme.example"
NOW_S: Final = 1_790_000_000
KEY: Final = SigningKey.generate(f"spiffe://{TD}/user/olga")
READER, STRANGER = (EncryptionKey.generate(f"spiffe://{TD}/service/{name}") for name in ("gateway", "other"))
REPLY: Final = ReplyKey()
OIDC: Final = TokenIssuer("https://login.acme.example", "ES256")
HEAD: Final = b"GET / HTTP/1.1\r\nHost: acme.example\r\n"


def command(**changed: Any) -> UserDisable:
    fields: dict[str, Any] = {
        "iss": KEY.id, "aud": TD, "iat": NOW_S, "exp": NOW_S + 60, "jti": "j1", "user_id": "maria", "reason": "left",
    }  # fmt: skip
    return UserDisable(**(fields | changed))


def read(compact: str | bytes, *, model: Any = UserDisable, known: Any = KEY, at_s: int = NOW_S) -> object:
    """Verify a message by the key of olga."""
    key = public_key(known.public)

    def find(iss: str, kid: str) -> Any:
        return key if kid == KEY.kid else None

    return verify(parse(compact), model, find, audience=TD, appended_at_ms=at_s * 1000)


def token(**claims: Any) -> object:
    """Verify an identity token with these claims."""
    return judge(OIDC.token({**OIDC.claims(TD, NOW_S), **claims}))


def judge(text: str) -> object:
    return verify_token(text, OIDC.keys(), issuer=OIDC.issuer, audience=TD, at_s=NOW_S, max_age_s=300)


def with_header(compact: str, **changed: str) -> str:
    """The message with another header, and so with a wrong signature."""
    head, rest = compact.split(".", 1)
    header = {**json.loads(b64decode(head)), **changed}
    return f"{b64encode(json.dumps(header).encode())}.{rest}"


MESSAGES: Final[dict[Code, Callable[[], object]]] = {
    Code.NOT_A_JWS: lambda: read("no JWS"),
    Code.TOO_LARGE: lambda: read("x" * (MAX_JWS_BYTES + 1)),
    Code.TYP_UNEXPECTED: lambda: read(sign(command(), KEY), model=ApiToken),
    Code.CLAIMS_INVALID: lambda: read(sign_payload(UserDisable, b"{}", KEY)),
    Code.AMBIGUOUS: lambda: parse(
        sign_payload(UserDisable, command().model_dump_json()[:-1].encode() + b',"reason":"other"}', KEY)
    ).check_one_reading(),
    Code.AUD_UNEXPECTED: lambda: read(sign(command(aud="other.example"), KEY)),
    Code.KEY_UNKNOWN: lambda: read(sign(command(), SigningKey.generate(KEY.id))),
    Code.ALG_UNEXPECTED: lambda: read(with_header(sign(command(), KEY), alg="EdDSA")),
    Code.SIGNATURE_INVALID: lambda: read(sign(command(), KEY), known=SigningKey.generate(KEY.id)),
    Code.EXPIRED: lambda: read(sign(command(), KEY), at_s=NOW_S + 60),
    Code.IAT_IN_FUTURE: lambda: read(sign(command(), KEY), at_s=NOW_S - LEEWAY_S - 1),
    Code.NOT_YET: lambda: read(sign(command(nbf=NOW_S + LEEWAY_S + 1), KEY)),
    Code.LIFE_TOO_LONG: lambda: read(sign(command(exp=NOW_S + MAX_LIFE_S + 1), KEY)),
    # Sealed messages
    Code.REPLY_KEY_INVALID: lambda: check_reply_key(REPLY.public.model_copy(update={"crv": "P-384"})),
    Code.SEAL_BROKEN: lambda: ReplyKey().open(seal(b"x", REPLY.public, kid="r")),
    Code.RECIPIENTS: lambda: enclose(b"x", (), about="lease-1"),
    Code.NOT_A_RECIPIENT: lambda: STRANGER.open(enclose(b"x", (READER.record(NOW_S),), about="lease-1")),
    Code.NOT_AN_ENVELOPE: lambda: READER.open("{}"),
    # Identity tokens
    Code.JWKS_INVALID: lambda: read_jwks('{"keys":[]}'),
    Code.TOKEN_MALFORMED: lambda: unverified_issuer("a.b"),
    Code.ALG_NOT_ALLOWED: lambda: judge(with_header(OIDC.token(OIDC.claims(TD, NOW_S)), alg="none")),
    Code.ISS_UNEXPECTED: lambda: token(iss="https://other.example"),
    Code.TOO_OLD: lambda: token(iat=NOW_S - 300 - LEEWAY_S - 1),
    Code.NOT_YET_VALID: lambda: token(nbf=NOW_S + LEEWAY_S + 1),
    # Trust
    Code.TRUST_EXPIRED: lambda: InMemoryRegistry().trust.require(NOW_S * 2),
    Code.UNAVAILABLE: lambda: TrustStore(TD, KEY.kid).require(),
    # Callers of an API
    Code.UNAUTHENTICATED: lambda: Authenticator(InMemoryRegistry().directory, "policy", FixedClock()).user(
        None
    ),
    # Files and secrets
    Code.SETTINGS_INVALID: lambda: _tls(BusSettings.model_construct(kafka_ssl_ca_file=Path("/nonexistent"))),
    Code.SECRET_MISSING: lambda: read_secret("env:RINGFENCE_TEST_NOT_SET", "the password"),
    Code.OUTPUT_FILE_REFUSED: lambda: check_output(Path("/dev/null")),
    # Heads of HTTP
    Code.MALFORMED_HTTP: lambda: parse_request(b"GET / HTTP/1.1\r\n"),
    Code.HEAD_TOO_LARGE: lambda: take_head(bytearray(MAX_HEAD_BYTES)),
    Code.TOO_MANY_FIELDS: lambda: parse_request(HEAD + b"A: b\r\n" * MAX_FIELDS),
    Code.OVERRIDE_REFUSED: lambda: parse_request(HEAD + b"X-HTTP-Method-Override: DELETE\r\n"),
}


@pytest.mark.parametrize(("code", "ask"), MESSAGES.items(), ids=MESSAGES)
def test_input_is_refused(code: Code, ask: Callable[[], object]) -> None:
    assert refusal_code(ask) == code


def test_the_input_without_the_change_is_accepted() -> None:
    assert read(sign(command(), KEY))
    assert token()
    assert READER.open(enclose(b"x", (READER.record(NOW_S),), about="lease-1")) == b"x"
    assert parse_request(HEAD).method == "GET"
