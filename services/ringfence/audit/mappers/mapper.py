"""The base of all mappers: a mapper verifies a record and maps it to one OCSF event.

One class for each subject, one method for each topic. `by_topic` of a class says which method maps which topic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, NamedTuple

from ringfence.audit.events import registry, services
from ringfence.audit.events.ocsf import OcsfEvent, VerifiedMessage, credential_fields, task_fields
from ringfence.audit.memory import RequestFacts
from ringfence.audit.verification import OutdatedError, RecordVerifier
from ringfence.kernel.base.ids import digest, message_id
from ringfence.kernel.kafka.record import Received
from ringfence.messages.approval import ActionApproval, ActionRequest, Approval, Grant
from ringfence.messages.base import ExpiringClaims
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialRequest, RequestWithdraw
from ringfence.messages.run import RunOrder, RunStop
from ringfence.model.identity.spiffe_ids import subject_of

PENDING_CODES: Final = frozenset(
    {Code.KEY_UNKNOWN, Code.CHAIN_BROKEN, Code.NOT_REVIEWER, Code.BREAK_GLASS_UNKNOWN}
)
"""Errors that may only mean that the local tables, or the index, are behind."""


class MappedEvent(NamedTuple):
    """The event of a record. `pending`: the local tables may have more of its fields later."""

    event: OcsfEvent
    pending: bool = False


Mapper = Callable[[Received], MappedEvent]
"""Maps a record to its event. Raises ReplayError, or InvalidMessageError or ChainError if verification fails."""


class ReplayError(Exception):
    """A message was seen before, at other coordinates. `event` is the event of its record."""

    def __init__(self, event: OcsfEvent) -> None:
        super().__init__("replayed")
        self.event = event


class RecordMapper:
    """The base class of mappers: events of replays and of outdated messages, and the fields of subjects."""

    def __init__(self, verifier: RecordVerifier, trust_domain: str) -> None:
        self._verifier = verifier
        self._trust_domain = trust_domain

    def outdated(self, error: OutdatedError) -> OcsfEvent:
        """The event of a message that reached the broker outside its validity."""
        return services.expired(
            error.signed, error.code, self._with_sponsor(self._subject_fields(error.signed))
        )

    def _first(self, signed: VerifiedMessage[Any], fields_of: Callable[[], Mapping[str, Any]]) -> None:
        """Raise ReplayError unless this is the first sighting of a message. `fields_of`: the fields of its subject."""
        first = self._verifier.first_sighting(signed)
        if first is not None:
            sighting, same = first
            fields = self._with_sponsor(fields_of())
            raise ReplayError(services.replayed(signed, sighting, same=same, fields=fields))

    def _with_sponsor(self, fields: Mapping[str, Any]) -> Mapping[str, Any]:
        if fields.get("agent") and "sponsor" not in fields:
            return {**fields, "sponsor": self._verifier.sponsor_of(fields["agent"])}
        return fields

    def _lease_fields(
        self, lease_id: str | None, agent: str | None = None, task: str | None = None
    ) -> dict[str, Any]:
        """Fields of a lease that audit has seen. Without one, or if it is another agent's: those of agent and task."""
        lease = self._verifier.lease(lease_id) if lease_id is not None else None
        if lease is not None and agent in (None, lease.agent):
            return credential_fields(lease, self._verifier.facts(lease.request_id))
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
        return task_fields(state) if state is not None else {}

    def _incomplete(self, facts: RequestFacts) -> bool:
        """Return whether the local tables may have more fields later. A task never changes its agent."""
        return facts.sponsor is None or (
            facts.on_behalf_of is None and self._verifier.task_of(facts.task) is None
        )

    def _subject_fields(self, signed: VerifiedMessage[Any]) -> dict[str, Any]:
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
                at_ms = signed.record.appended_at_ms
                facts = self._verifier.embedded_request(claims.request, claims.request_id, at_ms)
                return credential_fields(None, facts) or {"request": claims.request_id}
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
        agent = subject_of(self._trust_domain, claims.iss, "agent")
        facts = self._verifier.facts(claims.request_id)
        if facts is not None and facts.agent == agent:
            return credential_fields(None, facts)
        return {**self._agent_fields(agent), "request": claims.request_id}


def lacks_names(event: OcsfEvent) -> bool:
    """Whether an event lacks the sponsor of its agent or the user of its task, which a table may name later."""
    fields = event.body["unmapped"]
    return ("agent" in fields and "sponsor" not in fields) or (
        "task" in fields and "on_behalf_of" not in fields
    )
