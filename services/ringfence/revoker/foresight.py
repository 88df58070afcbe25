"""Background work: where very many leases are due soon, most of what their ends cost is done ahead.

That is to find out whose word their records are, and to sign their ends, which say the same whenever they are signed,
and to make them small for Redis.
Nothing rests on it: what was not foreseen is verified and signed when it is needed.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections import OrderedDict
from collections.abc import Callable

from ringfence.kernel.clock import Clock
from ringfence.kernel.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.jws import compact_jws, parse, signing_input
from ringfence.kernel.keys import SigningKey
from ringfence.kernel.trust import TrustStore
from ringfence.messages.lease import Lease
from ringfence.model.lease_store import (
    LeaseStore,
    Place,
    SignedLease,
    condensed,
    expanded,
    signature_of,
    unverified_payload,
)
from ringfence.model.opening import open_lease

log = logging.getLogger(__name__)

WITHIN_MS = 30_000
MANY = 3_000
"""So many leases that are due within that time are worth it: fewer end as quickly by themselves."""
MOST = 100_000
"""So many are remembered: about 600 bytes each."""
_AT_A_TIME = 20
_LOOK_EVERY_S = 1.0
_BUSY_S = 0.02


class Foresight:
    """Opens and signs records of leases, and has done so already for those that it has foreseen."""

    def __init__(
        self, trust: TrustStore, key: Callable[[], SigningKey], clock: Clock, most: int = MOST
    ) -> None:
        """`key`: what to sign by, asked each time."""
        self._trust = trust
        self._clock = clock
        self._key = key
        self._most = most
        self._version = trust.version
        self._verified: OrderedDict[bytes, None] = OrderedDict()
        """Digests of records that this process has verified."""
        self._ends: OrderedDict[bytes, bytes] = OrderedDict()
        """Records of this process as Redis will hold them, by the digests of what was signed."""

    def open(self, record: bytes) -> Lease:
        """The claims of a record that an issuer or a revoker signed: a JWS, or what Redis holds of it.

        Raises InvalidMessageError.
        """
        if self._verified and self._trusts_as_before():
            digest = hashlib.sha256(record).digest()
            if digest in self._verified:
                del self._verified[digest]  # who needs it has it now
                payload = unverified_payload(record)
                if payload is None:
                    return parse(record).unverified_claims(Lease)
                return Lease.model_validate_json(payload)
        return open_lease(expanded(record), self._trust, self._clock)

    def sign(self, claims: Lease) -> SignedLease:
        """A record by this process."""
        key = self._key()
        text = signing_input(claims, key)
        stored = self._ends.pop(hashlib.sha256(text).digest(), None) if self._ends else None
        signature = signature_of(stored) if stored is not None else key.sign(text)
        return SignedLease(claims, compact_jws(text, signature), stored)

    def remember(self, record: bytes, end: Callable[[Lease], Lease]) -> None:
        """Remember that a record holds, and the record of its `end`. What does not hold is found out later."""
        try:
            lease = open_lease(expanded(record), self._trust, self._clock)
        except InvalidMessageError:
            return
        self._trusts_as_before()
        key = self._key()
        text = signing_input(end(lease), key)
        self._verified[hashlib.sha256(record).digest()] = None
        self._ends[hashlib.sha256(text).digest()] = condensed(compact_jws(text, key.sign(text)))
        for remembered in (self._verified, self._ends):
            while len(remembered) > self._most:
                remembered.popitem(last=False)

    def _trusts_as_before(self) -> bool:
        """Whether the same trust bundle is in force. Where it is another, nothing is known any more."""
        if self._version != self._trust.version:
            self._version = self._trust.version
            self._verified.clear()
        return bool(self._verified)


class Lookout:
    """Looks for what is due soon, while there is nothing else to do."""

    def __init__(
        self, store: LeaseStore, foresee: Callable[[bytes], None], is_busy: Callable[[], bool]
    ) -> None:
        """Args:
            foresee: takes what Redis holds of the record of an active lease.
            is_busy: whether leases are being ended now.
        """  # fmt: skip
        self._store = store
        self._foresee = foresee
        self._is_busy = is_busy
        self._seen_to = [Place()] * len(store.shards)

    async def run(self) -> None:
        """Look out, for ever."""
        while True:
            try:
                if sum(await self._store.count_due(within_ms=WITHIN_MS)) >= MANY:
                    for shard in self._store.shards:
                        await self._look(shard)
            except UnavailableError as error:
                log.info("what is due soon is not looked at: %s", error)
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _look(self, shard: int) -> None:
        """Go through what is due soon and was not seen before."""
        while True:
            if self._is_busy():
                await asyncio.sleep(_BUSY_S)
                continue
            place, records = await self._store.due_after(
                shard, self._seen_to[shard], within_ms=WITHIN_MS, limit=_AT_A_TIME
            )
            self._seen_to[shard] = place
            for record in records:
                self._foresee(record)
            if len(records) < _AT_A_TIME:
                return
