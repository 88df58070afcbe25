"""HTTP API for resource servers: issuer metadata (OIDC, RFC 8414), public keys (RFC 7517), token introspection (RFC
7662).

Re-encryption of a credential for a gateway that started after the lease was issued.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.backends import TokenKeys
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
from ringfence.messages.base import PERMISSION_TYPE, UUID
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialDelivery
from ringfence.messages.lease import Lease
from ringfence.messages.topics import CREDENTIAL_REPLY
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.lifecycle import ALL_LEASES, selector_keys
from ringfence.model.leases.unverified_records import verify_lease
from ringfence.model.records.api_access import Authenticator, ForbiddenError
from ringfence.model.records.runs import RunTable

log = logging.getLogger(__name__)

CLOCKS_MS = 5000
"""The greatest clock difference between the brokers that stamped a decision and its delivery."""
_AT_ONCE = 4
"""Concurrent look-ups. Each reads part of a partition."""
_WITHIN_S = 10.0


@dataclass(slots=True, eq=False)
class Resealer:
    """Finds the encrypted credential of a live lease on Kafka, from the time of its decision on, and encrypts it
    again.
    """

    settings: BusSettings
    trust: TrustStore
    store: LeaseStore
    own: Opener | None
    clock: Clock
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(_AT_ONCE), init=False)

    async def reseal(self, lease_id: str, gateway: str) -> str:
        """Return the envelope (JWE) of a live lease for one gateway, given by its SPIFFE ID.

        Raises ForbiddenError if the trust bundle has no encryption key of the gateway, NotFoundError if the lease is
        not live or not for gateways, and UnavailableError if Redis or Kafka does not answer in time.
        """
        keys = self.trust.encryption_keys("gateway", self.clock.now_ms() / 1000, of=gateway)
        if not keys:
            raise ForbiddenError(f"{gateway} has no key to seal to in the trust bundle; sign one that has it")
        lease = await self._live(lease_id)
        async with self._slots:
            delivery = await self._find_delivery(lease)
        # It may have ended while Kafka was read.
        await self._live(lease_id)
        return enclose(delivery, keys, about=lease.request_id)

    async def _live(self, lease_id: str) -> Lease:
        stored = (await self.store.get([lease_id])).get(lease_id)
        if stored is None:
            raise _not_live(lease_id)
        try:
            lease = verify_lease(stored.jws, self.trust, self.clock)
        except InvalidMessageError as error:
            log.error("the record of lease %s in Redis does not hold: %s", lease_id, error)
            raise _not_live(lease_id) from None
        lookup = await self.store.look(lease_id, (*selector_keys(lease), ALL_LEASES))
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
                    self.settings, [CREDENTIAL_REPLY], take_in, since_ms=since_ms, key=lease.agent_id
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
        if self.own is None or unverified_about(record.value) != lease.request_id:
            return None
        try:
            plain = self.own.open(record.value)
            claims = verify(
                parse(plain),
                CredentialDelivery,
                self.trust.finder("issuer", at_s=record.appended_at_ms / 1000),
                audience=self.trust.trust_domain,
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


INTROSPECTION_PATH = "/oauth2/introspect"
JWKS_PATH = "/.well-known/jwks.json"
MAX_BODY_BYTES = 64 * 1024
_JWKS_MAX_AGE_S = 300
"""For how long others may keep the published keys."""


class IssuerHttp:
    def __init__(
        self,
        *,
        issuer_url: str,
        authenticator: Authenticator,
        keys: TokenKeys,
        store: LeaseStore,
        runs: RunTable,
    ) -> None:
        self._issuer = issuer_url.rstrip("/")
        self._authenticator = authenticator
        self._keys = keys
        self._store = store
        self._runs = runs
        self._caching = {"Cache-Control": f"public, max-age={_JWKS_MAX_AGE_S}"}

    def routes(self) -> Sequence[BaseRoute]:
        return [
            Route("/.well-known/openid-configuration", self.openid_configuration),
            Route("/.well-known/oauth-authorization-server", self.authorization_server),
            Route(JWKS_PATH, self.jwks),
            Route(INTROSPECTION_PATH, self.introspect, methods=["POST"]),
        ]

    async def openid_configuration(self, _: Request) -> Response:
        """Serve OpenID Connect Discovery 1.0, as far as it applies: nobody logs in here."""
        return JSONResponse(
            {
                **self._metadata(),
                # Required, and clients look for them; there are no ID tokens.
                "response_types_supported": ["id_token"],
                "subject_types_supported": ["public"],
                "id_token_signing_alg_values_supported": list(self._keys.algorithms),
                "claims_supported": [
                    "iss", "sub", "aud", "exp", "iat", "nbf", "jti", "client_id", "act", "sponsor", "on_behalf_of",
                    "task", "delegation", "authorization_details", "cnf",
                ],
            },
            headers=self._caching,
        )  # fmt: skip

    async def authorization_server(self, _: Request) -> Response:
        """Serve OAuth 2.0 Authorization Server Metadata (RFC 8414)."""
        return JSONResponse({**self._metadata(), "response_types_supported": ["none"]}, headers=self._caching)

    def _metadata(self) -> dict[str, Any]:
        return {
            "issuer": self._issuer,
            "jwks_uri": self._issuer + JWKS_PATH,
            "introspection_endpoint": self._issuer + INTROSPECTION_PATH,
            # A bearer token that the caller signs for itself; none of the registered methods.
            "introspection_endpoint_auth_methods_supported": ["urn:ringfence:signed-bearer"],
            "introspection_endpoint_auth_signing_alg_values_supported": ["ES256", "EdDSA"],
            # Credentials are asked for over Kafka: there is no token endpoint, and an empty list may not stand here.
            "grant_types_supported": ["urn:ringfence:request"],
            "authorization_details_types_supported": [PERMISSION_TYPE],
            "dpop_signing_alg_values_supported": ["ES256", "EdDSA"],
        }

    async def jwks(self, _: Request) -> Response:
        """Serve the JWK set that verifies tokens (RFC 7517)."""
        return JSONResponse(self._keys.jwks(), headers=self._caching)

    async def introspect(self, request: Request) -> Response:
        """Introspect a token (RFC 7662) for the resource server that the token is for.

        Any other caller learns nothing: for them every token is inactive.
        """
        target_id = self._authenticator.target(request.headers.get("authorization"))
        token = await _token_of(request)
        if token is None:
            metrics.HTTP_REQUESTS.labels(INTROSPECTION_PATH, "400").inc()
            return JSONResponse(
                {
                    "error": Code.INVALID_REQUEST,
                    "error_description": "send the token as the form field `token` (RFC 7662, 2.1)",
                },
                status_code=400,
            )
        answer = await self._answer(token, target_id)
        metrics.HTTP_REQUESTS.labels(INTROSPECTION_PATH, "200").inc()
        return JSONResponse(answer, headers={"Cache-Control": "no-store"})

    async def _answer(self, token: str, target_id: str) -> dict[str, Any]:
        claims = self._keys.verified(token)
        if claims is None or not _is_for(claims, target_id):
            return {"active": False}
        run_id = claims.get("instance", {}).get("run")
        if run_id is not None and not self._runs.goes_on(run_id):
            return {"active": False}
        lookup = await self._store.look(claims["jti"], _selector_keys(claims))
        if not lookup.active or lookup.is_cut:
            return {"active": False}
        return {
            "active": True,
            "token_type": "DPoP" if "jkt" in claims.get("cnf", ()) else "Bearer",
            **claims,
        }


def _selector_keys(claims: dict[str, Any]) -> tuple[str, ...]:
    """Return the selector keys of a token's lease, read from the token itself."""
    return (
        f"agent:{claims['client_id']}",
        f"task:{claims['task']}",
        f"sponsor:{claims['sponsor'].rpartition('/')[2]}",
        f"user:{claims['on_behalf_of'].rpartition('/')[2]}",
        *(f"target:{detail['target']}" for detail in claims["authorization_details"]),
        *(
            mark
            for step in claims.get("delegation", ())
            for mark in (
                f"agent:{step['agent'].rpartition('/')[2]}",
                f"task:{step['task']}",
                f"sponsor:{step['sponsor'].rpartition('/')[2]}",
            )
        ),
        ALL_LEASES,
    )


def _is_for(claims: dict[str, Any], target_id: str) -> bool:
    """Return whether a verified token is for this target.

    The permissions decide: `aud` may name the target differently.
    """
    return {detail["target"] for detail in claims["authorization_details"]} == {target_id}


async def _token_of(request: Request) -> str | None:
    """Return the form field `token`. None unless it is given exactly once in a body of at most `MAX_BODY_BYTES`."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            return None
    try:
        tokens = parse_qs(body.decode("ascii"), strict_parsing=True, max_num_fields=20).get("token", [])
    except ValueError:
        return None
    return tokens[0] if len(tokens) == 1 else None
