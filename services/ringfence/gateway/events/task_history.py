"""The recent actions of each task, as input for the bundle, and a check that Kafka has all events of a run.

A task's history has counts by target and verb, and a sliding window of one minute.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from dataclasses import dataclass, field
from typing import Any, Final

from ringfence.gateway.events.recorder import Recorder, RefusalCounts
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
        return self._recorder.is_published(mark)


MAX_TASKS: Final = 10_000
"""The most tasks that are remembered. Those that were idle the longest are evicted (LRU)."""
_MINUTE_MS: Final = 60_000
_MAX_TARGETS: Final = 64
_BUCKET_MS: Final = 1000


@dataclass(slots=True)
class _Task:
    since_ms: int
    allowed: dict[str, Counter[str]] = field(default_factory=dict)
    denied: int = 0
    buckets: deque[tuple[int, int]] = field(default_factory=deque)
    """Pairs of second (ms) and count."""


class TaskHistory:
    """Counts of this replica since its start. A limit over several replicas has to be divided among them."""

    def __init__(self) -> None:
        self._tasks: OrderedDict[str, _Task] = OrderedDict()

    def add(
        self, task_id: str, target_id: str | None, verb: str | None, *, allowed: bool, now_ms: int
    ) -> None:
        task = self._tasks.get(task_id)
        if task is None:
            task = self._tasks[task_id] = _Task(now_ms)
            if len(self._tasks) > MAX_TASKS:
                self._tasks.popitem(last=False)
        self._tasks.move_to_end(task_id)
        if not allowed:
            task.denied += 1
        elif target_id is not None and verb is not None and _has_room(task, target_id):
            verbs = task.allowed.get(target_id)
            if verbs is None:
                verbs = task.allowed[target_id] = Counter()
            verbs[verb] += 1
        second = now_ms - now_ms % _BUCKET_MS
        if task.buckets and task.buckets[-1][0] == second:
            task.buckets[-1] = (second, task.buckets[-1][1] + 1)
        else:
            task.buckets.append((second, 1))
            _forget(task, now_ms)

    def of(self, task_id: str, now_ms: int) -> dict[str, Any]:
        """The input for the bundle: `{since_s, allowed: {target: {verb: count}}, denied, last_minute}`."""
        task = self._tasks.get(task_id)
        if task is None:
            return {"since_s": now_ms // 1000, "allowed": {}, "denied": 0, "last_minute": 0}
        _forget(task, now_ms)
        return {
            "since_s": task.since_ms // 1000,
            "allowed": {target: dict(verbs) for target, verbs in task.allowed.items()},
            "denied": task.denied,
            "last_minute": sum(count for _, count in task.buckets),
        }


def _forget(task: _Task, now_ms: int) -> None:
    while task.buckets and task.buckets[0][0] <= now_ms - _MINUTE_MS:
        task.buckets.popleft()


def _has_room(task: _Task, target_id: str) -> bool:
    return target_id in task.allowed or len(task.allowed) < _MAX_TARGETS
