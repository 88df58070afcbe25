"""Verification of incoming records: requests of agents, approvals of people, grants."""

from __future__ import annotations

from typing import TypeVar

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.claims import ExpiredError
from ringfence.kernel.crypto.jwe import check_reply_key
from ringfence.kernel.crypto.jws import KeyFinder, Signed, parse
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.kernel.kafka.partitioning import partition_of
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import ActionApproval, Approval, BreakGlassReview, Grant, GrantWithdraw
from ringfence.messages.base import ExpiringClaims, typ_header
from ringfence.messages.credential import MAX_REQUEST_BYTES, CredentialRequest, RequestWithdraw
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.signed_messages import FindKey, key_of_agent, verify_message
from ringfence.policy.decision_log import ANSWER_EXPIRED_WITHIN_MS, MAX_AGE_MS
from ringfence.policy.domain import Case

C = TypeVar("C", bound=ExpiringClaims)

MAX_APPROVAL_BYTES = 192 * 1024
MISPLACED = "partition_unexpected"

_FOR_OTHERS = frozenset({typ_header(BreakGlassReview), typ_header(ActionApproval)})


def is_for_others(record: Received) -> bool:
    """Return whether a record claims to be a review of break glass (for audit) or about an action (for gateways)."""
    try:
        return parse(record.value).header.typ in _FOR_OTHERS
    except InvalidMessageError:
        return False


def is_request_withdrawal(record: Received) -> bool:
    """Return whether a record of `credential.request` claims to withdraw a request."""
    try:
        return parse(record.value).header.typ == typ_header(RequestWithdraw)
    except InvalidMessageError:
        return False


class MessageVerifier:
    """Verifies incoming records. An invalid one raises InvalidMessageError and goes to the dead letters."""

    def __init__(self, runtime: Runtime, directory: Directory) -> None:
        self._runtime = runtime
        self._directory = directory
        self._partitions: list[int] = []

    async def request(self, record: Received) -> tuple[Case, ExpiredError | None]:
        """Return the request in a record, signed by an agent, and the error if it came too late."""
        if self._runtime.clock.now_ms() - record.appended_at_ms > MAX_AGE_MS:
            raise InvalidMessageError(
                "the request has waited longer than any request may live; ask anew", code="too_old"
            )
        request, late = await self._verified(record, CredentialRequest, key_of_agent, MAX_REQUEST_BYTES)
        claims = request.claims
        if late is not None and record.appended_at_ms - claims.exp * 1000 > ANSWER_EXPIRED_WITHIN_MS:
            raise late
        agent_id = subject_of(claims.aud, claims.iss, "agent") or ""
        if record.key != agent_id:
            raise InvalidMessageError(
                f"the Kafka key of a request is the agent's id, {agent_id}", code="key_unexpected"
            )
        if problem := await self.misplaced(record, agent_id):
            raise InvalidMessageError(problem, code=MISPLACED)
        check_reply_key(claims.reply_key)
        id = message_id(claims.iss, claims.jti)
        return Case(request, id, agent_id, record.coordinates, record.traceparent), late

    async def misplaced(self, record: Received, agent_id: str) -> str | None:
        """Return the reason why a record about an agent is in the wrong partition, or None.

        One replica processes all requests of an agent and the answers to them, in order. Two replicas that evaluate
        concurrently do not know what the other allows. A producer can write a key to any partition.
        """
        if self._partitions and record.partition == partition_of(agent_id, self._partitions):
            return None
        self._partitions = await self._runtime.publisher.partitions(record.topic)
        right = partition_of(agent_id, self._partitions)
        if record.partition == right:
            return None
        return (
            f"what is about agent {agent_id} belongs in partition {right} of {record.topic_name}: use Kafka's default "
            "partitioner (murmur2 of the key)"
        )

    async def approval(self, record: Received) -> tuple[Signed[Approval], ExpiredError | None]:
        """Return the approval in a record, signed by a user (active or not) or an agent, and the error if it came too
        late.

        A signature by a disabled user or by an agent is accepted here, so that the evaluation can refuse it by name.
        """
        return await self._verified(record, Approval, self._person_key, MAX_APPROVAL_BYTES)

    async def grant(self, record: Received) -> tuple[Signed[Grant], ExpiredError | None]:
        """Return the grant in a record. For signer and second result see `approval`."""
        return await self._verified(record, Grant, self._person_key, MAX_REQUEST_BYTES)

    async def withdrawal(self, record: Received) -> tuple[Signed[GrantWithdraw], ExpiredError | None]:
        """Return the withdrawal of a grant in a record. For signer and second result see `approval`."""
        return await self._verified(record, GrantWithdraw, self._person_key, MAX_REQUEST_BYTES)

    async def request_withdrawal(
        self, record: Received
    ) -> tuple[Signed[RequestWithdraw], ExpiredError | None]:
        """Return the withdrawal of a request in a record, signed by an agent, and the error if it came too late."""
        return await self._verified(record, RequestWithdraw, key_of_agent, MAX_REQUEST_BYTES)

    async def _verified(
        self,
        record: Received,
        model: type[C],
        find_key: FindKey,
        max_bytes: int,
    ) -> tuple[Signed[C], ExpiredError | None]:
        settings = self._runtime.settings
        return await verify_message(
            record.value, model, self._directory, find_key, audience=settings.trust_domain,
            at_ms=record.appended_at_ms, max_bytes=max_bytes,
            catch_up=lambda: self._runtime.tables_caught_up(settings.grace_s),
        )  # fmt: skip

    def _person_key(self, iss: str, kid: str, at_s: float, of_agents: KeyFinder) -> VerificationKey | None:
        user_id = subject_of(self._runtime.settings.trust_domain, iss, "user")
        if user_id is None:
            return key_of_agent(iss, kid, at_s, of_agents)
        try:
            entry = self._directory.user(user_id)
        except ChainError:
            return None
        return self._directory.key_of(entry.state, kid, at_s) if entry else None
