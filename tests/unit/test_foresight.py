"""What is done ahead for leases that are due soon: it changes what their ends cost, and nothing else."""

from __future__ import annotations

import time
from typing import Any

import pytest

from ringfence.kernel.clock import SystemClock
from ringfence.kernel.errors import InvalidMessageError
from ringfence.kernel.jws import sign
from ringfence.kernel.keys import PublicKey, SigningKey
from ringfence.kernel.trust import TrustStore
from ringfence.messages.lease import EndCause, Lease
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.lease_store.packing import expanded
from ringfence.model.leases import follow
from ringfence.revoker.foresight import Foresight
from tests.leases import lease

TD = "acme.example"
NOW_S = int(time.time())
ROOT = SigningKey.generate(f"spiffe://{TD}/root")
ISSUER = SigningKey.generate(f"spiffe://{TD}/service/issuer")
REVOKER = SigningKey.generate(f"spiffe://{TD}/service/revoker")
DEADLINE = EndCause(kind="deadline", at_ms=(NOW_S + 600) * 1000)


def bundle(version: int, *signers: SigningKey) -> str:
    services = tuple(
        ServiceIdentity(id=key.id, roles=("issuer",), keys=(key.record(NOW_S + 9999),)) for key in signers
    )
    claims = TrustBundle(
        iss=ROOT.id, aud=TD, iat=NOW_S, exp=NOW_S + 9999, jti="b", version=version, services=services
    )
    return sign(claims, ROOT, header_jwk=True)


@pytest.fixture
def trust() -> TrustStore:
    trust = TrustStore(TD, ROOT.kid)
    trust.load(bundle(1, ISSUER), NOW_S)
    return trust


def issued(by: SigningKey = ISSUER, **fields: Any) -> bytes:
    return sign(lease(iss=ISSUER.id, aud=TD, iat=NOW_S, **fields).claims, by).encode()


def end(lease: Lease) -> Lease:
    return follow(lease, "expired", by=REVOKER.id, cause=DEADLINE)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How often something was verified, and signed."""
    counts = {"verified": 0, "signed": 0}
    verifies, signs = PublicKey.verifies, SigningKey.sign

    def counting_verifies(self: PublicKey, signature: bytes, data: bytes) -> bool:
        counts["verified"] += 1
        return verifies(self, signature, data)

    def counting_signs(self: SigningKey, data: bytes) -> bytes:
        counts["signed"] += 1
        return signs(self, data)

    monkeypatch.setattr(PublicKey, "verifies", counting_verifies)
    monkeypatch.setattr(SigningKey, "sign", counting_signs)
    return counts


@pytest.mark.parametrize("as_redis_has_it", [False, True])
def test_what_was_foreseen_is_the_same_and_costs_nothing_more(
    trust: TrustStore, counted: dict[str, int], as_redis_has_it: bool
) -> None:
    record, foresight = issued(), Foresight(trust, lambda: REVOKER, SystemClock())
    record = record if as_redis_has_it else expanded(record)
    plainly = Foresight(trust, lambda: REVOKER, SystemClock())
    as_ever = plainly.sign(end(plainly.open(record)))
    foresight.remember(record, end)
    counted.update(verified=0, signed=0)
    foreseen = foresight.sign(end(foresight.open(record)))
    assert foreseen == as_ever
    assert foreseen.stored == as_ever.record
    assert counted == {"verified": 0, "signed": 0}


def test_what_was_not_foreseen_is_verified(trust: TrustStore) -> None:
    foresight = Foresight(trust, lambda: REVOKER, SystemClock())
    foresight.remember(issued(), end)
    true, forged = issued(), issued(by=REVOKER)
    assert foresight.open(true).deadline
    for value in (forged, true[:-4] + b"AAAA"):
        with pytest.raises(InvalidMessageError):
            foresight.open(value)


def test_what_does_not_hold_is_not_remembered(trust: TrustStore) -> None:
    foresight, forged = Foresight(trust, lambda: REVOKER, SystemClock()), issued(by=REVOKER)
    foresight.remember(forged, end)
    with pytest.raises(InvalidMessageError):
        foresight.open(forged)


def test_another_trust_bundle_makes_it_forget_whom_it_believed(trust: TrustStore) -> None:
    foresight, record = Foresight(trust, lambda: REVOKER, SystemClock()), issued()
    foresight.remember(record, end)
    trust.load(bundle(2, REVOKER), NOW_S)
    with pytest.raises(InvalidMessageError):
        foresight.open(record)


def test_it_remembers_the_latest_only(trust: TrustStore, counted: dict[str, int]) -> None:
    foresight, records = (
        Foresight(trust, lambda: REVOKER, SystemClock(), most=2),
        [issued() for _ in range(3)],
    )
    for record in records:
        foresight.remember(record, end)
    counted.update(verified=0, signed=0)
    for record in records:
        foresight.sign(end(foresight.open(record)))
    assert counted == {"verified": 1, "signed": 1}
