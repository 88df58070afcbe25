"""Authentication of HTTP API callers: the API token, and the ports of the services."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Final

from ringfence.messages.base import ExpiringClaims, Jws, ServiceRole


class ApiToken(ExpiringClaims):
    """A bearer token that its caller signs for itself, for one call of one service, for at most 60 s.

    Its caller is a user, a target's resource server, or a gateway. `aud` is what `api_audience` says.
    """

    typ: ClassVar[str] = "api"


class ConsoleToken(ExpiringClaims):
    """A bearer token by which a console reads for a person who signed in there: one call, at most 60 s.

    The console's key signs it. It shows nothing by itself: `session` says for whom, and the person's passkey signed it.
    Services take it on `CONSOLE_ROUTES` alone.
    """

    typ: ClassVar[str] = "console.token"
    signed_by = ("console",)

    session: Jws
    """A `session.statement` that names this console's key."""


MAX_API_TOKEN_S = 60
CONSOLE_ROUTES: Final[Mapping[ServiceRole, tuple[str, ...]]] = {
    "registry": (
        "/v1/users",
        "/v1/users/{id}",
        "/v1/agents",
        "/v1/agents/{id}",
        "/v1/targets",
        "/v1/targets/{id}",
        "/v1/tasks",
        "/v1/tasks/{id}",
        "/v1/proposals",
        "/v1/proposals/{proposal_id}/evidence",
    ),
    "policy": (
        "/v1/inventory",
        "/v1/inventory/changes",
        "/v1/agents/{agent_id}/usage",
        "/v1/agents/{agent_id}/ceiling-report",
        "/v1/approvals",
        "/v1/approvals/{request_id}",
        "/v1/approvals/{request_id}/evidence",
        "/v1/action-approvals",
        "/v1/action-approvals/{request_id}",
        "/v1/action-approvals/{request_id}/evidence",
        "/v1/decisions/{request_id}",
        "/v1/decisions/{request_id}/explanation",
        "/v1/grants",
        "/v1/grants/{grant_id}",
        "/v1/bundle",
    ),
    "revoker": ("/v1/leases", "/v1/leases/{id}", "/v1/runs", "/v1/runs/{id}"),
    "audit": (
        "/v1/trace/{id}",
        "/v1/events",
        "/v1/actions",
        "/v1/model-usage",
        "/v1/approval-history",
        "/v1/break-glass",
        "/v1/who",
        "/v1/coverage/leases",
        "/v1/coverage/actions",
    ),
}
"""The routes, by GET alone, on which services answer a console. They refuse a console all others."""


def api_audience(trust_domain: str, service: ServiceRole) -> str:
    """The `aud` of API tokens for a service: no other service takes them."""
    return f"{trust_domain}/{service}"


PORTS = {
    "registry": 8701,
    "policy": 8702,
    "issuer": 8703,
    "revoker": 8704,
    "audit": 8705,
    "gateway": 8706,
    "scim": 8708,
    "signals": 8709,
    "runner": 8710,
    "console": 8712,
}
"""The default HTTP port of each service."""
GATEWAY_PORT = 8707
"""The gateway's default port for agents."""
SIGN_PAGE_PORT = 8711
"""The default port of `ringfence serve sign-page`."""
CONSOLE_PORT = PORTS["console"]
"""The port that the console is for, and where `ringfence dev` has its session origin."""
