"""Records in Redis are smaller, and read as they were: to the byte, or as something that no reader takes for a JWS."""

from __future__ import annotations

import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.kernel.errors import InvalidMessageError
from ringfence.kernel.jws import parse, sign
from ringfence.kernel.keys import SigningKey, b64encode
from ringfence.messages.lease import EndCause
from ringfence.model.lease_store.packing import deflated, inflated
from ringfence.model.leases import follow
from tests.leases import lease

REVOKER = "spiffe://acme.example/service/revoker"


@pytest.mark.parametrize("alg", ["ES256", "EdDSA"])
def test_a_record_is_a_third_of_its_size_and_byte_for_byte_what_it_was(alg: str) -> None:
    key = SigningKey.generate(REVOKER, alg)
    claims = lease().claims
    ended = follow(claims, "expired", by=REVOKER, cause=EndCause(kind="deadline", at_ms=1_795_639_476_000))
    for record in (sign(claims, key), sign(ended, key)):
        stored = deflated(record)
        assert len(stored) < 0.4 * len(record)
        assert inflated(stored) == record.encode()


@given(st.binary(), st.binary(), st.binary(min_size=64, max_size=64) | st.binary())
def test_whatever_is_written_as_a_jws_comes_back(header: bytes, payload: bytes, signature: bytes) -> None:
    text = ".".join(map(b64encode, (header, payload, signature)))
    assert inflated(deflated(text)) == text.encode()


@given(st.text(alphabet=st.characters(min_codepoint=32)))
def test_what_is_no_jws_comes_back_as_well(text: str) -> None:
    assert inflated(deflated(text)) == text.encode()


def test_what_is_written_in_another_way_comes_back_as_it_was() -> None:
    key = SigningKey.generate(REVOKER)
    head, payload, signature = sign(lease().claims, key).split(".")
    for text in (f"{head}=.{payload}.{signature}", f"{head}.{payload}.{signature[:-1]}_"):
        assert inflated(deflated(text)) == text.encode()


@given(st.binary())
def test_what_somebody_else_put_there_is_no_record(rest: bytes) -> None:
    with pytest.raises(InvalidMessageError):
        parse(inflated(b"\x01" + bytes(64) + rest))


def test_what_would_fill_the_memory_is_no_record() -> None:
    deflating = zlib.compressobj(9, zlib.DEFLATED, -12)
    bomb = deflating.compress(bytes(64 * 1024 * 1024)) + deflating.flush()
    stored = b"\x01" + bytes(64) + bomb
    assert inflated(stored) == stored
