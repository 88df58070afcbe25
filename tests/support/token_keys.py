"""Keys for tokens, as operators make them."""

from __future__ import annotations

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa


def rsa_key_file(folder: Path) -> Path:
    """An RSA key, as `openssl genpkey` writes it, that nobody else can read."""
    file = folder / "issuer-token-rs256.pem"
    file.touch(mode=0o600)
    file.write_bytes(
        rsa.generate_private_key(public_exponent=65537, key_size=2048).private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return file
