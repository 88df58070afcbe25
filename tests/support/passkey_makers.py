"""Makers of authenticators: their certificates, and attestations of passkeys by them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID
from fido2.cose import ES256
from fido2.webauthn import AttestationObject, AttestedCredentialData, AuthenticatorData

from ringfence.kernel.crypto.keys import b64encode

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

    def attest(
        self,
        key: ec.EllipticCurvePublicKey,
        *,
        aaguid: bytes,
        credential_id: bytes,
        rp_id: str,
        origin: str,
        chain: tuple[Certificate, ...] | None = None,
        statement: Callable[[bytes], dict[str, Any]] | None = None,
        form: str = "packed",
        created: str = "webauthn.create",
    ) -> tuple[str, str]:
        """The attestation object and the client data of a registration, base64url, as the sign page gives them out."""
        credential = AttestedCredentialData.create(aaguid, credential_id, ES256.from_cryptography_key(key))
        data = AuthenticatorData.create(
            hashlib.sha256(rp_id.encode()).digest(), AuthenticatorData.FLAG(0x45), 0, credential
        )
        client_data = json.dumps({"type": created, "challenge": "AAAA", "origin": origin}).encode()
        signed = data + hashlib.sha256(client_data).digest()
        path = [one.public_bytes(Encoding.DER) for one in (chain or (self.leaf, self.middle))]
        packed = {"alg": -7, "sig": self.leaf_key.sign(signed, ec.ECDSA(hashes.SHA256())), "x5c": path}
        made = AttestationObject.create(form, data, statement(signed) if statement else packed)
        return b64encode(bytes(made)), b64encode(client_data)
