"""Envelopes: each reader opens them with its own key, nobody else does, and a broken key stops none of the others."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from joserfc import jwe
from joserfc.jwk import ECKey, OKPKey

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jwe import (
    EncryptionKey,
    enclose,
    recipients_of,
    unverified_about,
    usable,
)
from ringfence.kernel.crypto.keys import KeyFileError, SigningKey, b64encode, thumbprint
from ringfence.messages.base import KeyRecord, PublicJwk

END_S = 10**10
ONE, TWO, STRANGER = (EncryptionKey.generate(f"spiffe://acme.example/service/{n}") for n in ("a", "b", "c"))
TO = (ONE.record(END_S), TWO.record(END_S))


def test_each_reader_opens_it_and_nobody_else() -> None:
    envelope = enclose(b"a canary", TO, about="lease-1")
    assert "canary" not in envelope
    assert ONE.open(envelope) == TWO.open(envelope.encode()) == b"a canary"
    assert recipients_of(envelope) == (ONE.kid, TWO.kid)
    assert unverified_about(envelope.encode()) == "lease-1"
    with pytest.raises(InvalidMessageError) as refused:
        STRANGER.open(envelope)
    assert refused.value.code == "not_a_recipient"


def test_a_strangers_tools_open_it() -> None:
    """What stands in RFC 7516, and nothing of our own but one header."""
    key = ECKey.generate_key("P-256")
    fields = {name: key.as_dict(private=False)[name] for name in ("kty", "crv", "x", "y")}
    jwk = PublicJwk.model_validate(fields)
    envelope = json.loads(
        enclose(b"hello", (*TO, KeyRecord(kid=thumbprint(jwk), jwk=jwk, not_after=END_S)), about="x")
    )
    assert set(envelope) == {"protected", "iv", "ciphertext", "tag", "recipients"}
    registry = jwe.JWERegistry(algorithms=["ECDH-ES+A256KW", "A256GCM"], strict_check_header=False)
    only: Any = {**envelope, "recipients": envelope["recipients"][2:]}
    assert jwe.decrypt_json(only, key, registry=registry).plaintext == b"hello"


def test_changed_envelope_does_not_open() -> None:
    envelope: dict[str, Any] = json.loads(enclose(b"hello", TO, about="lease-1"))
    other = json.loads(enclose(b"hello", TO, about="lease-2"))
    for part in ("protected", "iv", "ciphertext", "tag", "recipients"):
        with pytest.raises(InvalidMessageError):
            ONE.open(json.dumps({**envelope, part: other[part]}))
        with pytest.raises(InvalidMessageError):
            ONE.open(json.dumps({key: value for key, value in envelope.items() if key != part}))
    twice = {**envelope, "recipients": [envelope["recipients"][0]] * 2}
    with pytest.raises(InvalidMessageError):
        ONE.open(json.dumps(twice))


@pytest.mark.parametrize(
    "junk",
    [b"", b"{}", b"[]", b"\xff", b'{"recipients": 1}', b'{"recipients": [1]}', b"[" * 100_000, b"a.b.c.d.e",
     b'{"protected": 1, "recipients": []}', b'{"protected": "' + b64encode(b"[]").encode() + b'", "recipients": []}'],
)  # fmt: skip
def test_junk_is_none(junk: bytes) -> None:
    with pytest.raises(InvalidMessageError):
        ONE.open(junk)
    assert unverified_about(junk) is None


def test_oversized_envelope_is_rejected_before_parsing() -> None:
    with pytest.raises(InvalidMessageError, match="large"):
        ONE.open(b" " * (3 * 1024 * 1024))


def test_a_key_that_is_none_stops_no_other() -> None:
    off = PublicJwk(kty="EC", crv="P-256", x="AAAA", y="AAAA")
    signing = SigningKey.generate("spiffe://acme.example/service/a").record(END_S)
    low = PublicJwk(kty="OKP", crv="X25519", x=b64encode(bytes(32)))
    broken = [KeyRecord(kid=thumbprint(jwk), jwk=jwk, not_after=END_S) for jwk in (off, low)]
    misnamed = TO[0].model_copy(update={"kid": TO[1].kid})
    assert usable([*broken, misnamed, TO[0], TO[0]], time.time()) == (TO[0],)
    # A key of P-256 that signs can be sealed to as far as its numbers go: the bundle keeps the two apart.
    assert usable([signing], time.time()) == (signing,)


def test_a_key_counts_in_its_time() -> None:
    record = ONE.record(200, 100)
    assert [bool(usable([record], at_s)) for at_s in (99, 100, 199, 200)] == [False, True, True, False]


def test_envelope_without_recipients_is_refused() -> None:
    with pytest.raises(InvalidMessageError, match="recipients"):
        enclose(b"x", (), about="x")


def test_a_key_survives_its_file_which_is_no_signing_keys(tmp_path: Path) -> None:
    ONE.save(tmp_path / "a-seal.json")
    again = EncryptionKey.load(tmp_path / "a-seal.json")
    assert again.open(enclose(b"hello", TO, about="x")) == b"hello"
    assert (tmp_path / "a-seal.json").stat().st_mode & 0o777 == 0o600
    assert "PrivateKey" not in repr(again)
    SigningKey.generate("spiffe://acme.example/service/a").save(tmp_path / "a.json")
    for load, file in ((EncryptionKey.load, "a.json"), (SigningKey.load, "a-seal.json")):
        with pytest.raises(KeyFileError, match="does not hold a private key"):
            load(tmp_path / file)


def test_a_large_message_fits() -> None:
    text = b"x" * 700_000
    assert TWO.open(enclose(text, TO, about="x")) == text


def test_envelope_opens_with_a_key_of_another_library() -> None:
    key = OKPKey.generate_key("X25519")
    x = str(key.as_dict(private=False)["x"])
    jwk = PublicJwk(kty="OKP", crv="X25519", x=x)
    envelope = json.loads(
        enclose(b"hello", [KeyRecord(kid=thumbprint(jwk), jwk=jwk, not_after=END_S)], about="x")
    )
    registry = jwe.JWERegistry(algorithms=["ECDH-ES+A256KW", "A256GCM"], strict_check_header=False)
    assert jwe.decrypt_json(envelope, key, registry=registry).plaintext == b"hello"
