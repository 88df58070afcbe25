"""HTTP API for resource servers: issuer metadata (OIDC, RFC 8414), public keys (RFC 7517), token introspection (RFC
7662).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.backends import TokenKeys
from ringfence.kernel.base import metrics
from ringfence.messages.codes import Code
from ringfence.messages.permission import PERMISSION_TYPE
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.lifecycle import ALL_LEASES
from ringfence.model.records.api_access import Authenticator
from ringfence.model.records.runs import RunTable

INTROSPECTION_PATH = "/oauth2/introspect"
JWKS_PATH = "/.well-known/jwks.json"
MAX_BODY_BYTES = 64 * 1024
_JWKS_MAX_AGE_S = 300
"""For how long others may keep the published keys."""


class IssuerHttp:
    """HTTP routes of the issuer."""

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
