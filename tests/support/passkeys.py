"""A software authenticator: makes WebAuthn assertions as a browser and a passkey do, and wrong ones on demand."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.kernel.crypto.webauthn import WEBAUTHN_ALG, challenge_of
from ringfence.messages.base import KeyRecord
from ringfence.messages.registry import KeyPossession, UserAddKey, UserInvite
from ringfence.messages.trust import Origin

if TYPE_CHECKING:
    from tests.support.world import Party, World

RP_ID = "localhost"
SIGN_ORIGIN, SESSION_ORIGIN = "http://localhost:8551", "http://localhost:8552"
ORIGINS = (
    Origin(origin=SIGN_ORIGIN, use="sign", not_before=0),
    Origin(origin=SESSION_ORIGIN, use="session", not_before=0),
)
"""For trust bundles: `rp_id=RP_ID, origins=ORIGINS`."""
USER_PRESENT, USER_VERIFIED, BACKUP_ELIGIBLE, BACKED_UP, ATTESTED_DATA, EXTENSION_DATA = (
    0x01, 0x04, 0x08, 0x10, 0x40, 0x80,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class SoftwarePasskey(SigningKey):
    """A passkey on one page. It stands wherever a `SigningKey` does: `jws.sign(claims, passkey)` is the whole format.

    `dataclasses.replace` (or `but`) gives the same passkey on another origin, with other flags and so on.
    """

    origin: str = SIGN_ORIGIN
    rp_id: str = RP_ID
    flags: int = USER_PRESENT | USER_VERIFIED
    sign_count: int = 0
    extensions: bytes = b""
    """Follow the authenticator data as they are; set `EXTENSION_DATA` in `flags` with them."""
    members: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Members of the client data besides or instead of the usual ones."""

    @classmethod
    def make(cls, id: str, **more: Any) -> SoftwarePasskey:
        """A new passkey of the user with the SPIFFE ID `id`."""
        key = SigningKey.generate(id)
        return cls(key.id, key.public, key.kid, WEBAUTHN_ALG, key._key, **more)

    def but(self, **changed: Any) -> SoftwarePasskey:
        """The same passkey, used otherwise."""
        return dataclasses.replace(self, **changed)

    def plain(self) -> SigningKey:
        """The same key as one that signs plain messages, which no authenticator would."""
        return SigningKey(self.id, self.public, self.kid, "ES256", self._key)

    def record(self, not_after: int, not_before: int = 0) -> KeyRecord:
        return KeyRecord(
            kid=self.kid,
            jwk=self.public,
            not_before=not_before,
            not_after=not_after,
            use="webauthn",
            credential_id=b64encode(hashlib.sha256(self.kid.encode()).digest()),
            rp_id=self.rp_id,
            aaguid=str(uuid.UUID(int=0)),
            backup_eligible=bool(self.flags & BACKUP_ELIGIBLE),
        )

    def sign(self, data: bytes, *, repeatable: bool = True) -> bytes:
        """The third part of a JWS whose Signing Input is `data`, decoded."""
        client_data = self.client_data(challenge_of(data))
        return self.assertion(client_data, self.authenticator_data())

    def client_data(self, challenge: bytes) -> bytes:
        """The client data of an assertion over this challenge, written as browsers do (WebAuthn Level 3, 5.8.1.1)."""
        usual = {
            "type": "webauthn.get",
            "challenge": b64encode(challenge),
            "origin": self.origin,
            "crossOrigin": False,
        }
        return json.dumps(usual | dict(self.members), separators=(",", ":")).encode()

    def authenticator_data(self) -> bytes:
        rp_id_hash = hashlib.sha256(self.rp_id.encode()).digest()
        return rp_id_hash + bytes([self.flags]) + self.sign_count.to_bytes(4) + self.extensions

    def assertion(self, client_data: bytes, authenticator_data: bytes) -> bytes:
        """The third part, over whatever client and authenticator data."""
        return third_part(authenticator_data, client_data, self.der(authenticator_data, client_data))

    def der(self, authenticator_data: bytes, client_data: bytes) -> bytes:
        """The authenticator's signature."""
        key = self._key
        assert isinstance(key, ec.EllipticCurvePrivateKey)
        signed = authenticator_data + hashlib.sha256(client_data).digest()
        return key.sign(signed, ec.ECDSA(hashes.SHA256()))


def first_touch(passkey: SoftwarePasskey, nonce: str = "n" * 43) -> dict[str, str]:
    """What a browser sends that does not know yet whose passkey was touched at sign-in."""
    credential_id = passkey.record(0).credential_id
    assert credential_id is not None
    assertion = passkey.but(origin=SESSION_ORIGIN).sign(nonce.encode())
    return {"credential_id": credential_id, "nonce": nonce, "assertion": b64encode(assertion)}


def third_part(authenticator_data: bytes, client_data: bytes, signature: bytes) -> bytes:
    """The JSON of an assertion, written here a second time, so that a change of the format is noticed."""
    ad, cd, sig = (
        base64.urlsafe_b64encode(part).rstrip(b"=") for part in (authenticator_data, client_data, signature)
    )
    return b'{"ad":"' + ad + b'","cd":"' + cd + b'","sig":"' + sig + b'"}'


async def add_passkey(world: World, who: Party) -> Party:
    """Somebody with a passkey that they added themselves, by an invitation and their key file."""
    passkey = SoftwarePasskey.make(who.id)
    invitation = world.claims(UserInvite, who, user_id=who.name)
    possession = world.claims(
        KeyPossession, who, user_id=who.name, jwk=passkey.public, invitation=invitation.jti
    )
    command = world.claims(
        UserAddKey, who, user_id=who.name, key=passkey.record(int(time.time()) + 86_400),
        invitation=sign(invitation, who.key), possession=sign(possession, passkey),
    )  # fmt: skip
    await world.accepted(command, who)
    return dataclasses.replace(who, key=passkey)
