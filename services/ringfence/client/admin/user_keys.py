"""Keys of people: invite to a key, prove, co-sign and list keys, and verify the attestation of a new passkey.

An invitation, a possession and a co-signature are signed apart, often by three people, and go into one
`user.add-key`. None of them adds anything by itself. An attestation is the maker's statement that a passkey lives in
an authenticator of that model (WebAuthn Level 3, 7.1 and 8). An operator verifies it against roots of their choice,
before they sign the key in as attested. Needs the extra `passkeys`.
"""

from __future__ import annotations

import hashlib
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from pydantic import ValidationError

from ringfence.client.connection import Connection
from ringfence.client.errors import InvalidCallError, checked
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.base.validation_problems import explain
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode, thumbprint
from ringfence.messages.base import Claims, KeyRecord, PublicJwk
from ringfence.messages.codes import Code
from ringfence.messages.registry import KeyEndorsement, KeyPossession, UserInvite, UserState
from ringfence.model.lifecycle import KeyOrigin
from ringfence.model.records.directory import Directory

INVITATION_LIFE_S: Final = 24 * 3600
"""The longest life of an invitation, and so of the possession that answers it."""
MAX_PACKAGE_BYTES: Final = 64 * 1024


@dataclass(frozen=True, slots=True)
class KeyPackage:
    """A new key of a person, with the proof that they have it: what the sign page, or `ringfence key prove`, gives out.

    Nothing of it is verified here. The registry and every reader verify invitation and possession.
    """

    user_id: str
    invitation: str
    possession: str
    jwk: PublicJwk
    passkey: Mapping[str, Any]
    """The fields of a passkey's key record; empty for a key file."""
    attestation_object: str | None = None
    """base64url, of a passkey whose authenticator attests."""
    client_data: str | None = None
    """base64url: the client data of the registration, which the attestation covers."""

    @property
    def kid(self) -> str:
        """The key's thumbprint."""
        return thumbprint(self.jwk)

    def record(self, not_after: int, *, attested: bool = False) -> KeyRecord:
        """Return the key as records have it. `attested`: its attestation was verified (`passkey_attestation`)."""
        with checked("the key"):
            return KeyRecord(
                kid=self.kid,
                jwk=self.jwk,
                not_after=not_after,
                attested=True if attested else None,
                **self.passkey,
            )

    def text(self) -> str:
        """Return the package as JSON."""
        document = {
            "user": self.user_id,
            "jwk": self.jwk.model_dump(exclude_none=True),
            "invitation": self.invitation,
            "possession": self.possession,
            **{name: value for name, value in self.passkey.items() if name != "use"},
            "attestation_object": self.attestation_object,
            "client_data": self.client_data,
        }
        return json.dumps({name: value for name, value in document.items() if value is not None})


def read_package(text: str) -> KeyPackage:
    """Parse a package. Raises InvalidCallError."""
    if len(text) > MAX_PACKAGE_BYTES:
        raise InvalidCallError(f"the package has {len(text)} characters; the limit is {MAX_PACKAGE_BYTES}")
    try:
        document = json.loads(text)
        jwk = PublicJwk.model_validate(document["jwk"])
        claims = parse(document["possession"]).unverified_claims(KeyPossession)
        parse(document["invitation"]).unverified_claims(UserInvite)
        passkey: dict[str, Any] = {}
        if document.get("credential_id") is not None:
            passkey = {
                "use": "webauthn",
                **{
                    name: document.get(name)
                    for name in ("credential_id", "rp_id", "aaguid", "backup_eligible")
                },
            }
        return (
            KeyPackage(
                str(document["user"]),
                document["invitation"],
                document["possession"],
                jwk,
                passkey,
                document.get("attestation_object"),
                document.get("client_data"),
            )
            if claims.user_id == document["user"]
            else _refuse("it is for another user than its possession")
        )
    except ValidationError as error:
        return _refuse(explain(error))
    except (ValueError, KeyError, TypeError, AttributeError):
        return _refuse("it is not the JSON that the sign page gives out")
    except InvalidMessageError as error:
        return _refuse(str(error))


def _refuse(reason: str) -> KeyPackage:
    raise InvalidCallError(
        f"this is no package of a new key: {reason}; get it from the sign page, or with: ringfence key prove"
    )


def invite(connection: Connection, user_id: str, valid_s: int = INVITATION_LIFE_S) -> str:
    """Sign an invitation to make a key, and return it (compact JWS). Nothing is sent."""
    if not 0 < valid_s <= INVITATION_LIFE_S:
        raise InvalidCallError(f"an invitation is valid for {INVITATION_LIFE_S // 3600} h at most")
    _require_key_file(connection, UserInvite)
    jti = secrets.token_urlsafe(32)
    return sign(connection.compose(UserInvite, life_s=valid_s, jti=jti, user_id=user_id), connection.key)


def prove(key: SigningKey, invitation: str, now_s: int) -> KeyPackage:
    """Sign that one has a new key, in answer to an invitation; for key files. `key.id` is the user's.

    Raises InvalidCallError if the invitation is none, or is for somebody else.
    """
    try:
        claims = parse(invitation).unverified_claims(UserInvite)  # verified by whoever adds the key
    except InvalidMessageError as error:
        raise InvalidCallError(f"this is no invitation: {error}") from None
    if key.id != f"spiffe://{claims.aud}/user/{claims.user_id}":
        raise InvalidCallError(f"the invitation is for {claims.user_id}, the key is of {key.id}")
    if now_s >= claims.exp:
        raise InvalidCallError("the invitation has ended; ask for another").with_remedy(
            f"ringfence user invite {claims.user_id}"
        )
    possession = KeyPossession(
        iss=key.id,
        aud=claims.aud,
        iat=now_s,
        exp=claims.exp,
        jti=secrets.token_urlsafe(32),
        user_id=claims.user_id,
        jwk=key.public,
        invitation=claims.jti,
    )
    return KeyPackage(claims.user_id, invitation, sign(possession, key), key.public, {})


def endorse(connection: Connection, package: KeyPackage, valid_s: int = INVITATION_LIFE_S) -> str:
    """Co-sign a new key as the second operator, and return the signature (compact JWS). Nothing is sent."""
    _require_key_file(connection, KeyEndorsement)
    claims = connection.compose(
        KeyEndorsement,
        life_s=valid_s,
        user_id=package.user_id,
        kid=package.kid,
        possession_digest=digest(package.possession),
    )
    return sign(claims, connection.key)


def _require_key_file(connection: Connection, model: type[Claims]) -> None:
    if connection.passkey_user is not None:
        raise InvalidCallError(f"no passkey signs {model.typ}: it needs a key file (--identity FILE)")


@dataclass(frozen=True, slots=True)
class KeyOfUser:
    """A key as `ringfence user keys` shows it."""

    key: KeyRecord
    origin: KeyOrigin | None
    compromised: bool


def keys_of(directory: Directory, state: UserState) -> list[KeyOfUser]:
    """Return the keys of a user, the latest first, with where they come from."""
    origins = directory.key_history(state.user_id).origins
    found = [KeyOfUser(key, origins.get(key.kid), key.kid in (state.compromised or ())) for key in state.keys]
    return sorted(found, key=lambda one: one.origin.added_ms if one.origin else 0, reverse=True)


class AttestationError(RingfenceError):
    """A passkey's attestation does not hold against the given roots. The key can be added without it."""

    code = Code.ATTESTATION_INVALID


def verify_attestation(package: KeyPackage, root_pems: Sequence[bytes]) -> None:
    """Verify that the key in a package was made in an authenticator whose maker is among these roots.

    Args:
        package: what the sign page gave out.
        root_pems: certificates of makers, each file with one or more in PEM.

    Raises AttestationError with the reason, InvalidCallError if a root cannot be read, or the extra is missing.
    """
    try:
        from fido2.attestation.base import InvalidAttestation
        from fido2.webauthn import AttestationObject
    except ImportError:
        raise InvalidCallError(
            "attestation needs the extra `passkeys`: pip install 'ringfence[passkeys]'"
        ) from None
    if package.attestation_object is None or package.client_data is None:
        raise AttestationError("the package has no attestation; the page did not ask for one, or got none")
    roots = [certificate for pem in root_pems for certificate in _certificates(pem)]
    try:
        attested = AttestationObject(b64decode(package.attestation_object))
        client_data = b64decode(package.client_data)
        created = json.loads(client_data).get("type") == "webauthn.create"
        if (reason := _difference(package, attested.auth_data)) or not created:
            raise AttestationError(f"the attestation is of another key: {reason or 'not of a registration'}")
        _verifier(roots).verify_attestation(attested, hashlib.sha256(client_data).digest())
    except InvalidAttestation as error:
        raise AttestationError(
            f"no given root vouches for this passkey ({type(error).__name__}); give the maker's root, or add the key "
            "without --attestation-root"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise AttestationError(f"the attestation cannot be read ({type(error).__name__})") from None


def _difference(package: KeyPackage, data: Any) -> str | None:
    """In what the attested credential is not the one in the package; None if it is that one."""
    credential, passkey = data.credential_data, package.passkey
    if credential is None:
        return "it has no credential"
    key = credential.public_key
    if (key.get(1), key.get(3), key.get(-1)) != (2, -7, 1):
        return "its key is no P-256 key"
    same = {
        "key": (b64encode(key[-2]), b64encode(key[-3])) == (package.jwk.x, package.jwk.y),
        "credential id": b64encode(credential.credential_id) == passkey.get("credential_id"),
        "AAGUID": str(credential.aaguid) == (passkey.get("aaguid") or "00000000-0000-0000-0000-000000000000"),
        "rpId": data.rp_id_hash == hashlib.sha256(str(passkey.get("rp_id")).encode()).digest(),
        "backup eligibility": bool(data.flags & 0x08) == bool(passkey.get("backup_eligible")),
    }
    different = [name for name, equal in same.items() if not equal]
    return f"its {', '.join(different)}" if different else None


def _verifier(roots: Sequence[Any]) -> Any:
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding
    from fido2.attestation.base import AttestationVerifier, UntrustedAttestation

    class Verifier(AttestationVerifier):
        """Trusts chains to the given roots. A passkey that attests itself, or not at all, has no chain."""

        def ca_lookup(self, attestation_result: Any, auth_data: Any) -> bytes | None:
            path = [x509.load_der_x509_certificate(der) for der in attestation_result.trust_path]
            if not path:
                return None
            if not all(map(_is_authority, path[1:])):
                raise UntrustedAttestation("a certificate in the chain is no authority's")
            found = next((root for root in roots if _is_issued_by(path[-1], root)), None)
            return bytes(found.public_bytes(Encoding.DER)) if found is not None else None

    return Verifier()


def _is_authority(certificate: Any) -> bool:
    from cryptography import x509

    try:
        return bool(certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except (x509.ExtensionNotFound, ValueError):
        return False


def _is_issued_by(certificate: Any, root: Any) -> bool:
    """Return whether a root issued a certificate, by name and signature: makers have several roots of one name."""
    from cryptography.exceptions import InvalidSignature

    try:
        certificate.verify_directly_issued_by(root)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _certificates(pem: bytes) -> Sequence[Any]:
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(pem)
    except ValueError:
        raise InvalidCallError(
            "an attestation root is a file with certificates in PEM, as makers of authenticators publish them"
        ) from None
