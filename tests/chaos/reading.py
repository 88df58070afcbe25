"""Reads a whole run from Kafka, verifying each signature, into a `History`."""

from __future__ import annotations

import asyncio
import contextlib
from collections import defaultdict
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import orjson

from ringfence.client.settings import ClientSettings
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.crypto.jwe import unverified_kid
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.keys import valid_key
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.crypto.webauthn import VerificationKey
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.kafka.table_reader import Follower
from ringfence.messages.credential import CredentialRequest
from ringfence.messages.lease import Lease, RevocationAck, RevocationRequest
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import (
    AgentRecord,
    AgentState,
    AnyRecord,
    TargetRecord,
    TaskRecord,
    UserRecord,
    UserState,
)
from ringfence.messages.topics import (
    ACTION,
    AGENT,
    AUDIT,
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    CREDENTIAL_REQUEST,
    DEAD_LETTER,
    LEASE,
    REGISTRY_COMMAND,
    REVOCATION_ACK,
    REVOCATION_REQUEST,
    SERVICE_EVENT,
    TARGET,
    TASK,
    TRUST,
    USER,
)
from ringfence.model.leases.epochs import Epochs
from ringfence.model.leases.lifecycle import statement
from ringfence.model.lifecycle.holds import held_keys, hold_of
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from tests.chaos.history import Ack, Followed, History, LeaseRecord, Order, State

_RECORDS: dict[Any, type[AnyRecord]] = {
    USER: UserRecord, AGENT: AgentRecord, TARGET: TargetRecord, TASK: TaskRecord
}  # fmt: skip
TABLES = tuple(_RECORDS)
TOLD = (
    REGISTRY_COMMAND, CREDENTIAL_REQUEST, CREDENTIAL_DECISION, LEASE, REVOCATION_REQUEST, REVOCATION_ACK, ACTION,
    SERVICE_EVENT, DEAD_LETTER,
)  # fmt: skip
"""Each record here is a step that audit has to tell."""
TOPICS = (TRUST, *TABLES, *TOLD, CREDENTIAL_REPLY, AUDIT)
_READ_WITHIN_S = 120.0


async def read(settings: ClientSettings, over_ms: int) -> History:
    """Everything that stands on the topics now; what came after `over_ms`, audit need not have told yet.

    Raises UnavailableError where Kafka does not give it.
    """
    records: list[Received] = []
    async with Follower(settings, TOPICS, records.extend) as follower:
        try:
            async with asyncio.timeout(_READ_WITHIN_S):
                await follower.complete.wait()
        except TimeoutError:
            raise UnavailableError("the topics could not be read to their ends") from None
    return await asyncio.to_thread(_History(settings, records, over_ms).build)


async def read_once_told(
    settled: Callable[[], Awaitable[str | None]], read: Callable[[], Awaitable[History]]
) -> tuple[History, str | None]:
    """What is on the topics once everything is told, and what never was.

    A busy broker may have stamped a record and show it to nobody yet: who asks whether all is settled does not know of
    it then, who reads the topics a moment later does. So what seems untold is waited for, once.
    """
    unsettled = await settled()
    history = await read()
    if not history.is_told:
        unsettled = unsettled or await settled()
        history = await read()
    return history, unsettled


class _History:
    """Puts a history together from raw records."""

    def __init__(self, settings: ClientSettings, records: Sequence[Received], over_ms: int) -> None:
        self._over_ms = over_ms
        self._domain = settings.trust_domain
        self._records = records
        self._trust = TrustStore(settings.trust_domain, settings.trust_root)
        self._directory = Directory(self._trust, SystemClock(), grace_ms=None)
        self._epochs = Epochs(self._trust)
        self._states: dict[str, list[State]] = defaultdict(list)

    def build(self) -> History:
        for record in self._of(TRUST):
            self._trust.load(record.value, record.appended_at_ms / 1000)
        for table in TABLES:
            self._directory.on_records(self._of(table))
        history = History()
        for record in self._of(LEASE):
            self._lease(record, history)
        for table in TABLES:
            for record in self._of(table):
                self._state(record, history)
        for state in sorted(history.states, key=lambda one: one.at_ms):
            self._states[state.subject].append(state)
        for record in self._of(REVOCATION_REQUEST):
            with contextlib.suppress(InvalidMessageError):  # nobody's word: it may not cause anything either
                order = verify(
                    parse(record.value), RevocationRequest, self._signer(record), audience=self._domain
                )
                history.orders.append(Order(order.claims, record.coordinates))
        for record in self._of(SERVICE_EVENT):
            self._event(record, history)
        for record in self._of(REVOCATION_ACK):
            self._ack(record, history)
        for record in self._of(CREDENTIAL_REQUEST):
            with contextlib.suppress(InvalidMessageError):
                request = verify(
                    parse(record.value), CredentialRequest, self._signer(record), audience=self._domain
                ).claims
                history.requests.setdefault(message_id(request.iss, request.jti), record.appended_at_ms)
        # Sealed: only its agent can tell what a reply says, but whom it is for stands outside.
        for record in self._of(CREDENTIAL_REPLY):
            history.answered.setdefault(unverified_kid(record.value) or "", record.appended_at_ms)
        told = (record for record in self._records if record.topic in TOLD)
        history.steps = [one.coordinates for one in told if one.appended_at_ms <= self._over_ms]
        for record in self._of(AUDIT):
            source = orjson.loads(record.value)["unmapped"]["source"]
            history.audited.add((source["topic"], source["partition"], source["offset"]))
        return history

    def _of(self, topic: Any) -> list[Received]:
        return [record for record in self._records if record.topic is topic]

    def _lease(self, record: Received, history: History) -> None:
        if self._epochs.took(record):
            return
        find = self._trust.finder("issuer", "revoker", at_s=record.appended_at_ms / 1000)
        try:
            claims = verify(parse(record.value), Lease, find, audience=self._domain).claims
        except InvalidMessageError as error:
            history.forged.append(f"lease/{record.partition}@{record.offset}: {error}")
            return
        void = self._epochs.is_void(record, claims.epoch)
        history.leases.append(LeaseRecord(claims, digest(statement(claims)), record.coordinates, void))

    def _state(self, record: Received, history: History) -> None:
        if not record.value:
            return
        find = self._trust.finder("registry", at_s=record.appended_at_ms / 1000)
        with contextlib.suppress(InvalidMessageError, ChainError):  # nobody holds an office by such a record
            said = verify(parse(record.value), _RECORDS[record.topic], find, audience=self._domain).claims
            self._directory.chains.verify(said)
            history.states.append(State(said.sub, said.revision, record.appended_at_ms, said.state))

    def _ack(self, record: Received, history: History) -> None:
        find = self._trust.finder("gateway", at_s=record.appended_at_ms / 1000)
        with contextlib.suppress(InvalidMessageError):
            ack = verify(parse(record.value), RevocationAck, find, audience=self._domain).claims
            history.acks.append(Ack(ack.iss, ack.revocation_id, record.appended_at_ms))

    def _event(self, record: Received, history: History) -> None:
        find = self._trust.finder("revoker", at_s=record.appended_at_ms / 1000)
        try:
            event = verify(parse(record.value), ServiceEvent, find, audience=self._domain).claims
        except InvalidMessageError:
            return  # another service's
        if event.kind == "accepted" and event.subject == RevocationRequest.typ and event.actor and event.ref:
            history.followed.append(Followed(event.actor, event.ref, record.appended_at_ms))

    def _signer(self, record: Received) -> Any:
        """As the revoker has it: agents, users, and the services that order."""
        at_s = record.appended_at_ms / 1000

        def find(iss: str, kid: str) -> VerificationKey | None:
            try:
                return (
                    self._directory.agent_key(iss, kid, at_s)
                    or self._directory.user_key(iss, kid, at_s)
                    or self._trust.service_key(iss, kid, ("revoker", "registry"), at_s)
                    or self._former_key(iss, kid, record.appended_at_ms)
                )
            except ChainError:
                return None

        return find

    def _former_key(self, iss: str, kid: str, at_ms: int) -> VerificationKey | None:
        """The key of an agent or user that is held by now, if its record at that time did not hold it."""
        former = [one.state for one in self._states[iss] if one.at_ms <= at_ms]
        if not former or hold_of(former[-1]) is not None or kid in held_keys(former[-1]):
            return None
        state = former[-1]
        return valid_key(state.keys, kid, at_ms / 1000) if isinstance(state, AgentState | UserState) else None
