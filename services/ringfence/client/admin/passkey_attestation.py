"""Attestation of a new passkey: its authenticator's maker vouches that the key lives in an authenticator of that model.

WebAuthn Level 3, 7.1 and 8. An operator verifies it against roots of their choice, before they sign the key in as
attested. Needs the extra `passkeys`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ringfence.client.errors import InvalidCallError
from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.crypto.keys import b64decode, b64encode

if TYPE_CHECKING:
    from ringfence.client.admin.user_keys import KeyPackage


class AttestationError(RingfenceError):
    """A passkey's attestation does not hold against the given roots. The key can be added without it."""

    code = "attestation_invalid"


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
