"""Checksums in issued credentials, which distinguish a real token from text of the same format."""

from __future__ import annotations

import base64
import binascii
import json
import zlib
from typing import Any, Final

_BASE62: Final = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_BECH32: Final = "qpzry9x8gf2tvdw0s3jn54khce6mua7l"
_BECH32_GENERATORS: Final = (0x3B6A57B2, 0x26508E6D, 0x1EA119FA, 0x3D4233DD, 0x2A1462B3)


def base62(number: int, length: int) -> str:
    """Return a number in base 62 (digits, upper case, lower case), with leading zeros."""
    digits = ""
    while number:
        number, digit = divmod(number, 62)
        digits = _BASE62[digit] + digits
    return digits.rjust(length, "0")


def crc32_base62(token: str) -> bool:
    """Check the last six characters against the CRC-32 of the characters between the prefix and them (GitHub, npm)."""
    body = token.rpartition("_")[2]
    return base62(zlib.crc32(body[:-6].encode()), 6) == body[-6:]


def crc32_hex(token: str) -> bool:
    """Check the last eight characters against the CRC-32 of all before the underscore (Grafana)."""
    body, _, checksum = token.rpartition("_")
    return f"{zlib.crc32(body.encode()):08x}" == checksum.lower()


def aws_account(key_id: str) -> str | None:
    """Return the account number in an AWS access key id; None for ids of the older form, which have none."""
    try:
        raw = base64.b32decode(key_id[4:20])
    except binascii.Error:
        return None
    number = (int.from_bytes(raw[:6], "big") & 0x7FFF_FFFF_FF80) >> 7
    return f"{number:012d}" if 0 < number < 10**12 else None


def macaroon_pypi(token: str) -> bool:
    """Check that the token is a macaroon of pypi.org or test.pypi.org."""
    body = token.removeprefix("pypi-")
    try:
        raw = base64.urlsafe_b64decode(body + "=" * (-len(body) % 4))
    except (binascii.Error, ValueError):
        return False
    return b"pypi.org" in raw[:24]


def bech32(text: str) -> bool:
    """Check a Bech32 string (BIP 173), such as the secret key of age."""
    text = text.lower()
    prefix, _, data = text.rpartition("1")
    if not prefix or not set(data) <= set(_BECH32):
        return False
    values = [ord(char) >> 5 for char in prefix] + [0] + [ord(char) & 31 for char in prefix]
    values += [_BECH32.index(char) for char in data]
    check = 1
    for value in values:
        top = check >> 25
        check = (check & 0x1FF_FFFF) << 5 ^ value
        for bit, generator in enumerate(_BECH32_GENERATORS):
            if top >> bit & 1:
                check ^= generator
    return check == 1


def jwt_parts(token: str) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return header and claims of a compact JWS, unverified; None if it is none."""
    parts = token.split(".")
    if len(parts) != 3:
        return None
    found = []
    for part in parts[:2]:
        try:
            document = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        except (ValueError, RecursionError):
            return None
        if not isinstance(document, dict):
            return None
        found.append(document)
    return (found[0], found[1]) if "alg" in found[0] else None


def base64_key(token: str) -> bool:
    """Check that the text is base64 of 64 bytes: a key of an Azure storage account."""
    try:
        return len(base64.b64decode(token, validate=True)) == 64
    except (binascii.Error, ValueError):
        return False
