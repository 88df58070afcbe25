"""What gateways ask the issuer: the credential of a lease that is older than they are."""

from __future__ import annotations

import re
from collections.abc import Sequence

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from ringfence.issuer.gateway_delivery import ENVELOPE_TYPE
from ringfence.issuer.resealing import Resealer
from ringfence.kernel.base import metrics
from ringfence.model.records.api_access import Authenticator, NotFoundError

SEALED_PATH = "/v1/leases/{lease_id}/sealed-credential"
_UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}")


class GatewayHttp:
    """The routes for gateways."""

    def __init__(self, resealer: Resealer, authenticator: Authenticator) -> None:
        self._resealer = resealer
        self._authenticator = authenticator

    def routes(self) -> Sequence[BaseRoute]:
        return [Route(SEALED_PATH, self.sealed)]

    async def sealed(self, request: Request) -> Response:
        """The credential of a live lease, sealed to the gateway that asks, and to nobody else."""
        gateway = self._authenticator.gateway(request.headers.get("authorization"))
        lease_id = request.path_params["lease_id"]
        if not _UUID.fullmatch(lease_id):
            raise NotFoundError("a lease's id is a UUID in lower case")
        envelope = await self._resealer.reseal(lease_id, gateway)
        metrics.HTTP_REQUESTS.labels(SEALED_PATH, "200").inc()
        return Response(envelope, media_type=ENVELOPE_TYPE, headers={"Cache-Control": "no-store"})
