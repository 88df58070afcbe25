"""One text for each sequence of bytes, and one sequence of bytes for each text: else one signature has two digests."""

from __future__ import annotations

import base64
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.kernel.crypto.keys import b64decode, b64encode

URL_SAFE = string.ascii_letters + string.digits + "-_"
LOOSE = st.text(URL_SAFE + "+/= \n.é", max_size=12) | st.text(URL_SAFE, max_size=12)


@given(st.binary(max_size=100))
def test_encoded_bytes_are_decoded_to_the_same(data: bytes) -> None:
    assert b64decode(b64encode(data)) == data
    assert b64decode(b64encode(data).encode()) == data
    assert b64encode(data) == base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@given(LOOSE)
def test_decoder_accepts_only_canonical_text(text: str) -> None:
    try:
        data = b64decode(text)
    except ValueError:
        padded = (text + "=" * (-len(text) % 4)).encode()
        try:
            lenient = base64.b64decode(padded, altchars=b"-_", validate=True)
        except ValueError:
            return
        assert b64encode(lenient) != text
    else:
        assert b64encode(data) == text


@pytest.mark.parametrize("text", ["A", "AB", "AAB", "QQ==", "+/+/", "AA A", "AAA\n", "é"])
def test_non_canonical_base64url_is_rejected(text: str) -> None:
    with pytest.raises(ValueError):
        b64decode(text)
