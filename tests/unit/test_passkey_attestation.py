"""Attestation of passkeys: what an operator's command line takes for attested, against the roots that it is given."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from fido2.cose import ES256
from fido2.webauthn import AttestationObject, AttestedCredentialData, AuthenticatorData

from ringfence.client.admin.passkey_attestation import AttestationError, verify_attestation
from ringfence.client.admin.user_keys import KeyPackage
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.crypto.keys import b64decode, b64encode
from ringfence.messages.keys import PublicJwk

AAGUID = bytes(range(16))
AAGUID_TEXT = "00010203-0405-0607-0809-0a0b0c0d0e0f"
RP_ID = "acme.example"
Certificate = x509.Certificate
Key = ec.EllipticCurvePrivateKey


def certificate(name: str, key: Key, by: tuple[str, Key], *, ca: bool | None) -> Certificate:
    subject = x509.Name([
        x509.NameAttribute(NameOID.COUNTRY_NAME, "SE"),
        x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Maker"),
        x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, "Authenticator Attestation"),
        x509.NameAttribute(NameOID.COMMON_NAME, name),
    ])  # fmt: skip
    issuer = x509.Name([*list(subject)[:3], x509.NameAttribute(NameOID.COMMON_NAME, by[0])])
    builder = x509.CertificateBuilder(
        issuer, subject, key.public_key(), x509.random_serial_number(),
        datetime(2020, 1, 1, tzinfo=UTC), datetime(2060, 1, 1, tzinfo=UTC),
    )  # fmt: skip
    if ca is not None:
        builder = builder.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
    return builder.sign(by[1], hashes.SHA256())


class Maker:
    """A maker of authenticators: a root, an authority below it, and one model's attestation key."""

    def __init__(self) -> None:
        self.root_key, self.middle_key, self.leaf_key = (
            ec.generate_private_key(ec.SECP256R1()) for _ in range(3)
        )
        self.root = certificate("root", self.root_key, ("root", self.root_key), ca=True)
        self.middle = certificate("middle", self.middle_key, ("root", self.root_key), ca=True)
        self.leaf = certificate("leaf", self.leaf_key, ("middle", self.middle_key), ca=False)

    @property
    def pem(self) -> bytes:
        return self.root.public_bytes(Encoding.PEM)


@pytest.fixture(name="maker", scope="module")
def maker_of_keys() -> Maker:
    return Maker()


def registered(
    maker: Maker,
    *,
    chain: tuple[Certificate, ...] | None = None,
    statement: Callable[[bytes], dict[str, Any]] | None = None,
    form: str = "packed",
    created: str = "webauthn.create",
) -> KeyPackage:
    """What the sign page hands out after a registration."""
    numbers = ec.generate_private_key(ec.SECP256R1()).public_key()
    credential = AttestedCredentialData.create(AAGUID, b"credential", ES256.from_cryptography_key(numbers))
    data = AuthenticatorData.create(
        hashlib.sha256(RP_ID.encode()).digest(), AuthenticatorData.FLAG(0x45), 0, credential
    )
    client_data = json.dumps(
        {"type": created, "challenge": "AAAA", "origin": "https://sign.acme.example"}
    ).encode()
    signed = data + hashlib.sha256(client_data).digest()
    path = [one.public_bytes(Encoding.DER) for one in (chain or (maker.leaf, maker.middle))]
    packed = {"alg": -7, "sig": maker.leaf_key.sign(signed, ec.ECDSA(hashes.SHA256())), "x5c": path}
    made = AttestationObject.create(form, data, statement(signed) if statement else packed)
    key = credential.public_key
    return KeyPackage(
        "maria", "invitation", "possession",
        PublicJwk(kty="EC", crv="P-256", x=b64encode(key[-2]), y=b64encode(key[-3])),
        {
            "use": "webauthn", "credential_id": b64encode(b"credential"), "rp_id": RP_ID, "aaguid": AAGUID_TEXT,
            "backup_eligible": False,
        },
        b64encode(bytes(made)),
        b64encode(client_data),
    )  # fmt: skip


def test_a_chain_to_a_given_root_counts(maker: Maker):
    verify_attestation(registered(maker), [maker.pem])
    verify_attestation(registered(maker), [Maker().pem, maker.pem])
    verify_attestation(registered(maker), [Maker().pem + maker.pem])


def test_a_certificate_that_does_not_say_that_it_is_an_authoritys_is_none(maker: Maker):
    middle = certificate("middle", maker.middle_key, ("root", maker.root_key), ca=None)
    with pytest.raises(AttestationError):
        verify_attestation(registered(maker, chain=(maker.leaf, middle)), [maker.pem])


def test_what_no_given_root_vouches_for_does_not(maker: Maker):
    package, stranger = registered(maker), Maker()
    for roots in ([stranger.pem], []):
        with pytest.raises(AttestationError, match="no given root vouches"):
            verify_attestation(package, roots)
    with pytest.raises(AttestationError):
        verify_attestation(registered(maker, chain=(stranger.leaf, stranger.middle)), [maker.pem])


def test_a_passkey_does_not_vouch_for_itself(maker: Maker):
    own = ec.generate_private_key(ec.SECP256R1())

    def self_attested(signed: bytes) -> dict[str, Any]:
        return {"alg": -7, "sig": own.sign(signed, ec.ECDSA(hashes.SHA256()))}

    for form, statement in (("none", lambda signed: {}), ("packed", self_attested)):
        with pytest.raises(AttestationError):
            verify_attestation(registered(maker, form=form, statement=statement), [maker.pem])


def test_an_authenticator_is_no_authority(maker: Maker):
    """Whoever has the attestation key of one authenticator signs certificates with it."""
    thief = ec.generate_private_key(ec.SECP256R1())
    fake = certificate("fake", thief, ("leaf", maker.leaf_key), ca=False)

    def statement(signed: bytes) -> dict[str, Any]:
        path = [one.public_bytes(Encoding.DER) for one in (fake, maker.leaf, maker.middle)]
        return {"alg": -7, "sig": thief.sign(signed, ec.ECDSA(hashes.SHA256())), "x5c": path}

    with pytest.raises(AttestationError):
        verify_attestation(registered(maker, statement=statement), [maker.pem])


def test_it_is_the_attestation_of_this_very_key(maker: Maker):
    package, other = registered(maker), registered(maker)
    for wrong in (
        replace(package, jwk=other.jwk),
        replace(package, passkey={**package.passkey, "credential_id": "AAAA"}),
        replace(package, passkey={**package.passkey, "aaguid": "ffffffff-0405-0607-0809-0a0b0c0d0e0f"}),
        replace(package, passkey={**package.passkey, "rp_id": "evil.example"}),
        replace(package, passkey={**package.passkey, "backup_eligible": True}),
        registered(maker, created="webauthn.get"),
    ):
        with pytest.raises(AttestationError, match="of another key"):
            verify_attestation(wrong, [maker.pem])
    changed = bytearray(b64decode(package.client_data or ""))
    changed[-3] ^= 1
    with pytest.raises(AttestationError):
        verify_attestation(replace(package, client_data=b64encode(bytes(changed))), [maker.pem])


def test_what_cannot_be_read_is_told(maker: Maker):
    package = registered(maker)
    for broken in ("", "AAAA", b64encode(b"\xa0")):
        with pytest.raises(AttestationError):
            verify_attestation(replace(package, attestation_object=broken), [maker.pem])
    with pytest.raises(AttestationError, match="has no attestation"):
        verify_attestation(replace(package, attestation_object=None), [maker.pem])
    with pytest.raises(InvalidCallError, match="PEM"):
        verify_attestation(package, [b"no certificate"])


def test_without_its_extra_it_names_it(maker: Maker, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "fido2.webauthn", None)
    with pytest.raises(InvalidCallError, match="passkeys"):
        verify_attestation(registered(maker), [maker.pem])
