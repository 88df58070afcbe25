"""How callers of the HTTP APIs say who they are."""

from __future__ import annotations

from typing import ClassVar

from ringfence.messages.base import ExpiringClaims


class ApiToken(ExpiringClaims):
    """A bearer token that its caller signs for itself, for at most 60 s: a user, or a target's resource server."""

    typ: ClassVar[str] = "api"


MAX_API_TOKEN_S = 60

PORTS = {
    "registry": 8701,
    "policy": 8702,
    "issuer": 8703,
    "revoker": 8704,
    "audit": 8705,
    "gateway": 8706,
    "scim": 8708,
    "signals": 8709,
}
"""The port that each service's HTTP listens on where no other is set."""
GATEWAY_PORT = 8707
"""The port that agents know the gateway by, where whoever runs it wants no other."""
