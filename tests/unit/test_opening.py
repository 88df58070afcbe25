"""Records of leases, opened: whose word they are is verified, by the clock that is injected."""

from __future__ import annotations

from typing import cast

import pytest

from ringfence.kernel.errors import SignatureError
from ringfence.kernel.jws import sign
from ringfence.kernel.keys import SigningKey
from ringfence.kernel.trust import TrustStore
from ringfence.messages.examples import EXAMPLES
from ringfence.messages.lease import Lease
from ringfence.messages.trust import ServiceIdentity, TrustBundle
from ringfence.model.opening import open_lease
from tests.ledger import FixedClock

TD = "acme.example"
NOW_S = 1_790_000_000
FROM_S, UNTIL_S = NOW_S + 500, NOW_S + 5_000


@pytest.mark.parametrize(
    ("now_s", "counts"), [(FROM_S - 1, False), (FROM_S + 1, True), (UNTIL_S - 1, True), (UNTIL_S + 1, False)]
)
def test_an_end_whose_cause_is_older_than_its_key_counts_while_the_key_does(now_s: int, counts: bool) -> None:
    root, key = (SigningKey.generate(f"spiffe://{TD}/{name}") for name in ("root", "service/revoker"))
    trust = TrustStore(TD, root.kid)
    record = key.record(UNTIL_S).model_copy(update={"not_before": FROM_S})
    services = (ServiceIdentity(id=key.id, roles=("revoker",), keys=(record,)),)
    bundle = TrustBundle(
        iss=root.id, aud=TD, iat=NOW_S, exp=NOW_S + 10**6, jti="1", version=1, services=services
    )
    trust.load(sign(bundle, root, header_jwk=True), NOW_S)
    end = cast(Lease, EXAMPLES[Lease]).model_copy(update={"iss": key.id, "aud": TD, "iat": NOW_S})
    if counts:
        assert open_lease(sign(end, key), trust, FixedClock(now_s * 1000)) == end
    else:
        with pytest.raises(SignatureError):
            open_lease(sign(end, key), trust, FixedClock(now_s * 1000))
