"""Maps leases, revocations, and the acknowledgements of revocations by gateways."""

from __future__ import annotations

from typing import Any

from ringfence.audit.events import credentials, services
from ringfence.audit.events.ocsf import credential_fields
from ringfence.audit.mappers.mapper import MappedEvent, Mapper, RecordMapper, lacks_names
from ringfence.audit.verification import RecordVerifier
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import UUID, Topic
from ringfence.messages.lease import Lease, LeaseEpoch, RevocationAck, RevocationRequest
from ringfence.messages.topics import LEASE, REVOCATION_ACK, REVOCATION_REQUEST
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.leases.epochs import Epochs


class LeaseMapper(RecordMapper):
    """Maps `lease`, `revocation.request` and `revocation.ack`."""

    def __init__(self, verifier: RecordVerifier, trust_domain: str, epochs: Epochs) -> None:
        """`epochs`: the epochs of the revokers, as read so far."""
        super().__init__(verifier, trust_domain)
        self._epochs = epochs

    def by_topic(self) -> dict[Topic[Any], Mapper]:
        return {
            LEASE: self._lease,
            REVOCATION_REQUEST: self._revocation,
            REVOCATION_ACK: self._ack,
        }

    def _lease(self, record: Received) -> MappedEvent:
        if not record.value:
            lease_id = record.key if record.key and UUID.fullmatch(record.key) else "unknown"
            return MappedEvent(credentials.lease_forgotten(record, lease_id, self._lease_fields(lease_id)))
        if self._epochs.took(record):
            marker = self._verifier.by_service(record, LeaseEpoch, "revoker")
            return MappedEvent(services.epoch_began(marker))
        signed = self._verifier.by_service(record, Lease, "issuer", "revoker")
        claims = signed.claims
        if self._epochs.is_void(record, claims.epoch):
            void = self._verifier.remember_lease(claims)
            fields = credential_fields(void, self._verifier.facts(claims.request_id))
            return MappedEvent(credentials.lease_void(signed, void, fields))
        if claims.epoch is not None:
            # The marker of the epoch may be older than the first offset of this reader.
            self._epochs.begin(record, claims.epoch)
        lease = self._verifier.remember_lease(claims)
        facts = self._verifier.facts(claims.request_id)
        self._first(signed, lambda: {**credential_fields(lease, facts), "lease": claims.lease_id})
        return MappedEvent(credentials.leased(signed, lease, facts))

    def _revocation(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_anyone(record, RevocationRequest)
        claims = signed.claims
        agent = subject_of(self._trust_domain, claims.iss, "agent")
        lease = self._verifier.lease(claims.lease_id) if claims.lease_id is not None else None
        fields: dict[str, Any] = {"agent": agent} if agent else {}
        if claims.selector is not None and claims.selector.agent_id is not None:
            fields["agent"] = claims.selector.agent_id
        if claims.selector is not None and claims.selector.task_id is not None:
            fields |= self._task_fields(claims.selector.task_id)
        fields |= self._lease_fields(claims.lease_id)
        if "agent" in fields and "sponsor" not in fields:
            fields["sponsor"] = self._verifier.sponsor_of(fields["agent"])
        self._first(signed, lambda: fields)
        event = credentials.revocation_requested(signed, lease, fields)
        self._verifier.remember_revocation(claims, event.body["unmapped"])
        return MappedEvent(event, lacks_names(event))

    def _ack(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_service(record, RevocationAck, "gateway")
        revocation = self._verifier.revocation(signed.claims.revocation_id)
        self._first(signed, lambda: revocation)
        return MappedEvent(credentials.cut_confirmed(signed, revocation))
