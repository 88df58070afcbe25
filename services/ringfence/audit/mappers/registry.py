"""Maps trust bundles, registry commands and the records of the registry."""

from __future__ import annotations

from typing import Any

from ringfence.audit.events import registry, trust
from ringfence.audit.events.trust import BundleHistory
from ringfence.audit.mappers.mapper import MappedEvent, Mapper, RecordMapper, lacks_names
from ringfence.audit.verification import RecordVerifier
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import ExpiringClaims, Topic
from ringfence.messages.codes import Code
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
from ringfence.messages.topics import AGENT, REGISTRY_COMMAND, TARGET, TASK, TRUST, USER


class RegistryMapper(RecordMapper):
    """Maps `trust`, `registry.command` and the compacted topics of the registry."""

    def __init__(self, verifier: RecordVerifier, trust_domain: str, bundles: BundleHistory) -> None:
        """`bundles`: the trust bundles read so far."""
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
