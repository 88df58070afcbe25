"""WebAuthn assertions as signatures of messages: how a person signs with a passkey, and how readers verify it.

Such a message is a compact JWS with the algorithm `WEBAUTHN_ALG`. Its third part is base64url of
`{"ad":"...","cd":"...","sig":"..."}`: authenticator data, client data and signature of one assertion (WebAuthn Level 3,
6.1, 5.8.1 and 6.3.3), each in base64url. The challenge of the assertion is the SHA-256 of `CHALLENGE_PREFIX` and the
JWS Signing Input (RFC 7515, section 2), so it covers header and claims. Other JOSE libraries refuse the algorithm
(RFC 7515, 4.1.1).

Verification needs no state (WebAuthn Level 3, 7.2). A verifier has no challenge of its own: `MAX_AGE_S` stands in for
it (ADR 0072). Records depend on these rules for ever: what they accept today they must always accept.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import ClassVar, Final

from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.base.text import visible_name
from ringfence.kernel.crypto.claims import LEEWAY_S, ExpiredError
from ringfence.kernel.crypto.keys import PublicKey, b64decode, b64encode, public_key
from ringfence.messages.base import KeyRecord, PasskeyUse
from ringfence.messages.codes import Code
from ringfence.messages.trust import Origin

WEBAUTHN_ALG: Final = "urn:ringfence:webauthn:ES256"
"""The `alg` of messages that a passkey signed: ECDSA on P-256 with SHA-256, inside a WebAuthn assertion."""
CHALLENGE_PREFIX: Final = b"ringfence.webauthn.v1\0"
MAX_AGE_S: Final = 600
"""The longest time, in seconds, from `iat` of a message that a passkey signed to its append."""
MAX_ASSERTION_BYTES: Final = 4096

# Canonical JSON, and nothing else: one text for each assertion.
_ASSERTION: Final = re.compile(
    rb'\{"ad":"([A-Za-z0-9_-]+)","cd":"([A-Za-z0-9_-]+)","sig":"([A-Za-z0-9_-]+)"\}'
)
_USER_PRESENT: Final = 0x01
_USER_VERIFIED: Final = 0x04
_BACKUP_ELIGIBLE: Final = 0x08
_BACKED_UP: Final = 0x10
_ATTESTED_DATA: Final = 0x40
_EXTENSION_DATA: Final = 0x80
_HEAD_BYTES: Final = 37
"""The SHA-256 of the rpId, the flags, and signCount."""


@dataclass(frozen=True, slots=True)
class PasskeyKey:
    """A passkey as it counts at one moment. It verifies messages that were appended then, and no others."""

    alg: ClassVar[str] = WEBAUTHN_ALG

    kid: str
    rp_id: str
    backup_eligible: bool | None
    """What its assertions must say (BE); None if its record does not say so."""
    origins: tuple[Origin, ...]
    """The origins of the trust bundle that are valid at `at_s`."""
    at_s: float
    """The append time of the message, in seconds."""
    _key: PublicKey

    @classmethod
    def of(cls, record: KeyRecord, origins: tuple[Origin, ...], at_s: float) -> PasskeyKey | None:
        """The passkey of a key record at `at_s`; None if the record has none that is valid then.

        `origins` are those of the trust bundle at `at_s`.
        """
        if record.use != "webauthn" or record.rp_id is None:
            return None
        if not record.not_before <= at_s < record.not_after:
            return None
        try:
            key = public_key(record.jwk)
        except ValueError:
            return None
        if key.kid != record.kid or key.alg != "ES256":
            return None
        return cls(record.kid, record.rp_id, record.backup_eligible, origins, at_s, key)

    def problem(self, assertion: bytes, signing_input: bytes, use: PasskeyUse) -> str | None:
        """Why an assertion is no signature of this passkey over `signing_input`, or None.

        Args:
            assertion: the third part of the JWS, decoded.
            signing_input: the first two parts of the JWS.
            use: the use of origins on which such a message is signed.
        """
        if len(assertion) > MAX_ASSERTION_BYTES:
            return f"the assertion has {len(assertion)} bytes; the limit is {MAX_ASSERTION_BYTES}"
        parts = _ASSERTION.fullmatch(assertion)
        if parts is None:
            return "the assertion is not the canonical JSON of ad, cd and sig"
        try:
            authenticator_data, client_data, signature = (b64decode(part) for part in parts.groups())
        except ValueError:
            return "ad, cd or sig is not canonical base64url"
        return (
            self._client_data_problem(client_data, challenge_of(signing_input), use)
            or self._authenticator_data_problem(authenticator_data)
            or self._signature_problem(signature, authenticator_data, client_data)
        )

    def check_fresh(self, iat: int) -> None:
        """Check that a message of this `iat` (seconds) was appended soon enough. Raises ExpiredError.

        A signer's clock may be `LEEWAY_S` ahead. Without that limit, a message dated ahead could be kept for later.
        """
        if iat > self.at_s + LEEWAY_S:
            raise ExpiredError(
                f"iat lies {iat - self.at_s:.0f} s ahead of the broker; set the clock",
                code=Code.IAT_IN_FUTURE,
            )
        if self.at_s - iat > MAX_AGE_S:
            raise ExpiredError(
                f"reached the broker {self.at_s - iat:.0f} s after the passkey signed it; the limit is {MAX_AGE_S} s: "
                "sign it anew",
                code=Code.PASSKEY_TOO_LATE,
            )

    def _client_data_problem(self, client_data: bytes, challenge: bytes, use: PasskeyUse) -> str | None:
        try:
            members = json_object(client_data)
        except ValueError as error:
            return f"the client data cannot be read in one way only: {error}"
        if members.get("type") != "webauthn.get":
            return "the type of the client data is not webauthn.get"
        if members.get("challenge") != b64encode(challenge):
            return "the challenge is that of another message"
        origin = members.get("origin")
        if not any(one.origin == origin and one.use == use for one in self.origins):
            return f"the trust bundle had no {use} origin {visible_name(str(origin)[:300])} then"
        if members.get("crossOrigin", False) is not False or "topOrigin" in members:
            return "it was signed inside a page of another origin"
        return None

    def _authenticator_data_problem(self, data: bytes) -> str | None:
        if len(data) < _HEAD_BYTES:
            return "the authenticator data is too short"
        flags = data[32]
        if data[:32] != hashlib.sha256(self.rp_id.encode()).digest():
            return "the passkey was used for another rpId"
        if not flags & _USER_PRESENT or not flags & _USER_VERIFIED:
            return "the authenticator did not verify the user"
        if flags & _ATTESTED_DATA:
            return "an assertion has no attested credential data"
        if flags & _BACKED_UP and not flags & _BACKUP_ELIGIBLE:
            return "the passkey is backed up, and not eligible for that"
        if self.backup_eligible is not None and self.backup_eligible != bool(flags & _BACKUP_ELIGIBLE):
            return "the backup eligibility of a passkey never changes"
        extensions = data[_HEAD_BYTES:]
        # A CBOR map (RFC 8949, 3.1: major type 5), or nothing. What is in it does not matter here.
        if flags & _EXTENSION_DATA and (not extensions or extensions[0] >> 5 != 5):
            return "the authenticator data lacks the extensions that it announces"
        if not flags & _EXTENSION_DATA and extensions:
            return "the authenticator data has bytes that belong to nothing"
        return None

    def _signature_problem(self, signature: bytes, data: bytes, client_data: bytes) -> str | None:
        if not self._key.verifies_der(signature, data + hashlib.sha256(client_data).digest()):
            return "the signature is not the passkey's"
        return None


VerificationKey = PublicKey | PasskeyKey


def sign_count_of(assertion: bytes) -> int | None:
    """The signCount of a verified assertion, for the trail alone; None of what is no assertion.

    It decides nothing: replicas would race, and synchronised passkeys leave it at 0 (WebAuthn Level 3, 6.1.1).
    """
    parts = _ASSERTION.fullmatch(assertion)
    return int.from_bytes(b64decode(parts[1])[33:_HEAD_BYTES]) if parts else None


def challenge_of(signing_input: bytes) -> bytes:
    """The challenge by which a passkey signs a JWS Signing Input."""
    return hashlib.sha256(CHALLENGE_PREFIX + signing_input).digest()
