"""Maps the events of services, the actions of agents that gateways report, and dead letters.

Maps `run.order` and `run`: orders of runs, and the reports of runners.

Maps trust bundles, registry commands and the records of the registry.
"""

from __future__ import annotations

from typing import Any

from ringfence.audit.events import actions, registry, services, trust
from ringfence.audit.events.ocsf import credential_fields
from ringfence.audit.events.trust import BundleHistory
from ringfence.audit.mappers.mapper import MappedEvent, Mapper, RecordMapper, lacks_names
from ringfence.audit.verification import RecordVerifier
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import ExpiringClaims, Topic, typ_header
from ringfence.messages.codes import Code
from ringfence.messages.operations import ActionAnswered, ActionDecided, DeadLetter, RelayEnded, ServiceEvent
from ringfence.messages.registry import (
    AgentRecord,
    AgentTransfer,
    AgentTransferConsent,
    AnyRecord,
    TargetRecord,
    TaskAssign,
    TaskRecord,
    UserRecord,
)
from ringfence.messages.run import Run, RunOrder, RunStop
from ringfence.messages.topics import (
    ACTION,
    AGENT,
    DEAD_LETTER,
    REGISTRY_COMMAND,
    RUN,
    RUN_ORDER,
    SERVICE_EVENT,
    TARGET,
    TASK,
    TRUST,
    USER,
)
from ringfence.model.identity.spiffe_ids import subject_of

_ANSWERS = frozenset({"accepted", "refused", *registry.PROPOSALS, "widened"})
"""What a registry says of a command."""


class RegistryMapper(RecordMapper):
    """Maps `trust`, `registry.command` and the compacted topics of the registry."""

    def __init__(self, verifier: RecordVerifier, trust_domain: str, bundles: BundleHistory) -> None:
        super().__init__(verifier, trust_domain)
        self._bundles = bundles

    def by_topic(self) -> dict[Topic[Any], Mapper]:
        return {
            TRUST: self._trust,
            REGISTRY_COMMAND: self._command,
            USER: self._record_of(UserRecord),
            AGENT: self._record_of(AgentRecord),
            TARGET: self._record_of(TargetRecord),
            TASK: self._record_of(TaskRecord),
        }

    def _trust(self, record: Received) -> MappedEvent:
        return MappedEvent(trust.bundle_event(record, self._bundles.record_of(record)))

    def _command(self, record: Received) -> MappedEvent:
        signed, consent_by = self._verifier.command(record)
        kind, _, fields = registry.subject_of_command(signed.claims)
        self._first(signed, lambda: fields)
        task = self._verifier.task_of(fields["task"]) if kind == "task" else None
        agent = fields.get("agent") or (task.agent_id if task is not None else None)
        event = registry.commanded(
            signed._replace(embedded=(_consent_typ(signed.claims),)) if consent_by else signed,
            sponsor=self._verifier.sponsor_of(agent) if agent else None,
            consent_by=consent_by,
            task=task,
            parent=self._verifier.task_of(fields["parent"]) if "parent" in fields else None,
        )
        return MappedEvent(event, lacks_names(event))

    def _record_of(self, model: type[AnyRecord]) -> Mapper:
        def map_record(record: Received) -> MappedEvent:
            if not record.value:
                raise InvalidMessageError("a record is never deleted", code=Code.TOMBSTONE)
            signed, last = self._verifier.record(record, model)
            claims = signed.claims
            agent = getattr(claims.state, "agent_id", None)
            whole = signed._replace(embedded=(last.typ,))
            newer = self._verifier.newer_revision(signed)
            if newer is not None:
                return MappedEvent(registry.revision_fell(whole, newer))
            self._first(signed, lambda: {"agent": agent} if agent else {})
            sponsor = self._verifier.sponsor_of(agent) if agent else None
            act = getattr(claims.state, "act", None) or ()
            event = registry.recorded(whole, last, sponsor=sponsor, sponsors=self._verifier.sponsors_of(act))
            return MappedEvent(event, lacks_names(event))

        return map_record


def _consent_typ(claims: ExpiringClaims) -> str:
    """The typ of the consent that a command embeds: by the task's user, or by the new sponsor of an agent."""
    if isinstance(claims, AgentTransfer):
        return AgentTransferConsent.typ
    return "id_token" if isinstance(claims, TaskAssign) and claims.id_token else "task.consent"


class RunMapper(RecordMapper):
    """Maps `run.order` and `run`."""

    def by_topic(self) -> dict[Topic[Any], Mapper]:
        return {RUN_ORDER: self._order, RUN: self._run}

    def _order(self, record: Received) -> MappedEvent:
        if parse(record.value).header.typ == typ_header(RunStop):
            return self._stop(record)
        signed = self._verifier.by_user(record, RunOrder)
        claims = signed.claims
        fields = self._agent_fields(claims.agent_id, claims.task_id)
        self._first(signed, lambda: fields)
        event = services.ordered(signed, fields)
        return MappedEvent(event, lacks_names(event))

    def _stop(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_user(record, RunStop)
        claims = signed.claims
        fields = self._run_fields(claims.run_id)
        self._first(signed, lambda: fields)
        # Of an order that waits, no runner has said anything yet.
        return MappedEvent(services.stop_ordered(signed, fields), not fields)

    def _run(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_service(record, Run, *Run.signed_by)
        claims = signed.claims
        fields = self._agent_fields(claims.agent_id, claims.task_id)
        self._first(signed, lambda: fields)
        counts = self._verifier.run_counted(record, claims)
        event = services.told(signed, fields, counts=counts is not False)
        return MappedEvent(event, counts is None or lacks_names(event))


class ServiceMapper(RecordMapper):
    """Maps `service.event`, `action` and `dead.letter`."""

    def by_topic(self) -> dict[Topic[Any], Mapper]:
        return {
            SERVICE_EVENT: self._service_event,
            ACTION: self._action,
            DEAD_LETTER: self._dead_letter,
        }

    def _service_event(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_service(record, ServiceEvent)
        claims = signed.claims
        lease = self._verifier.lease(claims.lease_id) if claims.lease_id is not None else None
        request_id = claims.request_id or (lease.request_id if lease is not None else None)
        facts = self._verifier.facts(request_id) if request_id is not None else None
        fields = credential_fields(lease, facts) or self._agent_fields(self._agent_in(claims), claims.task_id)
        self._first(signed, lambda: fields)
        if claims.kind in _ANSWERS and claims.subject in registry.command_typs():
            event = registry.answered(signed, fields)
        elif services.is_sign_in(claims):
            event = services.session_begun(signed)
        elif services.is_detection(claims):
            event = services.detected(signed, fields)
        else:
            origin = lease or facts
            trace = origin.traceparent if origin is not None else None
            event = services.reported(signed, fields, trace)
        return MappedEvent(event, lacks_names(event))

    def _agent_in(self, claims: ServiceEvent) -> str | None:
        """The agent of a service event: as named, or the subject of the record that the service found invalid."""
        if claims.agent_id is not None or claims.result is None:
            return claims.agent_id
        return subject_of(self._trust_domain, claims.result, "agent")

    def _action(self, record: Received) -> MappedEvent:
        claims = self._action_of(record)
        lease = self._verifier.lease(claims.lease_id) if claims.lease_id is not None else None
        fields = self._lease_fields(claims.lease_id, claims.agent_id, claims.task_id)
        if isinstance(claims, ActionDecided):
            event = actions.acted(record, claims, lease, fields, self._trust_domain)
        elif isinstance(claims, RelayEnded):
            event = actions.relay_ended(record, claims, lease, fields, self._trust_domain)
        else:
            event = actions.answered(record, claims, lease, fields, self._trust_domain)
        return MappedEvent(event, lacks_names(event))

    def _action_of(self, record: Received) -> ActionDecided | ActionAnswered | RelayEnded:
        """The message in a record. Raises InvalidMessageError with what is wrong with it as an `ActionDecided`."""
        wrong: InvalidMessageError | None = None
        models: tuple[type[ActionDecided | ActionAnswered | RelayEnded], ...] = (
            ActionDecided,
            ActionAnswered,
            RelayEnded,
        )
        for model in models:
            try:
                return self._verifier.parse_unsigned(record, model)
            except InvalidMessageError as error:
                wrong = wrong or error
        assert wrong is not None
        raise wrong from None

    def _dead_letter(self, record: Received) -> MappedEvent:
        return MappedEvent(services.dead_lettered(record, self._verifier.parse_unsigned(record, DeadLetter)))
