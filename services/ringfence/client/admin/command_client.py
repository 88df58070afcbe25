"""Sends signed commands of one identity, and waits for the services' signed answers."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from ringfence.client.arguments import Lifetime
from ringfence.client.connection import Connection, Coordinate, subject
from ringfence.client.errors import NotAnsweredError, ProposedError, RefusedError
from ringfence.client.passkeys.questions import PasskeyUser
from ringfence.client.settings import ClientSettings
from ringfence.client.signed_messages import ANSWERED_BY, key_of, topic_of
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.crypto.jws import Signed, parse, verify
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Claims, ExpiringClaims, ServiceRole
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.topics import DEAD_LETTER, SERVICE_EVENT
from ringfence.model.records.directory import Directory

TIMEOUT_S = 15.0


class CommandClient(Lifetime):
    """A user's key that signs commands, connected. Each command waits for the service's signed answer.

    Every command raises RefusedError (with the reasons), ProposedError (a second person has to sign it first, see
    `ringfence.client.admin.proposals`), NotAnsweredError (no answer within `timeout_s`),
    InvalidCallError or ScopeError (nothing was sent), UnavailableError (Kafka did not take it).
    """

    def __init__(self, connection: Connection, *, timeout_s: float = TIMEOUT_S) -> None:
        """Use `connect`. Raises IdentityError if the connection's key may not sign this kind of command."""
        self.id = self._signer_id(connection)
        self.connection = connection
        self.timeout_s = timeout_s
        self._outcomes = CommandOutcomes(connection)

    @staticmethod
    def _signer_id(connection: Connection) -> str:
        return subject(connection.key, "user", connection.settings)

    @classmethod
    def connect(
        cls,
        key: SigningKey | Path | str | PasskeyUser | None = None,
        settings: ClientSettings | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
        clock: Clock | None = None,
    ) -> Self:
        """Return a client, to be used as an async context manager. See `Agent.connect`.

        `timeout_s`: how long to wait for each answer.
        """
        return cls(Connection(key, settings, clock), timeout_s=timeout_s)

    async def start(self) -> None:
        """Connect. `async with` does it."""
        await self.connection.start()

    async def close(self) -> None:
        """Disconnect. `async with` does it."""
        await self.connection.close()

    async def directory(self) -> Directory:
        """The verified records of users, agents, targets and tasks; kept up to date while connected."""
        return await self.connection.directory()

    async def _command(self, model: type[ExpiringClaims], **fields: Any) -> Accepted:
        """Compose a registry command, sign it, send it, and wait for the answer."""
        return await self._send(self.connection.compose(model, **fields))

    async def _send(self, claims: Claims | Signed[Any], key: str | None = None) -> Accepted:
        return await self._outcomes.send(claims, key=key, timeout_s=self.timeout_s)


# Results of signed commands: the services' `service.event` with the command's `jti`.

log = logging.getLogger(__name__)

_LETTER_GRACE_S = 2.0
"""Seconds to wait for a signed answer after a dead letter, which is unsigned."""
UNKNOWN_OUTCOME = "It may still be carried out"


@dataclass(frozen=True, slots=True)
class Accepted:
    """A command that a service accepted. Its effects are durable."""

    command: str
    """The message's name, e.g. `agent.register`."""
    command_id: str
    """The UUIDv5 of the command's (`iss`, `jti`)."""
    result: str | None
    """The id of what the command created, e.g. of the task; None if it created nothing."""
    at_ms: int
    """The time at which the service accepted it, in milliseconds since 1970."""


class CommandOutcomes:
    """Waits for the `service.event` that answers a command, matched by the command's `jti`."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._waiting: dict[str, tuple[ServiceRole, asyncio.Future[ServiceEvent]]] = {}
        self._started = False
        self._lock = asyncio.Lock()

    async def send(
        self,
        claims: Claims | Signed[Any],
        *,
        timeout_s: float,
        key: str | None = None,
        traceparent: str | None = None,
        timeout_hint: str = UNKNOWN_OUTCOME,
    ) -> Accepted:
        """Publish a command on its topic, and wait for the answer of the service that answers there.

        Args:
            claims: the command, signed already or not.
            timeout_s: how long to wait, in seconds.
            key: the key of the record on Kafka; None: as `key_of` takes it from the command.
            timeout_hint: added to the error message where no answer comes in time.

        Raises:
            RefusedError: with the service's reasons.
            ProposedError: it waits for a second person.
            NotAnsweredError: no answer came within `timeout_s`.
            UnavailableError: Kafka did not take it.
        """
        signed = claims if isinstance(claims, Signed) else await self._connection.sign(claims)
        claims = signed.claims
        topic = topic_of(type(claims))
        assert topic is not None, f"{claims.typ} is embedded, and not sent"
        by = ANSWERED_BY[topic]
        await self._listen()
        answer: asyncio.Future[ServiceEvent] = asyncio.get_running_loop().create_future()
        self._waiting[claims.jti] = (by, answer)
        try:
            at = await self._connection.publish(
                topic, key or key_of(claims), claims, compact=signed.compact, traceparent=traceparent
            )
            event = await self._answer(answer, at, claims, by, timeout_s, timeout_hint)
        finally:
            del self._waiting[claims.jti]
        if event.kind == "refused":
            raise RefusedError(claims.typ, event.reasons, by)
        if event.kind == "proposed":
            message = "; ".join(reason.message for reason in event.reasons)
            raise ProposedError(message, event.result or "")
        return Accepted(claims.typ, message_id(claims.iss, claims.jti), event.result, event.at_ms)

    async def _answer(
        self,
        answer: asyncio.Future[ServiceEvent],
        at: Coordinate,
        claims: Claims,
        by: ServiceRole,
        timeout_s: float,
        timeout_hint: str,
    ) -> ServiceEvent:
        letter = asyncio.create_task(self._connection.dead_letters.wait_for(at))
        try:
            done, _ = await asyncio.wait(
                (answer, letter), timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED
            )
            if letter in done and answer not in done:
                await asyncio.wait((answer,), timeout=min(_LETTER_GRACE_S, timeout_s))
        finally:
            letter.cancel()
        if answer.done():
            return answer.result()
        if letter.done() and not letter.cancelled():
            raise NotAnsweredError(f"the {claims.typ} counted for nothing: {letter.result()}")
        raise NotAnsweredError(
            f"the {by} did not answer the {claims.typ} within {timeout_s:g} s: is it running, and on the same "
            f"Kafka ({self._connection.settings.kafka}) and topic prefix? {timeout_hint}"
        )

    async def _listen(self) -> None:
        async with self._lock:
            if not self._started:
                await self._connection.follow([SERVICE_EVENT, DEAD_LETTER], self._on_records, since_ms=None)
                self._started = True

    def _on_records(self, records: Sequence[Received]) -> None:
        if records and records[0].topic is DEAD_LETTER:
            self._connection.dead_letters.on_records(records)
            return
        for record in records:
            try:
                self._on_event(record)
            except InvalidMessageError as error:
                log.warning("ignored a service event at %s@%d: %s", record.topic_name, record.offset, error)

    def _on_event(self, record: Received) -> None:
        jws = parse(record.value)
        unverified = jws.unverified_claims(ServiceEvent)
        # Unverified, only to skip events about others: verifying each would cost a signature for nothing.
        if unverified.ref not in self._waiting or unverified.actor != self._connection.key.id:
            return
        by, answer = self._waiting[unverified.ref]
        find = self._connection.trust.finder(by, at_s=record.appended_at_ms / 1000)
        event = verify(jws, ServiceEvent, find, audience=self._connection.settings.trust_domain).claims
        if event.kind in ("accepted", "refused", "proposed") and not answer.done():
            answer.set_result(event)
