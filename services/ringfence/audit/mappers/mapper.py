"""The base of all mappers: a mapper verifies a record and maps it to one OCSF event.

One class for each subject, one method for each topic. `by_topic` of a class says which method maps which topic.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, NamedTuple

from ringfence.audit.events import registry, services, subjects
from ringfence.audit.events.ocsf import OcsfEvent
from ringfence.audit.memory import RequestFacts
from ringfence.audit.verification import OutdatedError, RecordVerifier, VerifiedMessage
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import ActionApproval, ActionRequest, Approval, Grant
from ringfence.messages.base import ExpiringClaims
from ringfence.messages.credential import CredentialRequest, RequestWithdraw
from ringfence.messages.run import RunOrder, RunStop
from ringfence.model.identity.spiffe_ids import subject_of

PENDING_CODES: Final = frozenset({"key_unknown", "chain_broken", "not_reviewer", "break_glass_unknown"})
"""Errors that may only mean that the local tables, or the index, are behind."""


class MappedEvent(NamedTuple):
    """The event of a record. `pending`: the local tables may have more of its fields later."""

    event: OcsfEvent
    pending: bool = False


Mapper = Callable[[Received], MappedEvent]
"""Maps a record to its event. Raises InvalidMessageError or ChainError if verification fails."""


class RecordMapper:
    """The base class of mappers: events of replays and of outdated messages, and the fields of subjects."""

    def __init__(self, verifier: RecordVerifier, trust_domain: str) -> None:
        self._verifier = verifier
        self._trust_domain = trust_domain

    def outdated(self, record: Received, error: OutdatedError) -> OcsfEvent:
        """The event of a message that reached the broker outside its validity."""
        signed = error.signed
        fields = self._subject_fields(record, signed)
        if "agent" in fields and "sponsor" not in fields:
            fields["sponsor"] = self._verifier.sponsor_of(fields["agent"])
        return services.expired(record, signed.claims.iss, error.code, fields, signed.verified())

    def _replay(
        self, record: Received, signed: VerifiedMessage[Any], fields_of: Callable[[], dict[str, Any]]
    ) -> OcsfEvent | None:
        """The event of a replay, or None at the first sighting. `fields_of` gives the fields of its subject."""
        first = self._verifier.first_sighting(record, signed)
        if first is None:
            return None
        sighting, same = first
        fields = fields_of()
        if fields.get("agent") and "sponsor" not in fields:
            fields = {**fields, "sponsor": self._verifier.sponsor_of(fields["agent"])}
        return services.replayed(
            record, signed.claims.iss, sighting, same=same, fields=fields, verified=signed.verified()
        )

    def _lease_fields(
        self, lease_id: str | None, agent: str | None = None, task: str | None = None
    ) -> dict[str, Any]:
        """Fields of a lease that audit has seen. Without one, or if it is another agent's: those of agent and task."""
        lease = self._verifier.lease(lease_id) if lease_id is not None else None
        if lease is not None and agent in (None, lease.agent):
            return subjects.credential_fields(lease, self._verifier.facts(lease.request_id))
        return self._agent_fields(agent, task)

    def _agent_fields(self, agent: str | None, task: str | None = None) -> dict[str, Any]:
        """Fields of an agent and its task, by the registry's records. A task of another agent is left out."""
        fields: dict[str, Any] = {"agent": agent} if agent is not None else {}
        if task is not None:
            of_task = self._task_fields(task)
            fields |= of_task if agent in (None, of_task.get("agent")) else {}
        if "agent" in fields:
            fields["sponsor"] = self._verifier.sponsor_of(fields["agent"])
        return fields

    def _run_fields(self, run_id: str) -> dict[str, Any]:
        """Fields of a run's agent and task. Empty if no runner has reported the run."""
        run = self._verifier.run_of(run_id)
        return self._agent_fields(run.agent_id, run.task_id) if run is not None else {}

    def _task_fields(self, task: str) -> dict[str, Any]:
        state = self._verifier.task_of(task)
        return subjects.task_fields(state) if state is not None else {}

    def _incomplete(self, facts: RequestFacts) -> bool:
        """Return whether the local tables may have more fields later. A task never changes its agent."""
        return facts.sponsor is None or (
            facts.on_behalf_of is None and self._verifier.task_of(facts.task) is None
        )

    def _subject_fields(self, record: Received, signed: VerifiedMessage[Any]) -> dict[str, Any]:
        """Fields of the subject of an expired or replayed message whose signature holds."""
        claims = signed.claims
        match claims:
            case CredentialRequest():
                agent = subject_of(self._trust_domain, claims.iss, "agent")
                fields = {**self._agent_fields(agent, claims.task_id), "task": claims.task_id}
                return fields | {
                    "request": message_id(claims.iss, claims.jti),
                    "request_digest": digest(signed.compact),
                    "target": claims.scope[0].target,
                }
            case RequestWithdraw():
                return self._withdrawal_fields(claims)
            case Approval():
                at_ms = record.appended_at_ms
                facts = self._verifier.embedded_request(claims.request, claims.request_id, at_ms)
                return subjects.credential_fields(None, facts) or {"request": claims.request_id}
            case Grant() | ActionApproval() | ActionRequest() | RunOrder():
                return self._agent_fields(claims.agent_id, getattr(claims, "task_id", None))
            case RunStop():
                return self._run_fields(claims.run_id)
            case ExpiringClaims() if claims.typ in registry.command_typs():
                return registry.subject_of_command(claims)[2]
            case _:
                agent = subject_of(self._trust_domain, claims.iss, "agent")
                return self._agent_fields(agent)

    def _withdrawal_fields(self, claims: RequestWithdraw) -> dict[str, Any]:
        """Fields of the request that an agent withdraws; those of the agent alone if it is not its own, or unknown."""
        agent, facts = (
            subject_of(self._trust_domain, claims.iss, "agent"),
            self._verifier.facts(claims.request_id),
        )
        if facts is not None and facts.agent == agent:
            return subjects.credential_fields(None, facts)
        return {**self._agent_fields(agent), "request": claims.request_id}


def lacks_names(event: OcsfEvent) -> bool:
    """Whether an event lacks the sponsor of its agent or the user of its task, which a table may name later."""
    fields = event.body["unmapped"]
    return ("agent" in fields and "sponsor" not in fields) or (
        "task" in fields and "on_behalf_of" not in fields
    )
