"""Maps the events of services, the actions of agents that gateways report, and dead letters."""

from __future__ import annotations

from typing import Any

from ringfence.audit.events import actions, registry, services
from ringfence.audit.events.ocsf import credential_fields
from ringfence.audit.mappers.mapper import MappedEvent, Mapper, RecordMapper, lacks_names
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Topic
from ringfence.messages.operations import ActionAnswered, ActionDecided, DeadLetter, RelayEnded, ServiceEvent
from ringfence.messages.topics import ACTION, DEAD_LETTER, SERVICE_EVENT
from ringfence.model.identity.spiffe_ids import subject_of

_ANSWERS = frozenset({"accepted", "refused", *registry.PROPOSALS, "widened"})
"""What a registry says of a command."""


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
        elif services.is_shared_identity(claims):
            event = services.shared_identity(signed, fields)
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
