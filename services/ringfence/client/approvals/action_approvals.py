"""Single actions that wait for approval at a gateway.

A question is shown exactly as a gateway signed it.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Protocol

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import ActionApproval, ActionRequest
from ringfence.messages.base import Jws, typ_header
from ringfence.messages.registry import ActionClass
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.approvals import may_approve
from ringfence.model.requests.approver_keys import check_approver_key
from ringfence.model.requests.facts import DeniedError, load_records
from ringfence.model.verdict import ALLOWED, Allowed, Verdict

log = logging.getLogger(__name__)

MAX_OPEN_PER_GATEWAY = 1000
"""The most open questions of one gateway that are kept, so that no gateway can exhaust the memory."""


@dataclass(frozen=True, slots=True)
class ActionHeader:
    """An HTTP header that is forwarded with an action."""

    name: str
    value: str | None
    """None if the gateway does not show it, since it may be a secret."""


@dataclass(frozen=True, slots=True)
class PendingAction:
    """An action of an agent that waits for approval, built from what a gateway signed and from verified records."""

    request_id: str
    digest: str
    """SHA-256 (hex) of the signed `action.request`. The approval signs this digest."""
    gateway: str
    """The SPIFFE ID of the gateway that holds the request."""
    agent: str
    agent_description: str
    sponsor: str
    task_id: str
    purpose: str
    """The purpose of the task."""
    on_behalf_of: str
    target: str
    target_description: str
    lease_id: str
    verb: str
    resource: str
    method: str
    url: str
    """The destination, not percent-decoded."""
    body_digest: str
    """SHA-256 (hex) of the body."""
    body_bytes: int
    headers_digest: str
    """SHA-256 (hex) over all headers."""
    headers: tuple[ActionHeader, ...]
    required: ActionClass
    mine: bool
    """Whether the current person may give the approval."""
    asked_at: int
    """Seconds since 1970."""
    expires_at: int
    """Seconds since 1970. Later answers do not count."""
    request: Jws


@dataclass(frozen=True, slots=True)
class _OpenAction:
    signed: Signed[ActionRequest]
    people: frozenset[str]
    """Who was asked, from the keys of the records."""


class _TrustDomain(Protocol):
    @property
    def trust_domain(self) -> str: ...


class _Connected(Protocol):
    """A verifier of messages: a client's connection, or a service's runtime."""

    @property
    def trust(self) -> TrustStore: ...

    @property
    def settings(self) -> _TrustDomain: ...

    @property
    def clock(self) -> Clock: ...


class OpenActions:
    """The open questions about actions. It holds only what a gateway of the trust bundle signed."""

    def __init__(self, connection: _Connected, directory: Directory, user_id: str) -> None:
        """`user_id`: the person who looks, unless `pending` names another."""
        self._connection = connection
        self._directory = directory
        self._user_id = user_id
        self._requests: dict[str, _OpenAction] = {}
        self._answered: set[str] = set()
        self.problems: dict[str, str] = {}
        """By request id, why a question that a gateway signed is not shown."""

    def on_request(self, record: Received) -> None:
        """Add a question.

        Raises InvalidMessageError if no gateway signed it, or it arrived outside its validity.
        """
        at_ms = record.appended_at_ms
        signed = verify(
            parse(record.value),
            ActionRequest,
            self._connection.trust.finder("gateway", at_s=at_ms / 1000),
            audience=self._connection.settings.trust_domain,
            appended_at_ms=at_ms,
        )
        self._forget()
        before = self._requests.get(signed.digest)
        open_of_gateway = sum(one.signed.claims.iss == signed.claims.iss for one in self._requests.values())
        if before is None and open_of_gateway >= MAX_OPEN_PER_GATEWAY:
            log.warning("ignored a question of %s: %d are open already", signed.claims.iss, open_of_gateway)
            return
        people = (before.people if before else frozenset()) | {record.key or ""}
        self._requests[signed.digest] = _OpenAction(signed, people)

    def on_answer(self, record: Received) -> None:
        """Add an answer by somebody who may approve.

        Raises InvalidMessageError or ChainError if it does not verify.
        """
        jws = parse(record.value)
        open_action = self._requests.get(jws.unverified_claims(ActionApproval).request_digest)
        if open_action is None:
            return  # skipped before its signature costs anything; skipping trusts nothing
        at_s = record.appended_at_ms / 1000
        signed = verify(
            jws,
            ActionApproval,
            lambda iss, kid: self._directory.user_key(iss, kid, at_s),
            audience=self._connection.settings.trust_domain,
            appended_at_ms=record.appended_at_ms,
        )
        answer = signed.claims
        user_id, claims = subject_of(answer.aud, answer.iss, "user") or "", open_action.signed.claims
        try:
            records = load_records(self._directory, claims.agent_id, claims.task_id, claims.target_id)
        except DeniedError:
            return
        if not may_approve(self._directory, user_id, claims.required, records):
            return
        # A yes by a key that does not count is none: the question must not vanish from the list of who can answer it.
        if isinstance(self.check_key(signed, record.appended_at_ms), Allowed):
            self._answered.add(answer.request_digest)

    def check_key(self, answer: Signed[ActionApproval], at_ms: int) -> Verdict:
        """Check that the key of a yes counts for an open action at `at_ms`. A no counts by any key."""
        open_action = self._requests.get(answer.claims.request_digest)
        if answer.claims.verdict == "denied" or open_action is None:
            return ALLOWED
        claims = open_action.signed.claims
        try:
            records = load_records(self._directory, claims.agent_id, claims.task_id, claims.target_id)
        except DeniedError:
            return ALLOWED
        return check_approver_key(answer, self._directory, records, {claims.verb}, at_ms=at_ms)

    def answered(self, digest: str) -> None:
        self._answered.add(digest)

    def pending(self, *, everyone: bool = False, user_id: str | None = None) -> list[PendingAction]:
        """The open actions for this person, oldest first; with `everyone` also those of others."""
        self._forget()
        person = self._user_id if user_id is None else user_id
        shown: list[PendingAction] = []
        for digest, open_action in self._requests.items():
            if digest in self._answered:
                continue
            pending = self._pending_action(open_action.signed, person)
            if pending is not None and (everyone or pending.mine or person in open_action.people):
                shown.append(pending)
        return sorted(shown, key=lambda one: one.asked_at)

    def get(self, digest: str) -> PendingAction | None:
        """An open action as it would be shown now; None if it is not open, or cannot be shown."""
        self._forget()
        open_action = self._requests.get(digest)
        return (
            self._pending_action(open_action.signed, self._user_id)
            if open_action is not None and digest not in self._answered
            else None
        )

    def _pending_action(self, signed: Signed[ActionRequest], user_id: str) -> PendingAction | None:
        claims = signed.claims
        id = message_id(claims.iss, claims.jti)
        try:
            records = load_records(self._directory, claims.agent_id, claims.task_id, claims.target_id)
            if records.revisions(claims.revisions.policy) != claims.revisions:
                raise InvalidMessageError(
                    "agent, user, task or target changed since it was asked, or the change has not arrived here yet"
                )
            if records.task.state.agent_id != claims.agent_id:
                raise InvalidMessageError("its task is another agent's")
            mine = may_approve(self._directory, user_id, claims.required, records)
        except (InvalidMessageError, DeniedError, ChainError) as error:
            self.problems[id] = str(error)
            return None
        self.problems.pop(id, None)
        return PendingAction(
            request_id=id,
            digest=signed.digest,
            gateway=claims.iss,
            agent=claims.agent_id,
            agent_description=records.agent.state.description,
            sponsor=records.agent.state.sponsor,
            task_id=claims.task_id,
            purpose=records.task.state.purpose,
            on_behalf_of=records.task.state.on_behalf_of,
            target=claims.target_id,
            target_description=records.target.state.description,
            lease_id=claims.lease_id,
            verb=claims.verb,
            resource=claims.resource,
            method=claims.method,
            url=claims.url,
            body_digest=claims.body_digest,
            body_bytes=claims.body_bytes,
            headers_digest=claims.headers_digest,
            headers=tuple(ActionHeader(one.name, one.value) for one in claims.headers),
            required=claims.required,
            mine=mine,
            asked_at=claims.iat,
            expires_at=claims.exp,
            request=signed.compact,
        )

    def _forget(self) -> None:
        now_s = self._connection.clock.now_ms() / 1000
        for digest in [digest for digest, one in self._requests.items() if one.signed.claims.exp <= now_s]:
            claims = self._requests.pop(digest).signed.claims
            self._answered.discard(digest)
            self.problems.pop(message_id(claims.iss, claims.jti), None)


def is_action(record: Received, model: type[ActionRequest] | type[ActionApproval]) -> bool:
    try:
        return parse(record.value).header.typ == typ_header(model)
    except InvalidMessageError:
        return False
