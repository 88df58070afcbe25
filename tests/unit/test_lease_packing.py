"""Records in Redis are smaller, and read as they were: to the byte, or as something that no reader takes for a JWS."""

from __future__ import annotations

import uuid
import zlib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id, lease_id
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.messages.base import Permission
from ringfence.messages.lease import Delegator, EndCause, Lease, LeaseStatus
from ringfence.model.lease_store.codec.records import (
    pack,
    unpack,
    unverified_names,
    unverified_payload,
)
from ringfence.model.leases.lifecycle import follow, selector_keys
from tests.support.leases import lease

ISSUER, REVOKER = "spiffe://acme.example/service/issuer", "spiffe://acme.example/service/revoker"
EPOCH = "12.0a1b2c3d"
BY: dict[str, Any] = {"by": "spiffe://acme.example/user/olga", "ref": "7d1c", "reason": 'she said: "stop"\n'}
_ORDERED = EndCause(kind="revocation", at_ms=1_795_639_400_017, **BY)
CAUSES: dict[LeaseStatus, EndCause] = {
    "expired": EndCause(kind="deadline", at_ms=1_795_639_476_000),
    "ending": _ORDERED,
    "revoked": _ORDERED,
    "aborted": EndCause(kind="mint_failed", at_ms=1_795_639_400_017),
}


def issued(**fields: Any) -> Lease:
    """A lease as an issuer writes it: what can be derived is."""
    request_id = str(uuid.uuid4())
    derived = {
        "iss": ISSUER,
        "request_id": request_id,
        "lease_id": lease_id(request_id),
        "decision_id": derived_id("decision", request_id, "allowed"),
        "cause": None,
        "agent_id": "deploy-bot",
        "deadline": 1_795_639_476,
    }
    return lease(**{**derived, **fields}).claims


def after(claims: Lease, status: LeaseStatus, epoch: str | None = EPOCH) -> Lease:
    return follow(claims, status, by=REVOKER, cause=CAUSES[status], epoch=epoch)


ELSEWHERE = Permission(target="elsewhere", verbs=("read", "write"), resources=("a b/*", "ü/**"))
AS_WRITTEN = {
    "active": issued(),
    "minting": issued(status="minting", backend="redis"),
    "by the gateway": issued(delivery="gateway"),
    "of another second": issued(requested_at_ms=1_795_639_000_999, iat=1_795_639_001),
    "not bound, not traced": issued(key_thumbprint=None, traceparent=None),
    "on several permissions": issued(scope=(*issued().scope, ELSEWHERE)),
    "on none": issued(scope=()),
    "on grants": issued(grants=(str(uuid.uuid4()), str(uuid.uuid4()))),
    "on break glass": issued(break_glass=True),
    "expired": after(issued(), "expired"),
    "ending": after(issued(), "ending"),
    "revoked": after(after(issued(), "ending"), "revoked"),
    "aborted, before there were epochs": after(issued(status="minting"), "aborted", None),
}
OTHERWISE = {
    "an id that does not follow": issued(lease_id=str(uuid.uuid4())),
    "a decision that does not": issued(decision_id="d1"),
    "several agents": issued(act=("one", "two")),
    "of a task that was handed on": issued(
        act=("deploy-bot", "one"),
        delegators=(Delegator(agent_id="one", task_id=str(uuid.uuid4()), sponsor="suzy"),),
    ),
    "a field of a newer version": issued(newer={"a": 1}),
    "a name with quotes": issued(on_behalf_of='ma"ria'),
    "a blank between texts": issued(sponsor="sam\0"),
    "a moment beyond": issued(deadline=2**33),
    "a seq beyond": issued(seq=300),
    "signed by somebody else": issued(iss="spiffe://acme.example/agent/bot"),
}


def names_of(claims: Lease) -> set[str]:
    return set(selector_keys(claims))


def names_in(stored: bytes) -> set[str]:
    return {
        f"{kind}:{name}"
        for kind in ("agent", "task", "target", "sponsor", "user")
        for name in unverified_names(stored, kind) or ()
    }


@pytest.mark.parametrize("alg", ["ES256", "EdDSA"])
@pytest.mark.parametrize("what", AS_WRITTEN)
def test_a_record_is_a_third_of_its_size_and_byte_for_byte_what_it_was(what: str, alg: str) -> None:
    record = sign(AS_WRITTEN[what], SigningKey.generate(REVOKER, alg))
    stored = pack(record)
    assert len(stored) < 0.34 * len(record)
    assert unpack(stored) == record.encode()
    assert unverified_payload(stored) == parse(record).payload
    assert names_in(stored) == names_of(AS_WRITTEN[what])


@pytest.mark.parametrize("what", OTHERWISE)
def test_unusual_serialisation_is_packed_without_loss(what: str) -> None:
    record = sign(OTHERWISE[what], SigningKey.generate(REVOKER))
    stored = pack(record)
    assert len(stored) < 0.45 * len(record)
    assert unpack(stored) == record.encode()
    assert unverified_payload(stored) == parse(record).payload
    assert names_in(stored) == names_of(OTHERWISE[what])


@given(st.binary(), st.binary(), st.binary(min_size=64, max_size=64) | st.binary())
def test_any_jws_survives_packing(header: bytes, payload: bytes, signature: bytes) -> None:
    text = ".".join(map(b64encode, (header, payload, signature)))
    assert unpack(pack(text)) == text.encode()


@given(st.text(alphabet=st.characters(min_codepoint=32, exclude_categories=["Cs"])))
def test_any_text_survives_packing(text: str) -> None:
    assert unpack(pack(text)) == text.encode()


def test_non_canonical_jws_survives_packing() -> None:
    key = SigningKey.generate(REVOKER)
    head, payload, signature = sign(lease().claims, key).split(".")
    for text in (f"{head}=.{payload}.{signature}", f"{head}.{payload}.{signature[:-1]}_"):
        assert unpack(pack(text)) == text.encode()


@pytest.mark.parametrize("begins", [b"\x01", b"\x02"])
@given(rest=st.binary())
def test_foreign_packed_bytes_are_no_record(begins: bytes, rest: bytes) -> None:
    with pytest.raises(InvalidMessageError):
        parse(unpack(begins + bytes(64) + rest))


def test_a_record_that_somebody_changed_or_cut_is_not_the_record() -> None:
    record = sign(AS_WRITTEN["active"], SigningKey.generate(REVOKER))
    stored = pack(record)
    for at in range(1, len(stored)):
        changed = stored[:at] + bytes((stored[at] ^ 1,)) + stored[at + 1 :]
        assert unpack(changed) != record.encode()
        assert unpack(stored[:at]) != record.encode()


def test_decompression_bomb_is_no_record() -> None:
    deflating = zlib.compressobj(9, zlib.DEFLATED, -12)
    bomb = deflating.compress(bytes(64 * 1024 * 1024)) + deflating.flush()
    stored = b"\x01" + bytes(64) + bomb
    assert unpack(stored) == stored
