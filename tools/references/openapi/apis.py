"""All HTTP APIs, by the name of their document."""

from __future__ import annotations

from collections.abc import Mapping

from tools.references.openapi.console_api import CONSOLE_API
from tools.references.openapi.operation import Api
from tools.references.openapi.protocol_apis import PROTOCOL_APIS
from tools.references.openapi.service_apis import SERVICE_APIS

APIS: Mapping[str, Api] = {
    name: {**SERVICE_APIS, **PROTOCOL_APIS, "console": CONSOLE_API}[name]
    for name in (
        "registry", "policy", "issuer", "revoker", "audit", "gateway", "gateway-agents", "scim", "signals", "runner",
        "console",
    )
}  # fmt: skip
