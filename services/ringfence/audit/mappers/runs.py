"""Maps `run.order` and `run`: orders of runs, and the reports of runners."""

from __future__ import annotations

from typing import Any

from ringfence.audit.events import runs
from ringfence.audit.mappers.mapper import MappedEvent, Mapper, RecordMapper, lacks_names
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import Topic, typ_header
from ringfence.messages.run import Run, RunOrder, RunStop
from ringfence.messages.topics import RUN, RUN_ORDER


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
        event = runs.ordered(signed, fields)
        return MappedEvent(event, lacks_names(event))

    def _stop(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_user(record, RunStop)
        claims = signed.claims
        fields = self._run_fields(claims.run_id)
        self._first(signed, lambda: fields)
        # Of an order that waits, no runner has said anything yet.
        return MappedEvent(runs.stop_ordered(signed, fields), not fields)

    def _run(self, record: Received) -> MappedEvent:
        signed = self._verifier.by_service(record, Run, *Run.signed_by)
        claims = signed.claims
        fields = self._agent_fields(claims.agent_id, claims.task_id)
        self._first(signed, lambda: fields)
        counts = self._verifier.run_counted(record, claims)
        event = runs.told(signed, fields, counts=counts is not False)
        return MappedEvent(event, counts is None or lacks_names(event))
