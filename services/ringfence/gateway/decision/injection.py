"""Credential injection: opens the credentials that the issuer sealed to this gateway, and makes the headers with them.

Sealed credentials are kept in memory only. A static secret is read from its source for each request, so that a new
value is used at once (from Vault within `secret_sources.KEPT_S`).
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import httpx

from ringfence.backends.http import StaticSecrets
from ringfence.backends.target_settings import TargetSettingsError
from ringfence.gateway.state.leases import LeaseTable
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jwe import Opener, recipients_of
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.codes import Code, ReceivedCode
from ringfence.messages.credential import Credential, CredentialDelivery
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.identity.api_tokens import api_token
from ringfence.model.verdict import Refused

log = logging.getLogger(__name__)

MAX_CREDENTIALS: Final = 100_000
"""An evicted credential can be fetched again."""
_TIMEOUT_S: Final = 12.0
"""The issuer reads Kafka for up to 10 s."""
_NEGATIVE_CACHE_MS: Final = 1000
"""The time for which a failed fetch is remembered, since many requests ask at once."""
_NO_SEAL_KEY: Final = (
    "this gateway has no key that credentials are sealed to: set RINGFENCE_GATEWAY_SEAL_KEY_FILE"
)


class SealedCredentials:
    """The credentials that the issuer sealed to this gateway, by lease."""

    def __init__(
        self,
        table: LeaseTable,
        trust: TrustStore,
        clock: Clock,
        *,
        key: Callable[[], SigningKey],
        seal: Opener | None,
        issuer_url: str,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        """`key`: returns the key that signs requests to the issuer; `seal`: opens envelopes; `tls`: verifies the
        issuer, by the machine's authorities if None."""
        self._table = table
        self._trust = trust
        self._clock = clock
        self._key = key
        self._seal = seal
        self._issuer_url = issuer_url.rstrip("/")
        self._deliveries: BoundedDict[str, CredentialDelivery] = BoundedDict(MAX_CREDENTIALS)
        self._fetches: dict[str, asyncio.Task[CredentialDelivery]] = {}
        self._missing_until_ms: dict[str, int] = {}
        self._tls = tls
        self._http: httpx.AsyncClient | None = None
        table.on_lease_end(self._forget)

    def on_records(self, records: Sequence[Received]) -> None:
        """Process records of `credential.reply`. Ignores envelopes for other gateways."""
        for record in records:
            if self._seal is None or not record.value.startswith(b"{"):
                continue
            try:
                if not self._seal.kids.isdisjoint(recipients_of(record.value)):
                    self._keep(self._open(record.value, record.appended_at_ms / 1000))
            except InvalidMessageError as error:
                # Anybody can seal to a public key, so the content must be signed by an issuer.
                log.warning(
                    "passed over a delivery at %s@%d: %s",
                    record.topic_name,
                    record.offset,
                    error,
                    extra=rate_limited(record.topic_name, error.code),
                )

    async def get(self, lease: Lease) -> Credential:
        """The credential of a live lease, fetched from the issuer if needed. Raises UnavailableError if it has none."""
        cached = self.cached(lease)
        return cached if cached is not None else self._credential(await self._fetch_once(lease), lease)

    def cached(self, lease: Lease) -> Credential | None:
        """The credential, if it is in memory; otherwise None. Raises UnavailableError if it cannot be used."""
        delivery = self._deliveries.get(lease.lease_id)
        return self._credential(delivery, lease) if delivery is not None else None

    def _credential(self, delivery: CredentialDelivery, lease: Lease) -> Credential:
        same = (delivery.lease_id, delivery.target_id, delivery.request_id) == (
            lease.lease_id,
            lease.target_id,
            lease.request_id,
        )
        if not same or delivery.credential.kind != lease.backend:
            raise UnavailableError(f"what was delivered for lease {lease.lease_id} is not its credential")
        if delivery.credential.expires_at * 1000 <= self._clock.now_ms():
            raise UnavailableError(f"the credential of lease {lease.lease_id} has expired")
        return delivery.credential

    def problem(self) -> str | None:
        """Return why no credential can be opened here; None if they can."""
        return _NO_SEAL_KEY if self._seal is None else None

    async def close(self) -> None:
        self._deliveries.clear()
        if self._http is not None:
            await self._http.aclose()

    # --- deliveries ---

    def _open(self, envelope: bytes, at_s: float) -> CredentialDelivery:
        assert self._seal is not None
        return verify(
            parse(self._seal.open(envelope)), CredentialDelivery, self._trust.finder("issuer", at_s=at_s),
            audience=self._trust.trust_domain,
        ).claims  # fmt: skip

    def _keep(self, delivery: CredentialDelivery) -> None:
        if delivery.credential.expires_at * 1000 <= self._clock.now_ms():
            return
        lease = self._table.get(delivery.lease_id)
        if (
            lease is not None
            and lease.status != "minting"
            and isinstance(self._table.check_live(lease), Refused)
        ):
            return
        self._deliveries[delivery.lease_id] = delivery

    def _forget(self, lease_id: str) -> None:
        self._deliveries.pop(lease_id, None)
        self._missing_until_ms.pop(lease_id, None)

    # --- fetches ---

    async def _fetch_once(self, lease: Lease) -> CredentialDelivery:
        """Fetch from the issuer, once for all requests that wait for it."""
        if self._missing_until_ms.get(lease.lease_id, 0) > self._clock.now_ms():
            raise UnavailableError(
                f"the issuer has no credential for lease {lease.lease_id} that it could give"
            )
        task = self._fetches.get(lease.lease_id)
        if task is None:
            task = asyncio.create_task(self._fetch(lease), name="sealed credential")
            self._fetches[lease.lease_id] = task
            task.add_done_callback(lambda done: self._fetched(lease.lease_id, done))
        return await asyncio.shield(task)

    def _fetched(self, lease_id: str, task: asyncio.Task[CredentialDelivery]) -> None:
        self._fetches.pop(lease_id, None)
        if task.cancelled() or task.exception() is not None:
            self._missing_until_ms[lease_id] = self._clock.now_ms() + _NEGATIVE_CACHE_MS

    async def _fetch(self, lease: Lease) -> CredentialDelivery:
        if self._seal is None:
            raise UnavailableError(_NO_SEAL_KEY)
        if self._http is None:
            self._http = httpx.AsyncClient(verify=self._tls or True, timeout=_TIMEOUT_S, trust_env=False)
        url = f"{self._issuer_url}/v1/leases/{lease.lease_id}/sealed-credential"
        try:
            answer = await self._http.get(url, headers={"Authorization": f"Bearer {self._token()}"})
        except httpx.HTTPError as error:
            raise UnavailableError(f"the issuer does not answer ({type(error).__name__})") from None
        if answer.status_code != httpx.codes.OK:
            raise UnavailableError(
                f"the issuer has no credential for lease {lease.lease_id} that it could give: {answer.status_code}"
            )
        try:
            delivery = self._open(answer.content, self._clock.now_ms() / 1000)
        except InvalidMessageError as error:
            raise UnavailableError(f"what the issuer answered cannot be opened: {error.code}") from None
        if delivery.lease_id != lease.lease_id:
            raise UnavailableError("the issuer answered with another lease's credential")
        self._keep(delivery)
        return delivery

    def _token(self) -> str:
        return api_token(self._key(), "issuer", now_ms=self._clock.now_ms())


@dataclass(slots=True, eq=False)
class Injector:
    """Makes the headers that carry a lease's credential."""

    table: LeaseTable
    sealed: SealedCredentials
    secrets: StaticSecrets

    async def headers(self, lease: Lease, target: TargetState) -> Mapping[str, str]:
        """The headers. Raises UnavailableError if there are none now, or if the lease has ended meanwhile."""
        try:
            headers = await self._headers(lease, target)
        except UnavailableError:
            raise
        except (RingfenceError, TargetSettingsError) as error:
            log.error(
                "nothing to inject for lease %s: %s",
                lease.lease_id,
                error,
                extra=rate_limited(lease.target_id),
            )
            message = (
                f"this gateway has no credential for target {target.target_id}: an operator runs ringfence doctor, "
                "which says what to set"
            )
            raise UnavailableError(message, code=Code.ACCESS_MISSING) from None
        if isinstance(live := self.table.check_live(lease), Refused):
            raise UnavailableError(live.reason.message, code=ReceivedCode(live.reason.code))
        return headers

    def problem(self, target: TargetState) -> str | None:
        """Return why nothing can be injected here for a target, for operators; None if it can."""
        return (
            self.secrets.problem(target.target_id) if target.backend.kind == "http" else self.sealed.problem()
        )

    def cached_headers(self, lease: Lease, target: TargetState) -> Mapping[str, str] | None:
        """The headers, if no await is needed; otherwise None. Raises an error if the credential cannot be used."""
        self._check(lease, target)
        if lease.backend == "http":
            return self.secrets.headers_at_hand(target)
        credential = self.sealed.cached(lease)
        return _bearer(credential) if credential is not None else None

    async def _headers(self, lease: Lease, target: TargetState) -> Mapping[str, str]:
        self._check(lease, target)
        if lease.backend == "http":
            return await self.secrets.headers(target)
        return _bearer(await self.sealed.get(lease))

    def _check(self, lease: Lease, target: TargetState) -> None:
        if lease.target_id != target.target_id or lease.backend != target.backend.kind:
            raise UnavailableError(f"lease {lease.lease_id} is for another target than {target.target_id}")


def _bearer(credential: Credential) -> Mapping[str, str]:
    if credential.kind != "jwt" or credential.token_type not in (None, "Bearer"):
        raise UnavailableError(f"a credential of kind {credential.kind} does not go into a header")
    return {"Authorization": f"Bearer {credential.value}"}
