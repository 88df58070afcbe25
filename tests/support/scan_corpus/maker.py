"""Cases of the corpus, and the maker of their secrets."""

from __future__ import annotations

import base64
import json
import random
import string
import zlib
from collections.abc import Callable
from dataclasses import dataclass

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from ringfence.scan.kinds import base62

ALNUM = string.ascii_letters + string.digits
HEX = "0123456789abcdef"
BASE36 = string.ascii_lowercase + string.digits
UPPER36 = string.ascii_uppercase + string.digits
BASE64 = ALNUM + "+/"
URL_SAFE = ALNUM + "-_"


@dataclass(frozen=True)
class Secret:
    """One planted secret: its value, and the pattern that the finding must have."""

    value: str
    pattern: str


@dataclass(frozen=True)
class Case:
    """One file of the corpus: what has to be found in it, or nothing."""

    reader: str
    path: str
    content: bytes
    secrets: tuple[Secret, ...] = ()
    label: str = ""
    """The class for measurements: the reader, or the kind for plain text."""
    unread: tuple[str, ...] = ()
    """Patterns of findings without a value: a credential is there, and the scan cannot read it."""


class Maker:
    """Makes secrets from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)

    def chars(self, alphabet: str, length: int) -> str:
        """Random characters, with a digit and letters among them where the alphabet has both."""
        while True:
            text = "".join(self.random.choice(alphabet) for _ in range(length))
            mixed = any(map(str.isdigit, alphabet)) and any(map(str.isalpha, alphabet))
            if length < 8 or not mixed or (any(map(str.isdigit, text)) and any(map(str.isalpha, text))):
                return text

    def token(self, length: int = 40) -> str:
        return self.chars(ALNUM, length)

    def password(self) -> str:
        return self.chars(ALNUM + "!%^*_+=-", self.random.randint(10, 20)).replace("--", "x-") + "7q"

    def digits(self, length: int) -> str:
        return self.chars(string.digits[1:], length)

    def crc_token(self, prefix: str, length: int = 30) -> str:
        body = self.token(length)
        return f"{prefix}_{body}{base62(zlib.crc32(body.encode()), 6)}"

    def counterfeit(self, prefix: str) -> str:
        """A token like those of `crc_token`, with a wrong checksum."""
        token = self.crc_token(prefix)
        return token[:-1] + ("a" if token[-1] != "a" else "b")

    def pypi_token(self) -> str:
        body = b"\x02\x01\x08pypi.org\x02" + self.random.randbytes(120)
        return f"pypi-{base64.urlsafe_b64encode(body).decode().rstrip('=')}"

    def grafana_token(self) -> str:
        body = f"glsa_{self.token(32)}"
        return f"{body}_{zlib.crc32(body.encode()):08x}"

    def sentry_claims(self) -> str:
        return base64.b64encode(
            json.dumps({"iat": 1789.5, "url": "https://sentry.io", "org": self.token(12)}).encode()
        ).decode()

    def onepassword_token(self) -> str:
        claims = {"signInAddress": "corp.1password.com", "secretKey": self.token(34), "srpX": self.chars(HEX, 64),
                  "muk": {"k": self.chars(URL_SAFE, 43)}, "email": f"{self.token(12)}@1passwordserviceaccounts.com"}  # fmt: skip
        return f"ops_{base64.urlsafe_b64encode(json.dumps(claims, separators=(',', ':')).encode()).decode().rstrip('=')}"

    def age_key(self) -> str:
        """A secret key of age: Bech32 (BIP 173) of 32 bytes, in capitals."""
        alphabet, prefix = "qpzry9x8gf2tvdw0s3jn54khce6mua7l", "age-secret-key-"
        data = [self.random.randrange(32) for _ in range(51)] + [self.random.choice((0, 16))]
        values = [ord(char) >> 5 for char in prefix] + [0] + [ord(char) & 31 for char in prefix] + data
        check = _bech32_polymod([*values, *[0] * 6]) ^ 1
        whole = data + [(check >> 5 * (5 - at)) & 31 for at in range(6)]
        return (prefix + "1" + "".join(alphabet[one] for one in whole)).upper()

    def aws_id(self, prefix: str = "AKIA") -> str:
        return prefix + self.chars(string.ascii_uppercase + "234567", 16)

    def aws_secret(self) -> str:
        return self.chars(BASE64, 40)

    def jwt(self, **claims: object) -> str:
        def part(value: object) -> str:
            return base64.urlsafe_b64encode(json.dumps(value).encode()).decode().rstrip("=")

        claims = {"iss": "https://idp.test", "sub": "maria@corp.test", "exp": 1999999999, **claims}
        return f"{part({'alg': 'RS256', 'typ': 'JWT'})}.{part(claims)}.{self.chars(URL_SAFE, 342)}"

    def ssh_key(self) -> str:
        key = ed25519.Ed25519PrivateKey.from_private_bytes(self.random.randbytes(32))
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
        ).decode()

    def locked_ssh_key(self) -> str:
        """In the form of PROTOCOL.key, with a cipher; what is encrypted is random."""

        def field(value: bytes) -> bytes:
            return len(value).to_bytes(4, "big") + value

        options = field(self.random.randbytes(16)) + (16).to_bytes(4, "big")
        public = field(field(b"ssh-ed25519") + field(self.random.randbytes(32)))
        body = (
            b"openssh-key-v1\0"
            + field(b"aes256-ctr")
            + field(b"bcrypt")
            + field(options)
            + (1).to_bytes(4, "big")
        )
        text = base64.b64encode(body + public + field(self.random.randbytes(144))).decode()
        lines = "\n".join(text[at : at + 70] for at in range(0, len(text), 70))
        return f"-----BEGIN OPENSSH PRIVATE KEY-----\n{lines}\n-----END OPENSSH PRIVATE KEY-----\n"

    def pem(self) -> str:
        key = ec.derive_private_key(self.random.getrandbits(250) + 1, ec.SECP256R1())
        return key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()


def _bech32_polymod(values: list[int]) -> int:
    check = 1
    for value in values:
        top = check >> 25
        check = (check & 0x1FF_FFFF) << 5 ^ value
        for bit, generator in enumerate((0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)):
            if top >> bit & 1:
                check ^= generator
    return check


def pem_body(pem: str) -> str:
    """The base64 of a PEM file, which is the secret."""
    return "".join(line for line in pem.strip().splitlines() if not line.startswith("-----"))


S, U, A, P, OTHER = "static-key", "user-token", "service-account", "password", "other"
Build = Callable[[Maker], Case]
BUILDERS: list[Build] = []


def case(build: Build) -> Build:
    BUILDERS.append(build)
    return build


def of(
    reader: str,
    path: str,
    text: str | bytes,
    *secrets: tuple[str, str],
    label: str = "",
    unread: tuple[str, ...] = (),
) -> Case:
    """Return a case of one file. `secrets`: value and pattern of each."""
    content = text.encode() if isinstance(text, str) else text
    return Case(reader, path, content, tuple(Secret(*one) for one in secrets), label or reader, unread)
