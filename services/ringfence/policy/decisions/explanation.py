"""Explanation of a decision: all that it was based on, read from the signed decision wherever it is kept."""

from __future__ import annotations

import asyncio
from typing import Any

from aiokafka import AIOKafkaConsumer, TopicPartition
from aiokafka.errors import KafkaError

from ringfence.kernel.base.api_errors import NotFoundError
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.kafka.connection import connection
from ringfence.kernel.kafka.table_reader import paced
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import Grant
from ringfence.messages.credential import CredentialDecision, CredentialRequest
from ringfence.messages.topics import CREDENTIAL_DECISION
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.requests.grants import id_of, signer_of
from ringfence.policy.decision_log import RecordPosition, RequestState

READ_TIMEOUT_S = 5.0
NOT_SEEN = "no decision with this request id that you could see is remembered here; audit keeps all of them"
"""Also the answer where the decision exists but the caller may not see it."""
_SHOWN = {
    "request_id", "outcome", "reasons", "ttl_s", "delivery", "required", "revisions", "input", "input_digest",
    "expires_at", "retry_after_s", "source",
}  # fmt: skip


class Explainer:
    """Explains decisions. Policy keeps those that it may need again; of others it needs the position on Kafka."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._one_at_a_time = asyncio.Lock()

    async def explain(self, state: RequestState) -> dict[str, Any]:
        """Return the decision on a decided request as JSON, with its JWS (`decision`). Raises UnavailableError."""
        at = state.decided_at
        if at is None:
            raise UnavailableError("the decision is being made; ask again in a moment")
        jws = state.jws or (await self._read(at)).value
        return self._verified_fields(jws, self._runtime.clock.now_ms())

    async def explain_recorded(self, request_id: str, at: RecordPosition) -> dict[str, Any]:
        """Return the same for a decision that policy no longer remembers, at a known position.

        Raises NotFoundError if no decision of policy on that request is there, and UnavailableError.
        """
        record = await self._read(at)
        try:
            fields = self._verified_fields(record.value, record.timestamp)
        except InvalidMessageError:
            fields = {}
        if fields.get("request_id") != request_id:
            raise NotFoundError(NOT_SEEN)
        return fields

    def _verified_fields(self, compact: str | bytes, at_ms: int) -> dict[str, Any]:
        jws, trust = parse(compact), self._runtime.trust
        decision = verify(
            jws, CredentialDecision, trust.finder("policy", at_s=at_ms / 1000), audience=trust.trust_domain
        ).claims
        # Policy verified before it signed what a decision embeds.
        request = parse(decision.request).unverified_claims(CredentialRequest)
        view = decision.model_dump(mode="json", include=_SHOWN, exclude_none=True)
        if decision.grants:
            grants = [parse(one).unverified_claims(Grant) for one in decision.grants]
            view["grants"] = [{"grant_id": id_of(one), "by": signer_of(one)} for one in grants]
        agent_id = subject_of(decision.aud, request.iss, "agent") or ""
        return {**view, "decision_id": decision.jti, "agent_id": agent_id, "decision": jws.compact}

    async def _read(self, at: RecordPosition) -> Any:
        """Return the one record at a position of `credential.decision`."""
        settings = self._runtime.settings
        partition = TopicPartition(CREDENTIAL_DECISION.name(settings.topic_prefix), at.partition)
        consumer = AIOKafkaConsumer(**connection(settings), enable_auto_commit=False)
        paced(consumer, settings)
        async with self._one_at_a_time:
            try:
                async with asyncio.timeout(READ_TIMEOUT_S):
                    await consumer.start()
                    start = await consumer.beginning_offsets([partition])
                    end = await consumer.end_offsets([partition])
                    if not start[partition] <= at.offset < end[partition]:
                        raise _gone()
                    # Assigned only now: meanwhile it would fetch from the end, and the seek wait 0.5 s for that.
                    consumer.assign([partition])
                    consumer.seek(partition, at.offset)
                    record = await consumer.getone(partition)
            except (KafkaError, TimeoutError) as error:
                raise UnavailableError(
                    f"the decision cannot be read from Kafka now ({type(error).__name__}); ask again"
                ) from None
            finally:
                await consumer.stop()
        if record.offset != at.offset:
            raise _gone()
        return record


def _gone() -> UnavailableError:
    return UnavailableError("the decision is not on Kafka any more; audit keeps its story")
