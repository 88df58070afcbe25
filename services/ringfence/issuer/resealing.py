"""Re-encryption of a credential for a gateway that started after the lease was issued."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ringfence.issuer.minting import ENVELOPE_TYPE
from ringfence.kernel.base import metrics
from ringfence.kernel.base.api_errors import NotFoundError
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.crypto.jwe import Opener, enclose, unverified_about
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.base import UUID
from ringfence.messages.credential import CredentialDelivery
from ringfence.messages.lease import Lease
from ringfence.messages.topics import CREDENTIAL_REPLY
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.lifecycle import ALL_LEASES, selector_keys
from ringfence.model.leases.unverified_records import verify_lease
from ringfence.model.records.api_access import Authenticator, ForbiddenError

log = logging.getLogger(__name__)

CLOCKS_MS = 5000
"""The greatest clock difference between the brokers that stamped a decision and its delivery."""
_AT_ONCE = 4
"""Concurrent look-ups. Each reads part of a partition."""
_WITHIN_S = 10.0


class Resealer:
    """Finds the encrypted credential of a live lease on Kafka, from the time of its decision on, and encrypts it
    again.
    """

    def __init__(
        self,
        settings: BusSettings,
        trust: TrustStore,
        store: LeaseStore,
        own: Opener | None,
        clock: Clock,
    ) -> None:
        self._settings = settings
        self._trust = trust
        self._store = store
        self._own = own
        self._clock = clock
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def reseal(self, lease_id: str, gateway: str) -> str:
        """Return the envelope (JWE) of a live lease for one gateway, given by its SPIFFE ID.

        Raises ForbiddenError if the trust bundle has no encryption key of the gateway, NotFoundError if the lease is
        not live or not for gateways, and UnavailableError if Redis or Kafka does not answer in time.
        """
        keys = self._trust.encryption_keys("gateway", self._clock.now_ms() / 1000, of=gateway)
        if not keys:
            raise ForbiddenError(f"{gateway} has no key to seal to in the trust bundle; sign one that has it")
        lease = await self._live(lease_id)
        async with self._slots:
            delivery = await self._find_delivery(lease)
        # It may have ended while Kafka was read.
        await self._live(lease_id)
        return enclose(delivery, keys, about=lease.request_id)

    async def _live(self, lease_id: str) -> Lease:
        stored = (await self._store.get([lease_id])).get(lease_id)
        if stored is None:
            raise _not_live(lease_id)
        try:
            lease = verify_lease(stored.jws, self._trust, self._clock)
        except InvalidMessageError as error:
            log.error("the record of lease %s in Redis does not hold: %s", lease_id, error)
            raise _not_live(lease_id) from None
        lookup = await self._store.look(lease_id, (*selector_keys(lease), ALL_LEASES))
        if not lookup.active or lookup.is_cut or lease.delivery != "gateway":
            raise _not_live(lease_id)
        return lease

    async def _find_delivery(self, lease: Lease) -> bytes:
        """Return the signed delivery of a lease. Reads the topic from the time of the lease's decision on."""
        delivery_found: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

        def take_in(records: Sequence[Received]) -> None:
            for record in records:
                if not delivery_found.done() and (delivery := self._delivery(record, lease)) is not None:
                    delivery_found.set_result(delivery)

        since_ms = max(lease.iat * 1000 - CLOCKS_MS, 1)
        try:
            async with (
                asyncio.timeout(_WITHIN_S),
                Follower(
                    self._settings, [CREDENTIAL_REPLY], take_in, since_ms=since_ms, key=lease.agent_id
                ) as follower,
            ):
                await _wait_for_either(delivery_found, follower.complete)
        except TimeoutError:
            raise UnavailableError("the sealed credential was not found in time; ask again") from None
        if not delivery_found.done():
            raise NotFoundError(
                f"nothing was sealed for lease {lease.lease_id}: a static secret is read by the gateway from its own "
                "source; for anything else the agent has to ask anew"
            )
        return delivery_found.result()

    def _delivery(self, record: Received, lease: Lease) -> bytes | None:
        """Return the signed delivery in a record, if it is this lease's and an issuer signed it, else None."""
        # Unverified: it only saves decrypting the others.
        if self._own is None or unverified_about(record.value) != lease.request_id:
            return None
        try:
            plain = self._own.open(record.value)
            claims = verify(
                parse(plain),
                CredentialDelivery,
                self._trust.finder("issuer", at_s=record.appended_at_ms / 1000),
                audience=self._trust.trust_domain,
            ).claims
        except InvalidMessageError as error:
            log.warning(
                "passed over a delivery at %s@%d: %s",
                record.topic_name,
                record.offset,
                error,
                extra=rate_limited(record.topic_name, error.code),
            )
            return None
        same = (claims.lease_id, claims.target_id) == (lease.lease_id, lease.target_id)
        return plain if same else None


def _not_live(lease_id: str) -> NotFoundError:
    return NotFoundError(f"there is no live lease {lease_id} that is for gateways")


async def _wait_for_either(delivery_found: asyncio.Future[bytes], complete: asyncio.Event) -> None:
    both: list[asyncio.Future[Any]] = [delivery_found, asyncio.ensure_future(complete.wait())]
    try:
        await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    finally:
        both[1].cancel()


# HTTP API for gateways that are younger than a lease.

SEALED_PATH = "/v1/leases/{lease_id}/sealed-credential"


class GatewayHttp:
    """HTTP routes for gateways."""

    def __init__(self, resealer: Resealer, authenticator: Authenticator) -> None:
        self._resealer = resealer
        self._authenticator = authenticator

    def routes(self) -> Sequence[BaseRoute]:
        return [Route(SEALED_PATH, self.sealed)]

    async def sealed(self, request: Request) -> Response:
        """Serve the credential of a live lease, encrypted to the calling gateway alone."""
        gateway = self._authenticator.gateway(request.headers.get("authorization"))
        lease_id = request.path_params["lease_id"]
        if not UUID.fullmatch(lease_id):
            raise NotFoundError("a lease's id is a UUID in lower case")
        envelope = await self._resealer.reseal(lease_id, gateway)
        metrics.HTTP_REQUESTS.labels(SEALED_PATH, "200").inc()
        return Response(envelope, media_type=ENVELOPE_TYPE, headers={"Cache-Control": "no-store"})
