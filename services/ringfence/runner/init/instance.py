"""The instance of the run: its key (ECDSA P-256), its signed enrolment for the registry, and its files in memory.

Keys and signatures (RFC 7517, 7638 and 7515) need `cryptography` alone. `kernel.crypto` does the same with pydantic,
whose import costs more than all of init: each run would wait for it. Tests read everything that is written here with
`kernel.crypto`.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import sys
import time
import uuid
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

from ringfence.kernel.base.private_files import open_private, write_private
from ringfence.model.identity.spiffe_ids import spiffe_id
from ringfence.runner.control.messages import EnrolMessage, StartCommand


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


KEY_FILE: Final = "key.json"
ENROLMENT_FILE: Final = "enrolment.jws"
CA_FILE: Final = "ca.pem"
TRUST_STORE_FILE: Final = "ca.p12"
TRUST_STORE_PASSWORD: Final = "ringfence"  # noqa: S105 - certificates are public; Java wants a password
PROGRAMS: Final = "bin"
"""The folder of `ringfence`, for a sandbox that has no such program itself."""
_LIFE_S: Final = 60
_START: Final = "import sys; sys.path[:0] = {}; from ringfence.cli.main import main; sys.exit(main())"


def sign_enrolment(key: InstanceKey, enrol: EnrolMessage) -> str:
    """Sign the `instance.enrol` (compact JWS) with which the registry enrols the key."""
    now_s = int(time.time())
    return key.sign(
        "instance.enrol",
        {
            "iss": spiffe_id(enrol.trust_domain, "agent", enrol.agent_id),
            "aud": enrol.trust_domain,
            "iat": now_s,
            "exp": now_s + _LIFE_S,
            "jti": str(uuid.uuid4()),
            "key": key.jwk,
            "token": enrol.token,
        },
    )


def write_instance(key: InstanceKey, command: StartCommand, folder: str) -> None:
    """Write key, enrolment and the gateway's certificates to a folder in memory.

    Raises OSError, NotPrivateError; ValueError if the certificates are malformed.
    """
    here = Path(folder)
    key.save(here / KEY_FILE, spiffe_id(command.trust_domain, "agent", command.agent_id))
    write_private(here / ENROLMENT_FILE, command.enrolment)
    if command.ca_pem is not None:
        write_private(here / CA_FILE, command.ca_pem)
        write_private(here / TRUST_STORE_FILE, _java_trust_store(command.ca_pem.encode()))


def write_program(folder: str) -> None:
    """Write the program `ringfence`, by which a command without the SDK requests credentials. An existing one is kept.

    It runs with the Python and the packages of init. Raises OSError, NotPrivateError.
    """
    if shutil.which("ringfence") is not None:
        return
    programs = Path(folder, PROGRAMS)
    programs.mkdir(mode=0o700)
    # The folders that bootstrap.py was given; in an image with Python's own there are none.
    start = _START.format(json.dumps(sys.argv[1:]))
    words = [sys.executable, "-I", *(["-S"] if sys.flags.no_site else []), "-B", "-c", start]
    if (libraries := os.environ.get("LD_LIBRARY_PATH")) is not None:
        words = ["/usr/bin/env", f"LD_LIBRARY_PATH={libraries}", *words]
    write_private(programs / "ringfence", f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
    (programs / "ringfence").chmod(0o700)


def _java_trust_store(pem: bytes) -> bytes:
    """The certificates as a PKCS #12 trust store, the one form that Java reads without a tool of its own."""
    from cryptography.hazmat.primitives.serialization import BestAvailableEncryption
    from cryptography.hazmat.primitives.serialization.pkcs12 import (
        PKCS12Certificate,
        serialize_java_truststore,
    )
    from cryptography.x509 import load_pem_x509_certificates

    certificates = [
        PKCS12Certificate(certificate, f"gateway-{number}".encode())
        for number, certificate in enumerate(load_pem_x509_certificates(pem))
    ]
    return serialize_java_truststore(certificates, BestAvailableEncryption(TRUST_STORE_PASSWORD.encode()))
