"""Publishes each posted message once, and remembers who may ask for the replies to it (idempotent producer).

The memory is bounded and of this process. A message that is posted again later, or at another gateway, is a replay on
Kafka: policy and revoker report it, and it changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from aiokafka.errors import KafkaError

from ringfence.gateway.agent_api.posted_messages import PostedMessage
from ringfence.gateway.errors import RequestRefusedError
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.kafka.producer import Publisher
from ringfence.messages.credential import CredentialRequest

log = logging.getLogger(__name__)

PER_AGENT: Final = 1000
IN_TOTAL: Final = 50_000
TIMEOUT_S: Final = 10.0
"""How long a post waits for the acknowledgement of Kafka. The publication goes on; the same post joins it."""
RETRY_AFTER_S: Final = 1


@dataclass(slots=True, eq=False)
class Publication:
    """One message that was posted."""

    digest: str
    agent_id: str
    kid: str
    """The thumbprint of the key that signed it."""
    task_id: str | None
    """The task of a credential request; None for other messages."""
    acknowledged: bool = False
    sending: asyncio.Task[None] | None = None


class Publications:
    """The messages that this process published, the last ones of each agent."""

    def __init__(
        self,
        publisher: Publisher,
        *,
        is_answered: Callable[[str, str], bool] = lambda _agent_id, _request_id: False,
        timeout_s: float = TIMEOUT_S,
        per_agent: int = PER_AGENT,
        in_total: int = IN_TOTAL,
    ) -> None:
        """`is_answered`: whether there is a reply to an agent's request. It was published then, before a restart."""
        self._publisher = publisher
        self._is_answered = is_answered
        self._timeout_s = timeout_s
        self._per_agent = per_agent
        self._in_total = in_total
        self._by_id: OrderedDict[str, Publication] = OrderedDict()
        self._of_agent: dict[str, OrderedDict[str, None]] = {}

    def find(self, id: str) -> Publication | None:
        """The message with this id, if it is remembered."""
        return self._by_id.get(id)

    async def publish(self, message: PostedMessage, traceparent: str | None) -> None:
        """Publish a message, unless it was published. Returns once Kafka acknowledged it.

        Raises RequestRefusedError: 409 if another message has its id; 503 if Kafka does not acknowledge it in time.
        """
        publication = self._by_id.get(message.id)
        if publication is None:
            publication = self._remember(message)
        elif publication.digest != message.signed.digest:
            raise RequestRefusedError(
                409,
                "id_taken",
                "another message with this iss and jti was posted; post the same bytes, or a new jti",
            )
        if publication.acknowledged:
            return
        if publication.sending is None:
            publication.sending = asyncio.create_task(self._send(publication, message, traceparent))
            publication.sending.add_done_callback(_retrieve)
        try:
            async with asyncio.timeout(self._timeout_s):
                await asyncio.shield(publication.sending)
        except (KafkaError, UnavailableError, TimeoutError):
            raise RequestRefusedError(
                503, "kafka_unavailable", "Kafka did not take the message; post the same bytes again",
                headers={"Retry-After": str(RETRY_AFTER_S)},
            ) from None  # fmt: skip

    async def _send(self, publication: Publication, message: PostedMessage, traceparent: str | None) -> None:
        claims = message.claims
        try:
            acknowledgement = await self._publisher.send(
                message.topic,
                message.agent_id,
                message.signed.compact,
                id=claims.jti,
                type=claims.typ,
                traceparent=traceparent,
            )
            await acknowledgement
            publication.acknowledged = True
        except KafkaError as error:
            # Without the right to write there, say, nobody else would tell the operator.
            log.warning(
                "Kafka did not take a %s on %s: %s",
                claims.typ,
                message.topic.what,
                type(error).__name__,
                extra=rate_limited(message.topic.what, type(error).__name__),
            )
            raise
        finally:
            publication.sending = None

    def _remember(self, message: PostedMessage) -> Publication:
        claims, agent_id = message.claims, message.agent_id
        is_request = isinstance(claims, CredentialRequest)
        publication = Publication(
            message.signed.digest,
            agent_id,
            message.kid,
            claims.task_id if isinstance(claims, CredentialRequest) else None,
            acknowledged=is_request and self._is_answered(agent_id, message.id),
        )
        ids = self._of_agent.setdefault(agent_id, OrderedDict())
        if len(ids) >= self._per_agent:
            self._forget(next(iter(ids)))
        elif len(self._by_id) >= self._in_total:
            self._forget(next(iter(self._by_id)))
        self._of_agent.setdefault(agent_id, ids)[message.id] = None
        self._by_id[message.id] = publication
        return publication

    def _forget(self, id: str) -> None:
        agent_id = self._by_id.pop(id).agent_id
        ids = self._of_agent[agent_id]
        del ids[id]
        if not ids:
            del self._of_agent[agent_id]


def _retrieve(sending: asyncio.Task[None]) -> None:
    """Its error belongs to those who wait; if all have gone, to nobody."""
    if not sending.cancelled():
        sending.exception()
