"""Stops of runs, which users order. Every runner reads all of them, because a run ends where it was started."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.kafka.record import Received
from ringfence.messages.base import typ_header
from ringfence.messages.run import RunStop
from ringfence.model.records.directory import Directory
from ringfence.model.requests.run_orders import stop_problem, verified_stop

log = logging.getLogger(__name__)

KEPT_MS: Final = 7 * 24 * 3600 * 1000
"""Stops are read from so far back: as long as orders are on Kafka."""
_MAX_RUNS: Final = 100_000
_MAX_STOPS_OF_A_RUN: Final = 16
_MAX_AWAITING_KEY: Final = 1000


class StopTable:
    """The stops that users signed, by run. Whether one counts is decided when its run is known."""

    def __init__(self, directory: Directory) -> None:
        self._directory = directory
        self._stops: BoundedDict[str, list[RunStop]] = BoundedDict(_MAX_RUNS)
        self._awaiting_key: deque[Received] = deque(maxlen=_MAX_AWAITING_KEY)
        """Stops by keys that no user has yet: the user's record may come later."""
        self._listeners: list[Callable[[str], None]] = []

    def on_stop(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the id of each run that a user's stop names."""
        self._listeners.append(listener)

    def on_records(self, records: Sequence[Received]) -> None:
        """Process records of the topic `run.order`. Ignores everything but stops."""
        for record in records:
            self._take(record)

    def retry(self) -> None:
        """Verify again the stops whose signer was unknown."""
        waiting, self._awaiting_key = self._awaiting_key, deque(maxlen=_MAX_AWAITING_KEY)
        for record in waiting:
            self._take(record)

    def reason(self, run_id: str, *, agent_id: str, task_id: str, ordered_by: str | None) -> str | None:
        """The reason why a run must end, from the first stop by a user who may stop it; None without one."""
        self.retry()
        for stop in self._stops.get(run_id, ()):
            problem = stop_problem(
                stop, self._directory, agent_id=agent_id, task_id=task_id, ordered_by=ordered_by
            )
            if problem is None:
                return f"stopped by {stop.iss.rpartition('/')[2]}: {stop.reason}"
            log.warning(
                "run %s goes on: %s", run_id, problem.message, extra=rate_limited("stop", problem.code)
            )
        return None

    def _take(self, record: Received) -> None:
        try:
            if parse(record.value).header.typ != typ_header(RunStop):
                return
            stop = verified_stop(record.value, self._directory, record.appended_at_ms).claims
            if record.key != stop.run_id:
                raise InvalidMessageError("the Kafka key of a stop is the run's id", code="key_unexpected")
        except InvalidMessageError as error:
            if error.code == "key_unknown":
                self._awaiting_key.append(record)
            log.warning(
                "not a stop: %s/%d@%d: %s",
                record.topic_name,
                record.partition,
                record.offset,
                error.code,
                extra=rate_limited(record.topic_name, error.code),
            )
            return
        known = self._stops.setdefault(stop.run_id, [])
        if len(known) < _MAX_STOPS_OF_A_RUN:
            known.append(stop)
        for listener in self._listeners:
            listener(stop.run_id)
