"""Ringfence: a credential broker for AI agents."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringfence.client.actions import PendingAction as PendingAction
    from ringfence.client.administrator import Administrator as Administrator
    from ringfence.client.agent import Agent as Agent
    from ringfence.client.asgi import Needs as Needs
    from ringfence.client.asgi import TokenGuard as TokenGuard
    from ringfence.client.credentials import GatewayCredential as GatewayCredential
    from ringfence.client.credentials import IssuedCredential as IssuedCredential
    from ringfence.client.credentials import PostgresCredential as PostgresCredential
    from ringfence.client.credentials import RedisCredential as RedisCredential
    from ringfence.client.credentials import SshCredential as SshCredential
    from ringfence.client.credentials import TokenCredential as TokenCredential
    from ringfence.client.grantor import Grantor as Grantor
    from ringfence.client.grantor import Proposal as Proposal
    from ringfence.client.proofs import Nonces as Nonces
    from ringfence.client.settings import ClientSettings as ClientSettings
    from ringfence.client.sponsor import PendingApproval as PendingApproval
    from ringfence.client.sponsor import Sponsor as Sponsor
    from ringfence.client.verify import TokenVerifier as TokenVerifier
    from ringfence.client.verify import VerifiedToken as VerifiedToken

__version__ = "0.1.0"

__all__ = [
    "Administrator",
    "Agent",
    "ClientSettings",
    "GatewayCredential",
    "Grantor",
    "IssuedCredential",
    "Needs",
    "Nonces",
    "PendingAction",
    "PendingApproval",
    "PostgresCredential",
    "Proposal",
    "RedisCredential",
    "Sponsor",
    "SshCredential",
    "TokenCredential",
    "TokenGuard",
    "TokenVerifier",
    "VerifiedToken",
]

_MODULES = {
    "Administrator": "ringfence.client.administrator",
    "Agent": "ringfence.client.agent",
    "ClientSettings": "ringfence.client.settings",
    "Grantor": "ringfence.client.grantor",
    "Needs": "ringfence.client.asgi",
    "Nonces": "ringfence.client.proofs",
    "GatewayCredential": "ringfence.client.credentials",
    "IssuedCredential": "ringfence.client.credentials",
    "PendingAction": "ringfence.client.actions",
    "PendingApproval": "ringfence.client.sponsor",
    "PostgresCredential": "ringfence.client.credentials",
    "Proposal": "ringfence.client.grantor",
    "RedisCredential": "ringfence.client.credentials",
    "Sponsor": "ringfence.client.sponsor",
    "TokenGuard": "ringfence.client.asgi",
    "SshCredential": "ringfence.client.credentials",
    "TokenCredential": "ringfence.client.credentials",
    "TokenVerifier": "ringfence.client.verify",
    "VerifiedToken": "ringfence.client.verify",
}


def __getattr__(name: str) -> Any:
    """The SDK's names, imported when asked for (PEP 562): a service that imports messages loads none of it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
