"""A request whose answer could not be sealed is found out before anything is decided, and no other is refused."""

from __future__ import annotations

import pytest
from cryptography.hazmat.primitives.asymmetric import x25519
from hypothesis import given
from hypothesis import strategies as st

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jwe import ReplyKey, check_reply_key, seal
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode
from ringfence.messages.base import PublicJwk

P256 = [SigningKey.generate("x", "ES256").public for _ in range(20)]
P = 2**256 - 2**224 + 2**192 + 2**96 - 1
B = 0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B
X25519 = PublicJwk(
    kty="OKP", crv="X25519", x=b64encode(x25519.X25519PrivateKey.generate().public_key().public_bytes_raw())
)


def sealable(key: PublicJwk) -> bool:
    try:
        seal(b"x", key, kid="k")
    except InvalidMessageError:
        return False
    return True


def accepted(key: PublicJwk) -> bool:
    try:
        check_reply_key(key)
    except InvalidMessageError:
        return False
    return True


P25519 = 2**255 - 19


def u(number: int) -> PublicJwk:
    """A public key of X25519 by its u-coordinate (RFC 7748, 5)."""
    return PublicJwk(kty="OKP", crv="X25519", x=b64encode(number.to_bytes(32, "little")))


@pytest.mark.parametrize("key", [*P256, X25519, ReplyKey().public, u(9), u(9 + 2**255)])
def test_keys_that_work(key: PublicJwk):
    assert accepted(key)
    assert sealable(key)


def point(x: int, y: int) -> PublicJwk:
    return PublicJwk(kty="EC", crv="P-256", x=b64encode(x.to_bytes(32)), y=b64encode(y.to_bytes(32)))


ON_CURVE_AT_0 = pow(B, (P + 1) // 4, P)
"""y of the point whose x is 0."""


@pytest.mark.parametrize(
    "key",
    [
        point(0, 0),
        point(1, 1),
        point(0, 2**256 - 1),
        P256[0].model_copy(update={"y": P256[1].y}),
        P256[0].model_copy(update={"y": None}),
        P256[0].model_copy(update={"x": "AA"}),
        P256[0].model_copy(update={"x": "not base64!"}),
        # Of low order: everybody would know the secret.
        *map(u, [0, 1, P25519 - 1, P25519, P25519 + 1, 2**255, 2**255 + 1, 2**256 - 19 - 1]),
        u(325606250916557431795983626356110631294008115727848805560023387167927233504),
        u(39382357235489614581723060781553021112529911719440698176882885853963445705823),
        X25519.model_copy(update={"x": "AA"}),
        SigningKey.generate("x", "EdDSA").public,
    ],
)
def test_keys_that_do_not_work(key: PublicJwk):
    assert not accepted(key)
    assert not sealable(key)


def test_a_key_that_comes_with_its_private_half_is_refused():
    """As clients of others write keys out that are not told to leave it away. It would stand on the topic."""
    assert not accepted(PublicJwk(**ReplyKey().public.model_dump(exclude_none=True), d="AAAA"))  # type: ignore[call-arg]


def test_a_point_is_written_in_one_way_only():
    assert accepted(point(0, ON_CURVE_AT_0))
    assert not accepted(
        point(P, ON_CURVE_AT_0)
    )  # the same one, for readers who reduce; not for those who check


@given(st.sampled_from(P256), st.integers(0, 255), st.booleans())
def test_one_bit_off_the_curve_is_refused(key: PublicJwk, bit: int, in_x: bool):
    x, y = (int.from_bytes(b64decode(c)) for c in (key.x, key.y or ""))
    off = point(x ^ (1 << bit), y) if in_x else point(x, y ^ (1 << bit))
    assert accepted(off) == sealable(off)
