"""Signatures by passkeys: what verifies, and everything that must not."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.kernel.base.errors import SignatureError
from ringfence.kernel.crypto.jws import parse, sign, verify
from ringfence.kernel.crypto.webauthn import PasskeyKey
from ringfence.messages.registry import UserEndKey
from tests.support.passkeys import ORIGINS, SoftwarePasskey

TD = "acme.example"
NOW_S = 1_790_000_000
SAM = f"spiffe://{TD}/user/sam"


def end_key(**changed: Any) -> UserEndKey:
    fields: dict[str, Any] = {
        "iss": SAM, "aud": TD, "iat": NOW_S, "exp": NOW_S + 3600, "jti": "j1", "user_id": "sam", "kid": "k",
        "reason": "lost",
    }  # fmt: skip
    return UserEndKey(**(fields | changed))


def read(compact: str, passkey: SoftwarePasskey, at_s: float = NOW_S + 1) -> Any:
    def find(iss: str, kid: str) -> PasskeyKey | None:
        return PasskeyKey.of(passkey.record(NOW_S + 10_000), ORIGINS, at_s) if kid == passkey.kid else None

    return verify(parse(compact), UserEndKey, find, audience=TD, appended_at_ms=int(at_s * 1000)).claims


def test_a_passkey_signs_what_it_may() -> None:
    passkey = SoftwarePasskey.make(SAM)
    assert read(sign(end_key(), passkey), passkey) == end_key()


def test_another_message_with_the_same_assertion_does_not_verify() -> None:
    passkey = SoftwarePasskey.make(SAM)
    head, _, tail = sign(end_key(), passkey).split(".")
    body = sign(end_key(reason="found"), passkey).split(".")[1]
    with pytest.raises(SignatureError, match="challenge"):
        read(f"{head}.{body}.{tail}", passkey)
