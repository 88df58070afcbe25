"""Ringfence: a credential broker for AI agents."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringfence.client.admin.administrator import Administrator as Administrator
    from ringfence.client.agent.agent import Agent as Agent
    from ringfence.client.agent.credentials import GatewayCredential as GatewayCredential
    from ringfence.client.agent.credentials import IssuedCredential as IssuedCredential
    from ringfence.client.agent.credentials import PostgresCredential as PostgresCredential
    from ringfence.client.agent.credentials import RedisCredential as RedisCredential
    from ringfence.client.agent.credentials import SshCredential as SshCredential
    from ringfence.client.agent.credentials import TokenCredential as TokenCredential
    from ringfence.client.approvals.action_approvals import PendingAction as PendingAction
    from ringfence.client.approvals.grants import Grantor as Grantor
    from ringfence.client.approvals.grants import Proposal as Proposal
    from ringfence.client.approvals.pending_approval import PendingApproval as PendingApproval
    from ringfence.client.approvals.sponsor import Sponsor as Sponsor
    from ringfence.client.errors import TokenRejectedError as TokenRejectedError
    from ringfence.client.resource_server.asgi import Needs as Needs
    from ringfence.client.resource_server.asgi import TokenGuard as TokenGuard
    from ringfence.client.resource_server.dpop_proofs import Nonces as Nonces
    from ringfence.client.resource_server.verifier import TokenVerifier as TokenVerifier
    from ringfence.client.resource_server.verifier import VerifiedToken as VerifiedToken
    from ringfence.client.settings import ClientSettings as ClientSettings
    from ringfence.kernel.base.errors import UnavailableError as UnavailableError
    from ringfence.kernel.crypto.keys import SigningKey as SigningKey

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
    "SigningKey",
    "Sponsor",
    "SshCredential",
    "TokenCredential",
    "TokenGuard",
    "TokenRejectedError",
    "TokenVerifier",
    "UnavailableError",
    "VerifiedToken",
]

_MODULES = {
    "Administrator": "ringfence.client.admin.administrator",
    "Agent": "ringfence.client.agent.agent",
    "ClientSettings": "ringfence.client.settings",
    "Grantor": "ringfence.client.approvals.grants",
    "Needs": "ringfence.client.resource_server.asgi",
    "Nonces": "ringfence.client.resource_server.dpop_proofs",
    "GatewayCredential": "ringfence.client.agent.credentials",
    "IssuedCredential": "ringfence.client.agent.credentials",
    "PendingAction": "ringfence.client.approvals.action_approvals",
    "PendingApproval": "ringfence.client.approvals.sponsor",
    "PostgresCredential": "ringfence.client.agent.credentials",
    "Proposal": "ringfence.client.approvals.grants",
    "RedisCredential": "ringfence.client.agent.credentials",
    "Sponsor": "ringfence.client.approvals.sponsor",
    "TokenGuard": "ringfence.client.resource_server.asgi",
    "SshCredential": "ringfence.client.agent.credentials",
    "TokenCredential": "ringfence.client.agent.credentials",
    "SigningKey": "ringfence.kernel.crypto.keys",
    "TokenRejectedError": "ringfence.client.errors",
    "UnavailableError": "ringfence.kernel.base.errors",
    "TokenVerifier": "ringfence.client.resource_server.verifier",
    "VerifiedToken": "ringfence.client.resource_server.verifier",
}


def __getattr__(name: str) -> Any:
    """The SDK's names, imported when asked for (PEP 562): a service that imports messages loads none of it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULES[name]), name)
