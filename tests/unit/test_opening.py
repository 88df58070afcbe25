"""Records of leases, opened: whose word they are is verified, by the clock that is injected."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast, get_args

import pytest

from ringfence.kernel.base.errors import SignatureError
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.base import ServiceRole
from ringfence.messages.lease import Lease
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.leases.unverified_records import verify_lease
from tests.support.in_memory_registry import FixedClock
from tools.schemas.examples import EXAMPLES

TD = "acme.example"
NOW_S = 1_790_000_000
FROM_S, UNTIL_S = NOW_S + 500, NOW_S + 5_000


def test_signature_of_an_ended_key_is_judged_by_the_append_time() -> None:
    """Whoever stole it can say that it was signed before; Kafka says when it came."""
    opened = opener(0)
    opened(iat=UNTIL_S - 10, deadline=UNTIL_S + 600, appended_ms=UNTIL_S * 1000 - 1)
    with pytest.raises(SignatureError):
        opened(iat=UNTIL_S - 10, deadline=UNTIL_S + 600, appended_ms=UNTIL_S * 1000)


def test_lease_of_an_ended_key_without_append_time_is_bounded() -> None:
    opened = opener(0)
    opened(iat=UNTIL_S - 10, deadline=UNTIL_S + 86_000)
    with pytest.raises(SignatureError, match="outlives"):
        opened(iat=UNTIL_S - 10, deadline=UNTIL_S + 90_000)
    with pytest.raises(SignatureError):
        opened(iat=UNTIL_S, deadline=UNTIL_S + 600)


@pytest.mark.parametrize(
    ("now_s", "counts"), [(FROM_S - 1, False), (FROM_S + 1, True), (UNTIL_S - 1, True), (UNTIL_S + 1, False)]
)
def test_an_end_whose_cause_is_older_than_its_key_counts_while_the_key_does(now_s: int, counts: bool) -> None:
    opened = opener(FROM_S, now_s)
    if counts:
        opened(iat=NOW_S)
    else:
        with pytest.raises(SignatureError):
            opened(iat=NOW_S)


@pytest.mark.parametrize("role", get_args(ServiceRole))
def test_a_lease_is_the_word_of_issuers_and_revokers_alone(role: ServiceRole) -> None:
    opened = opener(FROM_S, FROM_S + 1, role)
    if role in ("issuer", "revoker"):
        opened(iat=NOW_S)
    else:
        with pytest.raises(SignatureError):
            opened(iat=FROM_S + 1)


def opener(from_s: int, now_s: int = UNTIL_S + 10, role: ServiceRole = "revoker") -> Callable[..., Lease]:
    """Opens at `now_s` what it signs with a service's key that counts from `from_s` until UNTIL_S."""
    root, key = (SigningKey.generate(f"spiffe://{TD}/{name}") for name in ("root", "service/revoker"))
    trust = TrustStore(TD, root.kid)
    services = (ServiceIdentity(id=key.id, roles=(role,), keys=(key.record(UNTIL_S, from_s),)),)
    bundle = TrustBundle(
        iss=root.id, aud=TD, iat=NOW_S, exp=NOW_S + 10**6, jti="1", version=1, services=services
    )
    trust.load(sign(bundle, root, header_jwk=True), NOW_S)

    def opened(appended_ms: int | None = None, **said: int) -> Lease:
        claims = cast(Lease, EXAMPLES[Lease]).model_copy(update={"iss": key.id, "aud": TD, **said})
        return verify_lease(sign(claims, key), trust, FixedClock(now_s * 1000), appended_at_ms=appended_ms)

    return opened
