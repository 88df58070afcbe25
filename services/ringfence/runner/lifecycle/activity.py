"""What a run was given, and what was denied: followed on Kafka from the run's start, for its report."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from ringfence.client.connection import Connection
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.kafka.record import Received
from ringfence.messages.credential import CredentialDecision, CredentialRequest, DecidedTerms
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.operations import ActionDecided, RelayEnded
from ringfence.messages.topics import ACTION, CREDENTIAL_DECISION, LEASE

_MAX_LEASES = 10_000
_MAX_DENIALS = 1000
_MAX_RELAYS = 1000


@dataclass(slots=True, eq=False)
class RunActivity:
    """The leases, denials, blocked actions and relays of one run, as far as this runner may read the topics."""

    connection: Connection
    run_id: str
    agent_id: str
    _key_thumbprint: str = field(default="", init=False)
    _leases: BoundedDict[str, Lease] = field(default_factory=lambda: BoundedDict(_MAX_LEASES), init=False)
    _denials: BoundedDict[str, dict[str, Any]] = field(
        default_factory=lambda: BoundedDict(_MAX_DENIALS), init=False
    )
    _relays: BoundedDict[str, dict[str, Any]] = field(
        default_factory=lambda: BoundedDict(_MAX_RELAYS), init=False
    )
    _changed: asyncio.Event = field(default_factory=asyncio.Event, init=False)
    problem: str | None = field(default=None, init=False)
    """Why the report does not know; None if it does."""

    async def follow(self) -> None:
        """Start to read. A topic that cannot be read is said in `problem`: the run goes on without."""
        try:
            await self.connection.follow(
                [LEASE, CREDENTIAL_DECISION, ACTION], self._on_records, since_ms=None
            )
        except UnavailableError as error:
            self.problem = str(error)

    def started(self, key_thumbprint: str) -> None:
        """The run's key is known from now on: its requests are told by it."""
        self._key_thumbprint = key_thumbprint

    async def leases_ended(self, within_s: float) -> tuple[str, ...]:
        """Wait until every lease of the run has ended. Returns the ids of those that have not."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                while self._live():
                    self._changed.clear()
                    await self._changed.wait()
        return self._live()

    async def lease_over(self, target_id: str) -> str:
        """Wait until a lease of the run at this target ends, unless the run itself gives it back. Returns its id."""
        while True:
            for lease in self._leases.values():
                is_over = lease.target_id == target_id and lease.status not in ("minting", "active")
                if is_over and (lease.cause is None or lease.cause.kind != "release"):
                    return lease.lease_id
            self._changed.clear()
            await self._changed.wait()

    def allowed(self) -> list[dict[str, Any]]:
        """The leases, oldest first, as JSON values."""
        return [
            {
                "lease_id": lease.lease_id,
                "target_id": lease.target_id,
                "scope": [permission.model_dump(mode="json") for permission in lease.scope],
                "delivery": lease.delivery,
                "status": lease.status,
                "ended_by": lease.cause.kind if lease.cause is not None else None,
            }
            for lease in sorted(self._leases.values(), key=lambda lease: lease.requested_at_ms)
        ]

    def denied(self) -> list[dict[str, Any]]:
        """The denied requests and blocked actions, oldest first, as JSON values."""
        return sorted(self._denials.values(), key=lambda one: int(one["at_ms"]))

    def relays(self) -> list[dict[str, Any]]:
        """The byte relays that have ended, oldest first, as JSON values."""
        return list(self._relays.values())

    def _live(self) -> tuple[str, ...]:
        return tuple(lease.lease_id for lease in self._leases.values() if lease.status not in TERMINAL)

    def _on_records(self, records: Sequence[Received]) -> None:
        for record in records:
            if not record.value:
                continue
            try:
                if record.topic is LEASE:
                    self._on_lease(record)
                elif record.topic is ACTION:
                    self._on_action(record)
                else:
                    self._on_decision(record)
            except (InvalidMessageError, ValidationError, ValueError):
                continue  # nobody's word, or of another message of the topic

    def _on_lease(self, record: Received) -> None:
        find = self.connection.trust.finder(*Lease.signed_by, at_s=record.appended_at_ms / 1000)
        lease = verify(
            parse(record.value), Lease, find, audience=self.connection.settings.trust_domain
        ).claims
        run = lease.instance.run if lease.instance is not None else None
        if run is None or run.run_id != self.run_id:
            return
        known = self._leases.get(lease.lease_id)
        if known is None or lease.seq > known.seq:
            self._leases[lease.lease_id] = lease
            self._changed.set()

    def _on_decision(self, record: Received) -> None:
        domain = self.connection.settings.trust_domain
        find = self.connection.trust.finder(*CredentialDecision.signed_by, at_s=record.appended_at_ms / 1000)
        decision = verify(parse(record.value), DecidedTerms, find, audience=domain).claims
        request = parse(decision.request)
        if decision.outcome != "denied" or request.header.kid != self._key_thumbprint:
            return
        asked = request.unverified_claims(CredentialRequest)
        self._denials[decision.request_id] = {
            "at_ms": record.appended_at_ms,
            "what": "credential",
            "scope": [permission.model_dump(mode="json") for permission in asked.scope],
            "reasons": [reason.model_dump(mode="json") for reason in decision.reasons],
        }

    def _on_action(self, record: Received) -> None:
        # Most events are of other runs: their JSON is not read.
        if self.run_id.encode() not in record.value:
            return
        document = json.loads(record.value)
        if "allowed" not in document:
            self._on_relay(document)
            return
        action = ActionDecided.model_validate(document)
        if action.allowed or (action.run_id, action.agent_id) != (self.run_id, self.agent_id):
            return
        told = action.model_dump(
            mode="json",
            include={"target_id", "verb", "resource", "method", "destination", "reasons", "count"},
            exclude_none=True,
        )
        self._denials[action.action_id] = {"at_ms": action.at_ms, "what": "action", **told}

    def _on_relay(self, document: dict[str, Any]) -> None:
        """An answer at an endpoint of MCP is no relay: it fails to validate, and is passed over."""
        relay = RelayEnded.model_validate(document)
        if (relay.run_id, relay.agent_id) == (self.run_id, self.agent_id):
            self._relays[relay.action_id] = relay.model_dump(
                mode="json",
                include={"target_id", "destination", "sent_bytes", "received_bytes", "duration_ms", "reason"},
                exclude_none=True,
            )
