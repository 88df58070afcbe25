"""Attestation of passkeys: what an operator's command line takes for attested, against the roots that it is given."""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

import pytest
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from ringfence.client.admin.user_keys import AttestationError, KeyPackage, verify_attestation
from ringfence.client.errors import InvalidCallError
from ringfence.kernel.crypto.keys import b64decode, b64encode
from ringfence.messages.base import PublicJwk
from tests.support.passkey_makers import Maker, certificate

AAGUID = bytes(range(16))
AAGUID_TEXT = "00010203-0405-0607-0809-0a0b0c0d0e0f"
RP_ID = "acme.example"


@pytest.fixture(name="maker", scope="module")
def maker_of_keys() -> Maker:
    return Maker()


def registered(maker: Maker, **more: Any) -> KeyPackage:
    """What the sign page hands out after a registration; `more` as for `Maker.attest`."""
    key = ec.generate_private_key(ec.SECP256R1()).public_key()
    attestation_object, client_data = maker.attest(
        key,
        aaguid=AAGUID,
        credential_id=b"credential",
        rp_id=RP_ID,
        origin="https://sign.acme.example",
        **more,
    )
    numbers = key.public_numbers()
    return KeyPackage(
        "maria", "invitation", "possession",
        PublicJwk(kty="EC", crv="P-256", x=b64encode(numbers.x.to_bytes(32)), y=b64encode(numbers.y.to_bytes(32))),
        {
            "use": "webauthn", "credential_id": b64encode(b"credential"), "rp_id": RP_ID, "aaguid": AAGUID_TEXT,
            "backup_eligible": False,
        },
        attestation_object,
        client_data,
    )  # fmt: skip


def test_a_chain_to_a_given_root_counts(maker: Maker):
    verify_attestation(registered(maker), [maker.pem])
    verify_attestation(registered(maker), [Maker().pem, maker.pem])
    verify_attestation(registered(maker), [Maker().pem + maker.pem])


def test_a_certificate_that_does_not_say_that_it_is_an_authoritys_is_none(maker: Maker):
    middle = certificate("middle", maker.middle_key, ("root", maker.root_key), ca=None)
    with pytest.raises(AttestationError):
        verify_attestation(registered(maker, chain=(maker.leaf, middle)), [maker.pem])


def test_attestation_by_another_root_is_rejected(maker: Maker):
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


def test_attestation_of_another_key_is_rejected(maker: Maker):
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


def test_unreadable_attestation_is_rejected(maker: Maker):
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
