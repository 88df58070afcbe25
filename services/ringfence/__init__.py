"""Ringfence: a credential broker for AI agents.

What an agent, a sponsor or a resource server needs is imported from here. Further public modules: `ringfence.testing`
for the test suites of agents, `ringfence.faststream` for consumers of topics, `ringfence.backends` for authors of
backends. All other modules may change with any release.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ringfence.client.admin.administrator import Administrator as Administrator
    from ringfence.client.admin.administrator import AnyKey as AnyKey
    from ringfence.client.admin.command_client import Accepted as Accepted
    from ringfence.client.admin.preview import Preview as Preview
    from ringfence.client.agent.agent import Agent as Agent
    from ringfence.client.agent.agent import OnPending as OnPending
    from ringfence.client.agent.credentials import GatewayCredential as GatewayCredential
    from ringfence.client.agent.credentials import IssuedCredential as IssuedCredential
    from ringfence.client.agent.credentials import MysqlCredential as MysqlCredential
    from ringfence.client.agent.credentials import PostgresCredential as PostgresCredential
    from ringfence.client.agent.credentials import RedisCredential as RedisCredential
    from ringfence.client.agent.credentials import SshCredential as SshCredential
    from ringfence.client.agent.credentials import TokenCredential as TokenCredential
    from ringfence.client.agent.httpx_auth import DpopAuth as DpopAuth
    from ringfence.client.agent.replies import PendingRequest as PendingRequest
    from ringfence.client.approvals.action_approvals import PendingAction as PendingAction
    from ringfence.client.approvals.grants import Grantor as Grantor
    from ringfence.client.approvals.grants import Proposal as Proposal
    from ringfence.client.approvals.history_comparison import PendingApproval as PendingApproval
    from ringfence.client.approvals.history_comparison import RequestGroup as RequestGroup
    from ringfence.client.approvals.sponsor import Sponsor as Sponsor
    from ringfence.client.errors import ApiError as ApiError
    from ringfence.client.errors import CredentialOverError as CredentialOverError
    from ringfence.client.errors import CredentialUseError as CredentialUseError
    from ringfence.client.errors import EnrolmentRefusedError as EnrolmentRefusedError
    from ringfence.client.errors import IdentityError as IdentityError
    from ringfence.client.errors import InvalidCallError as InvalidCallError
    from ringfence.client.errors import NotAnsweredError as NotAnsweredError
    from ringfence.client.errors import NotYoursError as NotYoursError
    from ringfence.client.errors import ProposedError as ProposedError
    from ringfence.client.errors import RefusedError as RefusedError
    from ringfence.client.errors import RequestDeniedError as RequestDeniedError
    from ringfence.client.errors import RequestTimeoutError as RequestTimeoutError
    from ringfence.client.errors import StaleApprovalError as StaleApprovalError
    from ringfence.client.errors import TokenRejectedError as TokenRejectedError
    from ringfence.client.instance_enrolment import GitHubActions as GitHubActions
    from ringfence.client.instance_enrolment import GoogleMetadata as GoogleMetadata
    from ringfence.client.instance_enrolment import TokenFile as TokenFile
    from ringfence.client.instance_enrolment import TokenSource as TokenSource
    from ringfence.client.instance_enrolment import TokenSourceError as TokenSourceError
    from ringfence.client.passkeys.questions import NotSignedError as NotSignedError
    from ringfence.client.passkeys.questions import PasskeyUser as PasskeyUser
    from ringfence.client.resource_server.asgi import Needs as Needs
    from ringfence.client.resource_server.asgi import TokenGuard as TokenGuard
    from ringfence.client.resource_server.asgi import any_token as any_token
    from ringfence.client.resource_server.challenges import HttpRefusal as HttpRefusal
    from ringfence.client.resource_server.dpop_proofs import Nonces as Nonces
    from ringfence.client.resource_server.dpop_proofs import ProofError as ProofError
    from ringfence.client.resource_server.dpop_proofs import ProofMemory as ProofMemory
    from ringfence.client.resource_server.verifier import TokenVerifier as TokenVerifier
    from ringfence.client.resource_server.verifier import VerifiedToken as VerifiedToken
    from ringfence.client.settings import ClientSettings as ClientSettings
    from ringfence.client.task_view import HeldLease as HeldLease
    from ringfence.client.task_view import TaskView as TaskView
    from ringfence.kernel.base.clock import Clock as Clock
    from ringfence.kernel.base.errors import InvalidMessageError as InvalidMessageError
    from ringfence.kernel.base.errors import RingfenceError as RingfenceError
    from ringfence.kernel.base.errors import SettingsError as SettingsError
    from ringfence.kernel.base.errors import UnavailableError as UnavailableError
    from ringfence.kernel.crypto.keys import KeyFileError as KeyFileError
    from ringfence.kernel.crypto.keys import SigningKey as SigningKey
    from ringfence.messages.approval import Grant as Grant
    from ringfence.messages.base import KeyRecord as KeyRecord
    from ringfence.messages.base import Permission as Permission
    from ringfence.messages.base import PublicJwk as PublicJwk
    from ringfence.messages.base import Scope as Scope
    from ringfence.messages.credential import Delivery as Delivery
    from ringfence.messages.credential import Reason as Reason
    from ringfence.messages.credential import RequiredClass as RequiredClass
    from ringfence.messages.credential import Revisions as Revisions
    from ringfence.messages.enrolment import AttestationSelector as AttestationSelector
    from ringfence.messages.registry import BackendSettings as BackendSettings
    from ringfence.messages.registry import Delegation as Delegation
    from ringfence.messages.registry import ModelLimits as ModelLimits
    from ringfence.messages.registry import Provisioning as Provisioning
    from ringfence.messages.registry import RequestRule as RequestRule
    from ringfence.messages.registry import Role as Role
    from ringfence.messages.registry import TaskTerms as TaskTerms
    from ringfence.messages.registry import VerbFloor as VerbFloor
    from ringfence.model.http_targets import RequestMapError as RequestMapError
    from ringfence.model.records.command_chain import ChainError as ChainError
    from ringfence.model.records.consent import nonce_of as nonce_of
    from ringfence.model.scope.globs import ScopeError as ScopeError

__version__ = "0.1.0"

__all__ = [
    "Accepted",
    "Administrator",
    "Agent",
    "AnyKey",
    "ApiError",
    "AttestationSelector",
    "BackendSettings",
    "ChainError",
    "ClientSettings",
    "Clock",
    "CredentialOverError",
    "CredentialUseError",
    "Delegation",
    "Delivery",
    "DpopAuth",
    "EnrolmentRefusedError",
    "GatewayCredential",
    "GitHubActions",
    "GoogleMetadata",
    "Grant",
    "Grantor",
    "HeldLease",
    "HttpRefusal",
    "IdentityError",
    "InvalidCallError",
    "InvalidMessageError",
    "IssuedCredential",
    "KeyFileError",
    "KeyRecord",
    "ModelLimits",
    "MysqlCredential",
    "Needs",
    "Nonces",
    "NotAnsweredError",
    "NotSignedError",
    "NotYoursError",
    "OnPending",
    "PasskeyUser",
    "PendingAction",
    "PendingApproval",
    "PendingRequest",
    "Permission",
    "PostgresCredential",
    "Preview",
    "ProofError",
    "ProofMemory",
    "Proposal",
    "ProposedError",
    "Provisioning",
    "PublicJwk",
    "Reason",
    "RedisCredential",
    "RefusedError",
    "RequestDeniedError",
    "RequestGroup",
    "RequestMapError",
    "RequestRule",
    "RequestTimeoutError",
    "RequiredClass",
    "Revisions",
    "RingfenceError",
    "Role",
    "Scope",
    "ScopeError",
    "SettingsError",
    "SigningKey",
    "Sponsor",
    "SshCredential",
    "StaleApprovalError",
    "TaskTerms",
    "TaskView",
    "TokenCredential",
    "TokenFile",
    "TokenGuard",
    "TokenRejectedError",
    "TokenSource",
    "TokenSourceError",
    "TokenVerifier",
    "UnavailableError",
    "VerbFloor",
    "VerifiedToken",
    "any_token",
    "nonce_of",
]

_MODULES = {
    "Accepted": "ringfence.client.admin.command_client",
    "Administrator": "ringfence.client.admin.administrator",
    "Agent": "ringfence.client.agent.agent",
    "AnyKey": "ringfence.client.admin.administrator",
    "ApiError": "ringfence.client.errors",
    "AttestationSelector": "ringfence.messages.enrolment",
    "BackendSettings": "ringfence.messages.registry",
    "ChainError": "ringfence.model.records.command_chain",
    "ClientSettings": "ringfence.client.settings",
    "Clock": "ringfence.kernel.base.clock",
    "CredentialOverError": "ringfence.client.errors",
    "CredentialUseError": "ringfence.client.errors",
    "Delegation": "ringfence.messages.registry",
    "Delivery": "ringfence.messages.credential",
    "DpopAuth": "ringfence.client.agent.httpx_auth",
    "EnrolmentRefusedError": "ringfence.client.errors",
    "GatewayCredential": "ringfence.client.agent.credentials",
    "GitHubActions": "ringfence.client.instance_enrolment",
    "GoogleMetadata": "ringfence.client.instance_enrolment",
    "Grant": "ringfence.messages.approval",
    "Grantor": "ringfence.client.approvals.grants",
    "HeldLease": "ringfence.client.task_view",
    "HttpRefusal": "ringfence.client.resource_server.challenges",
    "IdentityError": "ringfence.client.errors",
    "InvalidCallError": "ringfence.client.errors",
    "InvalidMessageError": "ringfence.kernel.base.errors",
    "IssuedCredential": "ringfence.client.agent.credentials",
    "KeyFileError": "ringfence.kernel.crypto.keys",
    "KeyRecord": "ringfence.messages.base",
    "MysqlCredential": "ringfence.client.agent.credentials",
    "Needs": "ringfence.client.resource_server.asgi",
    "Nonces": "ringfence.client.resource_server.dpop_proofs",
    "NotAnsweredError": "ringfence.client.errors",
    "NotSignedError": "ringfence.client.passkeys.questions",
    "NotYoursError": "ringfence.client.errors",
    "OnPending": "ringfence.client.agent.agent",
    "PasskeyUser": "ringfence.client.passkeys.questions",
    "PendingAction": "ringfence.client.approvals.action_approvals",
    "PendingApproval": "ringfence.client.approvals.history_comparison",
    "PendingRequest": "ringfence.client.agent.replies",
    "Permission": "ringfence.messages.base",
    "PostgresCredential": "ringfence.client.agent.credentials",
    "Preview": "ringfence.client.admin.preview",
    "ProofError": "ringfence.client.resource_server.dpop_proofs",
    "ProofMemory": "ringfence.client.resource_server.dpop_proofs",
    "Proposal": "ringfence.client.approvals.grants",
    "ProposedError": "ringfence.client.errors",
    "Provisioning": "ringfence.messages.registry",
    "PublicJwk": "ringfence.messages.base",
    "Reason": "ringfence.messages.credential",
    "RedisCredential": "ringfence.client.agent.credentials",
    "RefusedError": "ringfence.client.errors",
    "RequestDeniedError": "ringfence.client.errors",
    "RequestGroup": "ringfence.client.approvals.history_comparison",
    "RequestMapError": "ringfence.model.http_targets",
    "RequestRule": "ringfence.messages.registry",
    "RequestTimeoutError": "ringfence.client.errors",
    "RequiredClass": "ringfence.messages.credential",
    "Revisions": "ringfence.messages.credential",
    "RingfenceError": "ringfence.kernel.base.errors",
    "Role": "ringfence.messages.registry",
    "Scope": "ringfence.messages.base",
    "ScopeError": "ringfence.model.scope.globs",
    "SettingsError": "ringfence.kernel.base.errors",
    "SigningKey": "ringfence.kernel.crypto.keys",
    "Sponsor": "ringfence.client.approvals.sponsor",
    "SshCredential": "ringfence.client.agent.credentials",
    "StaleApprovalError": "ringfence.client.errors",
    "ModelLimits": "ringfence.messages.registry",
    "TaskTerms": "ringfence.messages.registry",
    "TaskView": "ringfence.client.task_view",
    "TokenCredential": "ringfence.client.agent.credentials",
    "TokenFile": "ringfence.client.instance_enrolment",
    "TokenGuard": "ringfence.client.resource_server.asgi",
    "TokenRejectedError": "ringfence.client.errors",
    "TokenSource": "ringfence.client.instance_enrolment",
    "TokenSourceError": "ringfence.client.instance_enrolment",
    "TokenVerifier": "ringfence.client.resource_server.verifier",
    "UnavailableError": "ringfence.kernel.base.errors",
    "VerbFloor": "ringfence.messages.registry",
    "VerifiedToken": "ringfence.client.resource_server.verifier",
    "any_token": "ringfence.client.resource_server.asgi",
    "nonce_of": "ringfence.model.records.consent",
}


def __getattr__(name: str) -> Any:
    """The SDK's names, imported when asked for (PEP 562): a service that imports messages loads none of it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_MODULES[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__all__", "__doc__", "__file__", "__name__", "__path__", "__version__"])
