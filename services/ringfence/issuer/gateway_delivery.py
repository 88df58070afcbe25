"""Encryption of credentials for gateways (JWE with several recipients): to each gateway, and to the issuer itself.

The issuer's own copy serves gateways that start later. Envelopes for gateways stand only on `credential.reply`. That
topic is kept for as long as a lease can live.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from ringfence.issuer.domain import Issue, Refusal
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.service_keys import EncryptionKeys
from ringfence.kernel.crypto.jwe import MAX_RECIPIENTS, enclose
from ringfence.kernel.crypto.jws import compact_jws, signing_input
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.credential import Credential, CredentialDelivery, Reason
from ringfence.messages.keys import KeyRecord
from ringfence.messages.lease import Lease

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


class GatewayDelivery:
    """Encrypts credentials that gateways inject. It is stateless: the trust bundle says who the gateways are."""

    def __init__(
        self,
        trust: TrustStore,
        key: Callable[[], SigningKey],
        own: EncryptionKeys | None,
        clock: Clock,
        trust_domain: str,
    ) -> None:
        """`key` returns the current signing key.

        `own` holds the issuer's encryption keys. Without `own` no credential is delivered to gateways.
        """
        self._trust = trust
        self._key = key
        self._own = own
        self._clock = clock
        self._trust_domain = trust_domain

    def admit(self, weighed: Sequence[Issue | Refusal]) -> list[Issue | Refusal]:
        """Return `weighed`, with a refusal in place of each issue that no gateway could decrypt."""
        return [self._admit(one) for one in weighed]

    def _admit(self, one: Issue | Refusal) -> Issue | Refusal:
        if isinstance(one, Refusal) or one.lease.delivery != "gateway":
            return one
        if self._own is None:
            log.error("no key that is sealed to: make one with ringfence init --add-gateway NAME")
            message = "this issuer has no key to keep credentials for gateways; ask an operator"
        elif not self._gateways():
            message = "no gateway has a key that could be sealed to; ask an operator for a gateway"
        else:
            return one
        return Refusal((Reason(code="gateway_missing", message=message),), one.request)

    def sealed(self, issue: Issue, credential: Credential, *, id: str) -> str:
        """Return the envelope with a credential. `id` is the message's `jti`.

        If all gateways have gone meanwhile, the credential is encrypted to the issuer alone, and gateways ask the
        issuer for it. Raises UnavailableError if nobody could decrypt it.
        """
        if self._own is None:
            raise UnavailableError("the key that credentials for gateways are kept by has gone; put it back")
        lease = issue.lease
        signed = signed_delivery(lease, credential, self._key(), id=id)
        now_s = self._clock.now_ms() / 1000
        to = [*self._own.records(self._trust, "issuer", now_s, lease.deadline), *self._gateways()]
        return enclose(signed.encode(), to[:MAX_RECIPIENTS], about=lease.request_id)

    def _gateways(self) -> tuple[KeyRecord, ...]:
        return self._trust.encryption_keys("gateway", self._clock.now_ms() / 1000)
