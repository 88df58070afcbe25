"""Authentication of HTTP API callers: the API token, and the ports of the services."""

from __future__ import annotations

from typing import ClassVar

from ringfence.messages.base import ExpiringClaims, ServiceRole


class ApiToken(ExpiringClaims):
    """A bearer token that its caller signs for itself, for one call of one service, for at most 60 s.

    Its caller is a user, a target's resource server, or a gateway. `aud` is what `api_audience` says.
    """

    typ: ClassVar[str] = "api"


MAX_API_TOKEN_S = 60


def api_audience(trust_domain: str, service: ServiceRole) -> str:
    """The `aud` of API tokens for a service: no other service takes them."""
    return f"{trust_domain}/{service}"


UNBOUND_API_TOKENS_END = "0.2"
"""The version that takes no more API tokens whose `aud` is the trust domain alone, as callers signed them at first."""

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
}
"""The port that each service's HTTP listens on where no other is set."""
GATEWAY_PORT = 8707
"""The port that agents know the gateway by, where whoever runs it wants no other."""
SIGN_PAGE_PORT = 8711
"""The port of `ringfence serve sign-page` where no other is set."""
CONSOLE_PORT = 8712
"""The port that the console is for, and where `ringfence dev` has its session origin."""
