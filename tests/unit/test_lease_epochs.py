"""Which records of leases count, by the order of each partition."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.lease import LeaseEpoch
from ringfence.messages.topics import LEASE
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.leases.epochs import Epochs, marker_key, number_of

TD = "acme.example"
ONE, TWO, OTHER_TWO, THREE = "1.aaaaaaaa", "2.bbbbbbbb", "2.cccccccc", "3.aaaaaaaa"


class Markers:
    """A trust domain with a revoker and an issuer, and markers by them."""

    def __init__(self) -> None:
        self.now_s = int(time.time())
        self._offsets = count()
        root = SigningKey.generate(f"spiffe://{TD}/root")
        self.trust = TrustStore(TD, root.kid)
        self.keys = {
            role: SigningKey.generate(f"spiffe://{TD}/service/{role}") for role in ("revoker", "issuer")
        }
        bundle = TrustBundle(
            iss=root.id, aud=TD, iat=self.now_s, exp=self.now_s + 9999, jti="b", version=1,
            services=tuple(
                ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(self.now_s + 9999),))  # type: ignore[arg-type]
                for role, key in self.keys.items()
            ),
        )  # fmt: skip
        self.trust.load(sign(bundle, root, header_jwk=True), self.now_s)

    def marker(self, epoch: str, by: str = "revoker", key: str | None = None, **fields: Any) -> Received:
        signer = self.keys[by]
        given = {"iss": signer.id, "aud": TD, "iat": self.now_s, "jti": "m", "epoch": epoch, "partition": 0}
        claims = LeaseEpoch(**{**given, **fields})
        value = sign(claims, signer).encode()
        at_ms = (self.now_s + 1) * 1000
        return Received(LEASE, "t.lease.v1", 0, next(self._offsets), at_ms, key or marker_key(epoch), value)

    def at_end(self, key: str, value: bytes, partition: int = 0) -> Received:
        """A record after all that there are."""
        return Received(LEASE, "t.lease.v1", partition, next(self._offsets), 0, key, value, ())

    def here(self, partition: int = 0) -> Received:
        """A record at this place, of whatever lease."""
        return self.at_end("lease", b"x", partition)


@pytest.fixture(scope="module")
def markers() -> Markers:
    return Markers()


@pytest.fixture
def epochs(markers: Markers) -> Epochs:
    return Epochs(markers.trust)


def test_records_of_an_older_epoch_are_void_from_the_marker_on(epochs: Epochs, markers: Markers) -> None:
    assert not epochs.is_void(markers.here(), ONE)
    assert epochs.took(markers.marker(ONE))
    assert not epochs.is_void(markers.here(), ONE)
    assert epochs.took(markers.marker(TWO))
    assert [epochs.is_void(markers.here(), one) for one in (ONE, TWO, None)] == [True, False, False]
    assert not epochs.is_void(markers.here(1), ONE), "each partition has an order of its own"
    assert (epochs.of(0), epochs.of(1), epochs.highest()) == (TWO, None, 2)


def test_record_read_again_is_judged_the_same(epochs: Epochs, markers: Markers) -> None:
    first, record, second, late = markers.marker(ONE), markers.here(), markers.marker(TWO), markers.here()
    for _ in range(2):
        assert epochs.took(first)
        assert not epochs.is_void(record, ONE)
        assert epochs.took(second)
        assert epochs.is_void(late, ONE)


def test_of_two_who_begin_at_once_the_first_counts(epochs: Epochs, markers: Markers) -> None:
    for one in (TWO, OTHER_TWO, ONE):
        epochs.took(markers.marker(one))
    assert epochs.of(0) == TWO
    assert epochs.is_void(markers.here(), OTHER_TWO)
    epochs.took(markers.marker(THREE))
    assert epochs.is_void(markers.here(), TWO)


def test_a_higher_one_than_is_known_counts(epochs: Epochs, markers: Markers) -> None:
    epochs.took(markers.marker(ONE))
    assert not epochs.is_void(markers.here(), TWO), "its marker stands before where this reader began"


@pytest.mark.parametrize(
    "fields",
    [{"by": "issuer"}, {"partition": 1}, {"key": marker_key(TWO)}, {"aud": "elsewhere.example"}],
    ids=["signed by an issuer", "of another partition", "under another key", "of another domain"],
)
def test_a_marker_that_does_not_hold_begins_nothing(
    epochs: Epochs, markers: Markers, fields: dict[str, Any]
) -> None:
    record = markers.marker(ONE, **fields)
    assert epochs.took(record), "it is no lease either"
    assert epochs.of(0) is None
    garbage = Received(LEASE, "t.lease.v1", 0, 0, 0, marker_key(ONE), b"x")
    assert epochs.took(garbage)
    assert epochs.highest() == 0


def test_record_that_is_no_marker_is_left_to_the_reader(epochs: Epochs) -> None:
    for key in (None, "", "0c6f2f2e-55a3-5f0e-8f4e-2f2e55a35f0e"):
        assert not epochs.took(Received(LEASE, "t.lease.v1", 0, 0, 0, key, b"x"))


def test_epochs_are_compared_by_their_numbers() -> None:
    assert [number_of(one) for one in (None, ONE, "12.00000000")] == [0, 1, 12]
