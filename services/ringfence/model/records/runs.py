"""The table of runs: what runners said of each, as far as it counts.

A record counts if its run's runner signed it, and if it takes the run forward: `claimed`, `started`, `ended` or `lost`.
Nothing takes a run back, or to another runner, agent, task or key. A local run's id follows from its runner's, so that
no other can take it; of an order, the first claim in its partition counts.

Every service holds this table, so it is bounded: a run lasts a day at most, and a runner has so many at a time.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import derived_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.messages.enrolment import InstanceEnrolment, InstanceRef
from ringfence.messages.run import Run, RunStatus
from ringfence.model.identity.runners import runner_issuer_of
from ringfence.model.unknown_fields import is_understood, names_of, unknown_fields
from ringfence.model.verdict import ALLOWED, Refused, Verdict, refused

if TYPE_CHECKING:  # rules look runs up here, and import nothing that does I/O
    from ringfence.kernel.kafka.record import Received

log = logging.getLogger(__name__)

FOLLOWING: Final[dict[RunStatus, frozenset[RunStatus]]] = {
    "claimed": frozenset({"started", "ended", "lost"}),
    "started": frozenset({"ended", "lost"}),
    "ended": frozenset(),
    "lost": frozenset(),
}
"""Which statuses may follow each status."""
OVER: Final[frozenset[RunStatus]] = frozenset({"ended", "lost"})
BY_TIME_OR_END: Final = frozenset(
    {Code.RUN_ENDED, Code.RUN_UNKNOWN, Code.RUN_NOT_STARTED, Code.RUN_NOT_UNDERSTOOD}
)
"""Codes of denials that an honest policy may not have known when it decided."""
_SAME: Final = (
    "run_id", "order_id", "nonce", "ordered_by", "agent_id", "task_id", "deadline", "backend", "limits",
    "policy_digest", "image_digest", "mounts",
)  # fmt: skip
"""The fields that never change after the claim."""
_MAX_AWAITING_TRUST = 1_000
KEPT_MS: Final = 8 * 24 * 3600 * 1000
"""How long a run is kept past its deadline: longer than an order for one is on Kafka."""
_FORGET_EVERY_MS = 3600 * 1000
MAX_RUN_S: Final = 86_400
"""The longest run: that of an order (`TtlSeconds`), and of an enrolment."""
_CLOCKS_DIFFER_S: Final = 60
MAX_RUNS: Final = 1000
"""How many runs of one runner may go on at a time: as many as one of its heartbeats names."""


@dataclass(frozen=True, slots=True)
class KnownRun:
    """The current state of a run, and the coordinates of the records behind it."""

    run: Run
    accepted: tuple[tuple[int, int], ...]
    """Partition and offset of each record that counted, oldest first."""


class RunTable:
    """All runs, from the topic `run`."""

    def __init__(self, trust: TrustStore) -> None:
        self._trust = trust
        self._runs: dict[str, KnownRun] = {}
        self._going_on: dict[str, dict[str, int]] = {}
        """By runner: the deadlines (s) of its runs that are not over."""
        self._read_to: dict[int, int] = {}
        self._forgot_ms = 0
        self._listeners: list[Callable[[Run], None]] = []
        self._trust_version = trust.version
        self._awaiting_trust: deque[Received] = deque(maxlen=_MAX_AWAITING_TRUST)
        """Records by keys that the trust bundle does not have: the next bundle may have them."""

    def on_records(self, records: Sequence[Received]) -> None:
        """Take records of the topic `run`, in the order of each partition."""
        if self._trust_version != self._trust.version:
            self._trust_version = self._trust.version
            unbelieved, self._awaiting_trust = self._awaiting_trust, deque(maxlen=_MAX_AWAITING_TRUST)
            for record in unbelieved:
                self._take(record)
        for record in records:
            if record.value:  # nobody deletes a run: who is without one is without its instance
                self._take(record)
            self._read_to[record.partition] = record.offset
        if records:
            self._forget(records[-1].appended_at_ms)

    def on_change(self, listener: Callable[[Run], None]) -> None:
        """Call `listener` with each run whose record counted."""
        self._listeners.append(listener)

    def of(self, instance: InstanceRef | InstanceEnrolment | None) -> Run | None:
        """The run that an instance is of, as it is now; None if it is of none, or of one that is not there."""
        return self.get(instance.run.run_id) if instance is not None and instance.run is not None else None

    def get(self, run_id: str) -> Run | None:
        """The current state of the run; None if no valid record of it exists."""
        known = self._runs.get(run_id)
        return known.run if known is not None else None

    def all(self) -> list[Run]:
        """All runs that are not forgotten, as they are now."""
        return [known.run for known in self._runs.values()]

    def goes_on(self, run_id: str) -> bool:
        """Whether a run has started and is not over, and nothing that is not known here may limit it."""
        run = self.get(run_id)
        return run is not None and run.status == "started" and is_understood(run)

    def counted(self, run_id: str, partition: int, offset: int) -> bool | None:
        """Whether the record at these coordinates counted. None if it is not read yet."""
        if self._read_to.get(partition, -1) < offset:
            return None
        known = self._runs.get(run_id)
        return known is not None and (partition, offset) in known.accepted

    def _take(self, record: Received) -> None:
        try:
            run = self.verified(record)
        except InvalidMessageError as error:
            if error.code == Code.KEY_UNKNOWN:
                self._awaiting_trust.append(record)
            log.warning(
                "not a run: %s/%d@%d: %s",
                record.topic_name,
                record.partition,
                record.offset,
                error,
                extra=rate_limited(record.topic_name, error.code),
            )
            return
        known = self._runs.get(run.run_id)
        if (
            problem := succession_problem(known.run, run)
            if known
            else self._excess(run, record.appended_at_ms)
        ):
            log.error(
                "refused a record of run %s at %d@%d: %s",
                run.run_id,
                record.partition,
                record.offset,
                problem,
                extra=rate_limited(record.topic_name, Code.RUN_REFUSED),
            )
            return
        accepted = known.accepted if known is not None else ()
        self._runs[run.run_id] = KnownRun(run, (*accepted, (record.partition, record.offset)))
        going_on = self._going_on.setdefault(run.iss, {})
        if run.status in OVER:
            going_on.pop(run.run_id, None)
        else:
            going_on[run.run_id] = run.deadline
        for listener in self._listeners:
            listener(run)

    def _excess(self, run: Run, now_ms: int) -> str | None:
        """Why a new run is one too many of its runner, or None."""
        going_on = self._going_on.get(run.iss, {})
        if run.status in OVER or len(going_on) < MAX_RUNS:
            return None
        going_on = {id: deadline for id, deadline in going_on.items() if deadline * 1000 > now_ms}
        self._going_on[run.iss] = going_on
        return f"{run.iss} has {MAX_RUNS} runs that go on" if len(going_on) >= MAX_RUNS else None

    def _forget(self, now_ms: int) -> None:
        """Forget runs that were over days ago: their instances' keys are, and no order lives so long."""
        if now_ms - self._forgot_ms < _FORGET_EVERY_MS:
            return
        self._forgot_ms = now_ms
        horizon_s = (now_ms - KEPT_MS) // 1000
        self._runs = {id: known for id, known in self._runs.items() if known.run.deadline >= horizon_s}

    def verified(self, record: Received) -> Run:
        """The verified claims of a record, whether or not it takes its run forward. Raises InvalidMessageError."""
        run = verify(
            parse(record.value),
            Run,
            self._trust.finder(*Run.signed_by, at_s=record.appended_at_ms / 1000),
            audience=self._trust.trust_domain,
        ).claims
        if record.key != run.run_id:
            raise InvalidMessageError("the Kafka key of a run is its id", code=Code.KEY_UNEXPECTED)
        if run.run_id != run_id_of(run.iss, order_id=run.order_id, nonce=run.nonce):
            raise InvalidMessageError(
                "the id of a run follows from its order, or its runner", code=Code.RUN_ID_UNEXPECTED
            )
        if run.deadline > record.appended_at_ms // 1000 + MAX_RUN_S + _CLOCKS_DIFFER_S:
            raise InvalidMessageError(
                f"a run lasts {MAX_RUN_S // 3600} h at most, and its deadline is later",
                code=Code.RUN_TOO_LONG,
            )
        return run


def run_id_of(runner: str, *, order_id: str | None = None, nonce: str | None = None) -> str:
    """The id of a run: of an ordered one by its order alone, of a local one by its runner (SPIFFE ID) and nonce."""
    return derived_id("run", order_id) if order_id is not None else derived_id("run", runner, str(nonce))


def succession_problem(known: Run, following: Run) -> str | None:
    """Why a record does not take its run forward, or None."""
    if known.iss != following.iss:
        return f"the run is {known.iss}'s, and {following.iss} signed this"
    if following.status not in FOLLOWING[known.status]:
        return f"the run is {known.status}, and this says {following.status}"
    if changed := [name for name in _SAME if getattr(known, name) != getattr(following, name)]:
        return f"it changes {', '.join(changed)}"
    if known.key_thumbprint is not None and following.key_thumbprint != known.key_thumbprint:
        return "it changes the key of the run's instance"
    return None


def run_violations(
    instance: InstanceRef | None,
    run: Run | None,
    *,
    agent_id: str,
    task_id: str,
    kid: str | None,
    now_s: float,
) -> tuple[Reason, ...]:
    """All reasons why the instance of a run may not act for an agent within a task. Empty if it is no run's.

    `run`: the run that `instance` names, as `RunTable` has it. `kid`: the key that asks, if it is known here. `now_s`
    is a time on the broker's clock.
    """
    if instance is None or instance.run is None:
        return ()
    found = []
    if instance.run.task_id != task_id:
        message = f"the instance is that of a run of task {instance.run.task_id}, and acts within no other"
        found.append(Reason(code=Code.INSTANCE_OTHER_TASK, message=message))
    verdict = _check_run(instance, run, agent_id, kid, now_s)
    return (*found, verdict.reason) if isinstance(verdict, Refused) else tuple(found)


def _check_run(
    instance: InstanceRef, run: Run | None, agent_id: str, kid: str | None, now_s: float
) -> Verdict:
    """Check that the run of an instance goes on, and is that of this agent, task, runner and key.

    1. A runner says that there is such a run.
    2. It has not ended.
    3. It has started.
    4. Its record has no field that is unknown here.
    5. It is of the same agent, task, runner and key.
    """
    assert instance.run is not None
    id = instance.run.run_id
    if run is None:
        return refused(Code.RUN_UNKNOWN, f"no runner says that there is a run {id}")
    if run.status in OVER or now_s >= run.deadline:
        return refused(Code.RUN_ENDED, f"run {id} has ended, and with it everything that its instance may")
    if run.status != "started":
        return refused(Code.RUN_NOT_STARTED, f"run {id} has not started yet")
    if fields := unknown_fields(run):
        message = (
            f"run {id} has a field that is not known here, and may limit it: {names_of(fields)}; upgrade"
        )
        return refused(Code.RUN_NOT_UNDERSTOOD, message)
    same = (run.agent_id, run.task_id) == (agent_id, instance.run.task_id)
    if not same or runner_issuer_of(run.iss) != instance.issuer or kid not in (None, run.key_thumbprint):
        return refused(Code.RUN_MISMATCH, f"run {id} is of another agent, task, runner or key")
    return ALLOWED
