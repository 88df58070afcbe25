"""Mints credentials that leave something at their target, and encrypts credentials for gateways (JWE).

Steps: Kafka acknowledges the `minting` record. The backend makes the credential at the target. Redis activates the
lease conditionally. If the process dies in between, the announcement remains: the issuer that receives the decision
again resumes, and a revoker that finds a lease unfinished removes what exists at the target. One call, one target.

A JWE has each gateway as a recipient, and the issuer, whose own copy serves gateways that start later. Envelopes for
gateways are only on `credential.reply`, a topic that is kept for as long as a lease can live.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace

from ringfence.backends import AccessError, Backend, CircuitBreaker, CircuitOpenError, TargetRefusedError
from ringfence.issuer.domain import FULL, FULL_RETRY_S, LATE, OVER, Issue, Refusal, cannot, fenced
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, RingfenceError, UnavailableError
from ringfence.kernel.crypto.jwe import MAX_RECIPIENTS, enclose
from ringfence.kernel.crypto.jws import compact_jws, parse, sign, signing_input, verify
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.service_keys import EncryptionKeys
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.batch_handlers import gather_all
from ringfence.kernel.kafka.record import Outbound
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import KeyRecord
from ringfence.messages.codes import Code
from ringfence.messages.credential import Credential, CredentialDelivery, Reason
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.topics import LEASE
from ringfence.model.lease_store import Activation, LeaseStore, Preparation, SignedLease, StoredLease
from ringfence.model.leases.lifecycle import after_minting, before_minting, has_origin, restated
from ringfence.model.leases.tracing import step_of

log = logging.getLogger(__name__)

ENVELOPE_TYPE = "application/jose+json"
"""The media type of a JWE in JSON serialisation (RFC 7515, 9.2.1)."""


def signed_delivery(
    lease: Lease, credential: Credential, key: SigningKey, *, id: str, lease_digest: str | None = None
) -> str:
    """Return the signed statement that a credential belongs to a lease, as a compact JWS. The caller must encrypt it.

    `id` is the message's `jti`. `lease_digest` is the digest of the lease's record, if this issuer has just signed that
    record and sends it along.
    """
    claims = CredentialDelivery(
        iss=key.id,
        aud=lease.aud,
        iat=lease.iat,
        jti=id,
        request_id=lease.request_id,
        lease_id=lease.lease_id,
        target_id=lease.target_id,
        credential=credential,
        lease_digest=lease_digest,
    )
    text = signing_input(claims, key)
    # The encrypted envelope differs each time as well.
    return compact_jws(text, key.sign(text, repeatable=False))


@dataclass(slots=True, eq=False)
class GatewayDelivery:
    """Encrypts credentials that gateways inject. It is stateless: the trust bundle says who the gateways are.

    `key` returns the current signing key.
    `own` holds the issuer's encryption keys. Without `own` no credential is delivered to gateways.
    """

    trust: TrustStore
    key: Callable[[], SigningKey]
    own: EncryptionKeys | None
    clock: Clock
    trust_domain: str

    def admit(self, weighed: Sequence[Issue | Refusal]) -> list[Issue | Refusal]:
        """Return `weighed`, with a refusal in place of each issue that no gateway could decrypt."""
        return [self._admit(one) for one in weighed]

    def _admit(self, one: Issue | Refusal) -> Issue | Refusal:
        if isinstance(one, Refusal) or one.lease.delivery != "gateway":
            return one
        if self.own is None:
            log.error("no key that is sealed to: make one with ringfence init --add-gateway NAME")
            message = "this issuer has no key to keep credentials for gateways; ask an operator"
        elif not self._gateways():
            message = "no gateway has a key that could be sealed to; ask an operator for a gateway"
        else:
            return one
        return Refusal((Reason(code=Code.GATEWAY_MISSING, message=message),), one.request)

    def sealed(self, issue: Issue, credential: Credential, *, id: str) -> str:
        """Return the envelope with a credential. `id` is the message's `jti`.

        If all gateways have gone meanwhile, the credential is encrypted to the issuer alone, and gateways ask the
        issuer for it. Raises UnavailableError if nobody could decrypt it.
        """
        if self.own is None:
            raise UnavailableError("the key that credentials for gateways are kept by has gone; put it back")
        lease = issue.lease
        signed = signed_delivery(lease, credential, self.key(), id=id)
        now_s = self.clock.now_ms() / 1000
        to = [*self.own.records(self.trust, "issuer", now_s, lease.deadline), *self._gateways()]
        return enclose(signed.encode(), to[:MAX_RECIPIENTS], about=lease.request_id)

    def _gateways(self) -> tuple[KeyRecord, ...]:
        return self.trust.encryption_keys("gateway", self.clock.now_ms() / 1000)


RETRY_AFTER_S = 5
"""When to ask again after a target did not answer, if nothing better is known."""


@dataclass(frozen=True, slots=True)
class Minted:
    """A credential that was made, and its active lease."""

    issue: Issue
    jws: str
    credential: Credential


class Replayed:
    """Outcome: the lease was issued for the same decision at another record."""


REPLAYED = Replayed()
Outcome = Minted | Refusal | Replayed


@dataclass(slots=True)
class _Attempt:
    """One credential being minted. `outcome` is set once nothing more happens to it."""

    issue: Issue
    minting: SignedLease
    active: SignedLease | None = None
    credential: Credential | None = None
    outcome: Outcome | None = None


@dataclass(slots=True, eq=False)
class Minter:
    """Mints credentials at targets and activates their leases."""

    runtime: Runtime
    store: LeaseStore
    backends: Mapping[str, Backend]
    caller: CircuitBreaker
    _: KW_ONLY
    mint_ms: int
    """How long after the announcement a revoker leaves the lease to this issuer."""

    async def mint(self, issues: Sequence[Issue]) -> list[Outcome]:
        """Mint credentials for one target. Returns their outcomes in the order of `issues`.

        When it returns, Kafka has the `minting` records. Raises UnavailableError if Redis or Kafka does not answer, or
        if another issuer took one lease over. The same decisions are delivered again then.
        """
        attempts = [self._attempt(issue) for issue in issues]
        token = secrets.token_hex(8)
        await self._announce([one for one in attempts if one.outcome is None], token)
        await gather_all(self._make(one) for one in attempts if one.outcome is None)
        await self._activate([one for one in attempts if one.outcome is None], token)
        return [_outcome_of(one) for one in attempts]

    async def remint(self, issue: Issue, jws: str) -> Minted | Refusal:
        """Mint the credential of an active lease once more: the issuer that made it may have died before it replied.

        The lease may end during the call, and a revoker undoes only what it finds. So the lease is looked up
        afterwards.
        """
        try:
            credential = await self._call_backend(issue)
        except RingfenceError as error:
            return Refusal((_reason_of(error),), issue.request, retry_after_s=_retry_after_s(error))
        if (await self.store.look(issue.lease.lease_id)).active:
            return self._current(issue, jws, credential)
        await self._undo(issue)
        return Refusal(OVER, issue.request)

    def _current(self, issue: Issue, jws: str, credential: Credential) -> Minted:
        """Return the lease to publish, which may have been published before, restated in the current epoch of Redis.

        A lease of another epoch may be void.
        """
        key, lease = self.runtime.key, issue.lease
        if lease.epoch in (None, self.store.epoch):
            return Minted(issue, jws, credential)
        lease = restated(lease, by=key.id, epoch=self.store.epoch)
        return Minted(replace(issue, lease=lease), sign(lease, key), credential)

    # --- the steps ---

    def _attempt(self, issue: Issue) -> _Attempt:
        lease = before_minting(issue.lease)
        problem = self.backends[lease.backend].problem(issue.lease, issue.target)
        if problem is None:
            return _Attempt(issue, SignedLease(lease, sign(lease, self.runtime.key)))
        return _Attempt(issue, SignedLease(lease, ""), outcome=cannot(problem, issue.request))

    async def _announce(self, attempts: Sequence[_Attempt], token: str) -> None:
        if not attempts:
            return
        announced = [one.minting for one in attempts]
        preparations = await self.store.prepare(announced, token=token, mint_ms=self.mint_ms)
        await gather_all(
            self._prepared(one, preparation) for one, preparation in zip(attempts, preparations, strict=True)
        )
        prepared = [one.minting for one in attempts if one.outcome is None]
        await gather_all([await self._send(one) for one in prepared])
        self.store.published((one.claims.lease_id, one.claims.seq) for one in prepared)

    async def _prepared(self, attempt: _Attempt, preparation: Preparation) -> None:
        issue, stored = attempt.issue, preparation.stored
        match preparation.outcome:
            case "fenced":
                attempt.outcome = Refusal(fenced(preparation.selector_key or ""), issue.request)
            case "late":
                attempt.outcome = Refusal(LATE, issue.request)
            case "full":
                attempt.outcome = Refusal(FULL, issue.request, retry_after_s=FULL_RETRY_S)
            case "prepared" if stored is not None:
                attempt.outcome = self._taken_over(attempt, stored)
            case "known":
                assert stored is not None
                attempt.outcome = await self._outcome_of_known(issue, stored)

    def _taken_over(self, attempt: _Attempt, stored: StoredLease) -> Outcome | None:
        """Resume a lease that another process announced and did not finish.

        Its stored record counts, not the new one.
        """
        lease = self._verified_lease(attempt.issue, stored)
        if lease is None:
            return REPLAYED
        attempt.minting = SignedLease(lease, stored.jws.decode("ascii"))
        return None

    async def _outcome_of_known(self, issue: Issue, stored: StoredLease) -> Outcome:
        lease = self._verified_lease(issue, stored)
        if lease is None:
            return REPLAYED
        if stored.status != "active" or lease.backend != issue.lease.backend:
            return Refusal(OVER, issue.request)
        return await self.remint(replace(issue, lease=lease), stored.jws.decode("ascii"))

    async def _make(self, attempt: _Attempt) -> None:
        try:
            attempt.credential = await self._call_backend(attempt.issue)
        except RingfenceError as error:
            log.warning("lease %s is not made: %s", attempt.issue.lease.lease_id, error)
            await self._give_up(attempt)  # something may exist all the same: a revoker removes it
            attempt.outcome = Refusal(
                (_reason_of(error),), attempt.issue.request, retry_after_s=_retry_after_s(error)
            )

    async def _activate(self, attempts: Sequence[_Attempt], token: str) -> None:
        if not attempts:
            return
        records = []
        for one in attempts:
            claims = after_minting(one.minting.claims, epoch=self.store.epoch)
            one.active = SignedLease(claims, sign(claims, self.runtime.key))
            records.append(one.active)
        activations = await self.store.activate(records, token=token)
        await gather_all(
            self._activated(one, activation) for one, activation in zip(attempts, activations, strict=True)
        )

    async def _activated(self, attempt: _Attempt, activation: Activation) -> None:
        issue, stored = attempt.issue, activation.stored
        assert attempt.active is not None
        assert attempt.credential is not None
        match activation.outcome:
            case "activated":
                metrics.LEASES_ISSUED.labels(issue.lease.backend).inc()
                active = replace(issue, lease=attempt.active.claims)
                attempt.outcome = Minted(active, attempt.active.jws, attempt.credential)
            case "lost" | "known":
                if stored is not None and stored.status not in TERMINAL:
                    # Another issuer resumes it, or a revoker aborts it: the credential at the target is theirs.
                    raise UnavailableError(f"lease {issue.lease.lease_id} was taken over by another process")
                await self._undo(issue)
                attempt.outcome = Refusal(TOO_SLOW, issue.request, retry_after_s=RETRY_AFTER_S)
            case "full":
                await self._undo(issue)
                await self._give_up(attempt)
                attempt.outcome = Refusal(FULL, issue.request, retry_after_s=FULL_RETRY_S)
            case "fenced" | "late":
                await self._undo(issue)
                await self._give_up(attempt)
                reasons = LATE if activation.outcome == "late" else fenced(activation.selector_key or "")
                attempt.outcome = Refusal(reasons, issue.request)

    # --- helpers ---

    async def _call_backend(self, issue: Issue) -> Credential:
        lease, backend = issue.lease, self.backends[issue.lease.backend]
        with step_of(lease, "mint", self.runtime.tracing):
            return await self.caller.call(lease.target_id, lambda: backend.mint(lease, issue.target))

    async def _undo(self, issue: Issue) -> None:
        """Remove a credential that nobody received. If that fails, a revoker finds it by itself and removes it."""
        lease, backend = issue.lease, self.backends[issue.lease.backend]
        try:
            with step_of(lease, "undo", self.runtime.tracing):
                await self.caller.call(
                    lease.target_id, lambda: backend.undo(lease.lease_id, target_id=lease.target_id)
                )
        except RingfenceError as error:
            log.warning("lease %s was refused and is not undone yet: %s", lease.lease_id, error)

    async def _give_up(self, attempt: _Attempt) -> None:
        """Hand the lease to a revoker now, before its minting deadline."""
        try:
            await self.store.postpone({attempt.issue.lease.lease_id: 0})
        except UnavailableError as error:
            log.info("a revoker takes the lease later: %s", error)

    async def _send(self, record: SignedLease) -> Awaitable[object]:
        claims = record.claims
        return await self.runtime.publisher.send(
            LEASE,
            Lease.typ,
            Outbound(claims.lease_id, record.jws, id=claims.jti, traceparent=claims.traceparent),
        )

    def _verified_lease(self, issue: Issue, stored: StoredLease) -> Lease | None:
        """Return the stored lease if an issuer or revoker signed it for this very issue, else None."""
        try:
            parsed = parse(stored.jws)
            at_s = parsed.unverified_claims(Lease).iat
            find = self.runtime.trust.finder(*Lease.signed_by, at_s=at_s)
            lease = verify(parsed, Lease, find, audience=self.runtime.settings.trust_domain).claims
        except InvalidMessageError as error:
            log.error("the record of lease %s in Redis does not hold: %s", issue.lease.lease_id, error)
            return None
        return lease if has_origin(lease, issue.origin) else None


TOO_SLOW = (
    Reason(
        code=Code.MINT_TOO_SLOW,
        message="making the credential took too long, so it was taken back; ask again",
    ),
)


def _outcome_of(attempt: _Attempt) -> Outcome:
    assert attempt.outcome is not None
    return attempt.outcome


def _reason_of(error: RingfenceError) -> Reason:
    # Problems with the broker's own rights are for its operators, and in the log.
    message = "Ringfence cannot work at the target now" if isinstance(error, AccessError) else str(error)
    return Reason(code=error.code, message=message[:2048])


def _retry_after_s(error: RingfenceError) -> int | None:
    if isinstance(error, TargetRefusedError):
        return None  # the same request would be refused again
    if isinstance(error, CircuitOpenError):
        return max(RETRY_AFTER_S, error.retry_ms // 1000)
    return RETRY_AFTER_S
