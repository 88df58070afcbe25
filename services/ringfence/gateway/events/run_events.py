"""Tells whether Kafka has all events of a run that has ended."""

from __future__ import annotations

from ringfence.gateway.events.recorder import Recorder
from ringfence.gateway.events.refusal_counts import RefusalCounts
from ringfence.gateway.events.spool import SpoolMark


class RunEvents:
    """The events of runs, on their way through the counts of refusals and the spool to Kafka."""

    def __init__(self, recorder: Recorder, refusal_counts: RefusalCounts) -> None:
        self._recorder = recorder
        self._refusal_counts = refusal_counts

    def end_mark(self, run_id: str) -> SpoolMark | None:
        """Record the refusals of a run that were only counted so far. Returns the place after all of its events.

        None while the spool has no room for them: call it again later.
        """
        return self._recorder.end_mark() if self._refusal_counts.flush(run_id) else None

    def is_published(self, mark: SpoolMark) -> bool:
        """Return whether Kafka has all events before this place."""
        return self._recorder.is_published(mark)
