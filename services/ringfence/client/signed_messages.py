"""Messages that people sign: how each is composed, where it is sent, and the records that the sign page shows it by.

The SDK, the command line, the console and policy's evidence for it use this module, so a person sees the same wherever
they sign.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, TypeVar

from ringfence.client.arguments import permissions
from ringfence.client.errors import InvalidCallError, checked
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.approval import ActionApproval, ActionRequest, Approval, Grant
from ringfence.messages.base import Claims, ExpiringClaims, Permission, ServiceRole, Topic
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import RevocationRequest, Selector
from ringfence.messages.registry import (
    AgentResume,
    AgentSetCeiling,
    AgentSuspend,
    AgentTransfer,
    AgentTransferConsent,
    CommandSecond,
    CommandWithdraw,
    ModelLimits,
    TaskAssign,
    TaskConsent,
    TaskDelegate,
    TaskEnd,
    TaskTerms,
    UserEndKey,
)
from ringfence.messages.topics import APPROVAL_RESPONSE, REGISTRY_COMMAND, REVOCATION_REQUEST
from ringfence.model.identity.spiffe_ids import SubjectKind, subject_of
from ringfence.model.records.directory import Directory
from ringfence.model.scope.scope import validate_scope

C = TypeVar("C", bound=Claims)
Subject = tuple[SubjectKind, str]

STAMPED: Final = frozenset({"iss", "aud", "iat", "jti"})
"""The claims that the sign page adds: it alone knows when the person signs, and makes the random id."""
ANSWERED_BY: Final[Mapping[Topic[Any], ServiceRole]] = {
    REGISTRY_COMMAND: "registry",
    REVOCATION_REQUEST: "revoker",
    APPROVAL_RESPONSE: "policy",
}
"""The topics of what people sign, and the service whose `service.event` answers a message there."""
APPROVED_TERMS: Final = ("request", "request_id", "ttl_s", "delivery", "revisions")
"""What an approval repeats of the question, which has each under the same name."""


def stamp(iss: str, aud: str, now_s: int, life_s: int) -> dict[str, Any]:
    """The claims that every message has: `iss`, `aud`, `iat`, a new `jti`, and `exp` where `life_s` is not 0."""
    claims: dict[str, Any] = {"iss": iss, "aud": aud, "iat": now_s, "jti": str(uuid.uuid4())}
    return {**claims, "exp": now_s + life_s} if life_s else claims


def compose(model: type[C], stamp: Mapping[str, Any], *, until: int | None = None, **fields: Any) -> C:
    """Compose a message.

    Args:
        stamp: what `stamp` returned; `exp` is left out where the message does not expire.
        until: when it ends at the latest, in seconds since 1970.
        fields: its own claims.

    Raises pydantic's ValidationError.
    """
    claims = {**stamp, **fields}
    if not issubclass(model, ExpiringClaims):
        claims.pop("exp", None)
    elif until is not None:
        claims["exp"] = min(claims["exp"], until)
    return model(**claims)


def task_terms(
    agent_id: str,
    purpose: str,
    scope: Sequence[Permission],
    now_s: int,
    *,
    ends_in_s: int | None,
    not_after: int | None,
    limits: ModelLimits | None = None,
) -> TaskTerms:
    """The terms of a task, which ends either `ends_in_s` seconds from now or at `not_after`.

    Raises InvalidCallError, ScopeError.
    """
    scope = permissions("scope", scope)
    validate_scope(scope)
    if (ends_in_s is None) == (not_after is None):
        raise InvalidCallError("a task needs its end: give either ends_in_s or not_after")
    end = not_after if not_after is not None else now_s + (ends_in_s or 0)
    with checked("the task"):
        return TaskTerms(agent_id=agent_id, purpose=purpose, scope=scope, not_after=end, limits=limits)


def unstamped(claims: Claims) -> dict[str, Any]:
    """The claims of a message, as JSON has them, without those that the sign page adds."""
    return claims.model_dump(mode="json", exclude_none=True, exclude=set(STAMPED))


def topic_of(model: type[Claims]) -> Topic[Any] | None:
    """The topic of a message that people sign; None if it is embedded in another one."""
    return next((topic for topic in ANSWERED_BY if model in topic.models), None)


def key_of(claims: Claims) -> str:
    """The key on Kafka of a registry command, or of the revocation of all that a selector covers."""
    match claims:
        case TaskAssign() | TaskDelegate():
            return message_id(claims.iss, claims.jti)
        case CommandSecond() | CommandWithdraw():
            return claims.proposal
        case RevocationRequest(selector=Selector() as one):
            return one.agent_id or one.task_id or one.sponsor or one.target_id or one.user_id or "all"
        case _:
            return str(getattr(claims, f"{claims.typ.partition('.')[0]}_id"))


def subjects_of(claims: Claims) -> Iterator[Subject]:
    """The subjects that the sign page shows a command by, besides the person who signs.

    A revocation is shown without the record of its task where there is no such task.
    """
    match claims:
        case AgentSuspend() | AgentResume() | AgentSetCeiling() | AgentTransfer() | AgentTransferConsent():
            yield "agent", claims.agent_id
        case TaskAssign() | TaskConsent():
            yield "agent", claims.terms.agent_id
        case TaskEnd():
            yield "task", claims.task_id
        case UserEndKey():
            yield "user", claims.user_id
        case RevocationRequest(selector=Selector(task_id=str(task_id))):
            yield "task", task_id


def approval_subjects_of(claims: Claims, directory: Directory) -> Iterator[Subject]:
    """The subjects that the sign page shows an approval by, besides the person who signs. Raises InvalidCallError."""
    match claims:
        case Approval():
            request = parse(claims.request).unverified_claims(CredentialRequest)
            agent_id = subject_of(claims.aud, request.iss, "agent") or ""
            yield from ground_of(directory, agent_id, request.task_id, request.scope[0].target)
        case ActionApproval():
            action = parse(claims.request).unverified_claims(ActionRequest)
            yield from ground_of(directory, action.agent_id, action.task_id, action.target_id)
        case Grant():
            yield from ground_of(directory, claims.agent_id, claims.task_id, claims.scope[0].target)


def ground_of(directory: Directory, agent_id: str, task_id: str, target_id: str) -> Iterator[Subject]:
    """The subjects that a decision rests on. Raises InvalidCallError if there is no such task."""
    task = directory.task(task_id)
    if task is None:
        raise InvalidCallError(f"there is no task {task_id}")
    yield from (
        ("agent", agent_id),
        ("task", task_id),
        ("target", target_id),
        ("user", task.state.on_behalf_of),
    )


def evidence_of(directory: Directory, trust: TrustStore, subjects: Sequence[Subject]) -> dict[str, Any]:
    """The trust bundle and the records of some subjects, each once. Raises InvalidCallError, UnavailableError."""
    if not trust.compact:
        raise UnavailableError(str(trust.unready()))
    return {
        "trust": trust.compact.decode().strip(),
        "records": [_record(directory, kind, id) for kind, id in dict.fromkeys(subjects)],
    }


def _record(directory: Directory, kind: SubjectKind, id: str) -> str:
    entry = directory.entry(kind, id)
    if entry is None or not entry.compact:
        raise InvalidCallError(f"there is no {kind} {id}")
    return entry.compact.decode()
