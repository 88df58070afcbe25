"""The key of the run's instance (ECDSA P-256) and its signatures: RFC 7517, 7638 and 7515 with `cryptography` alone.

`kernel.crypto` does the same with pydantic, whose import costs more than all of init: each run would wait for it. Tests
read everything that is written here with `kernel.crypto`.
"""

from __future__ import annotations

import hashlib
import json
import os
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from ringfence.kernel.base.private_files import open_private


class InstanceKey:
    """A private key in this process."""

    def __init__(self) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        numbers = self._key.public_key().public_numbers()
        self.jwk = {
            "kty": "EC",
            "crv": "P-256",
            "x": _base64url(numbers.x.to_bytes(32)),
            "y": _base64url(numbers.y.to_bytes(32)),
        }
        """The public key."""
        members = {name: self.jwk[name] for name in sorted(self.jwk)}
        self.kid = _base64url(hashlib.sha256(_json(members)).digest())
        """Its thumbprint."""

    def sign(self, typ: str, claims: Mapping[str, Any]) -> str:
        """Sign a message of this type, such as `instance.enrol`, as a compact JWS."""
        header = {"alg": "ES256", "kid": self.kid, "typ": f"ringfence.{typ}+jwt"}
        signing_input = f"{_base64url(_json(header))}.{_base64url(_json(claims))}"
        r, s = decode_dss_signature(self._key.sign(signing_input.encode(), ec.ECDSA(hashes.SHA256())))
        return f"{signing_input}.{_base64url(r.to_bytes(32) + s.to_bytes(32))}"

    def save(self, path: Path, owner: str) -> None:
        """Write the key to a new key file (mode 0600) that names its owner. Raises OSError, NotPrivateError."""
        secret = _base64url(self._key.private_numbers().private_value.to_bytes(32))
        with os.fdopen(open_private(path, os.O_WRONLY | os.O_EXCL), "wb") as file:
            file.write(_json({"id": owner, "jwk": {**self.jwk, "d": secret}}) + b"\n")


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _base64url(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()
