"""A cached decision on a repeated request, and the checks that are repeated for each request.

Cached, for as long as `cache.CacheValidity` holds: sender, target, action, the lease that allows it, and the event.
Checked for each request, as it may change at any moment: the lease, the bundle's answer, the secret, how fresh the view
is, and the limits of the agent.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from ringfence.gateway.contract import Attempt, RateCheck, Verdict
from ringfence.gateway.decision.context import ActionIds
from ringfence.gateway.decision.evaluator import NO_ANSWER, Evaluator, cache_key
from ringfence.gateway.decision.fast_path.cache import CacheValidity
from ringfence.gateway.decision.fast_path.event import AllowedEvents
from ringfence.gateway.decision.injection import Injector
from ringfence.gateway.domain import ChosenLease, Sender, access_of
from ringfence.gateway.events.recorder import Recorder, decision_counter
from ringfence.gateway.events.task_history import TaskHistory
from ringfence.gateway.state.view import View
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.http_targets import Action
from ringfence.model.verdict import Allowed


class FastPathDependencies:
    """The parts of the gate that a check uses without an await. Shared by all cached decisions of a gate."""

    __slots__ = ("clock", "evaluator", "gateway", "ids", "injector", "recorder", "task_history", "view")

    def __init__(
        self,
        view: View,
        evaluator: Evaluator,
        injector: Injector,
        recorder: Recorder,
        task_history: TaskHistory,
        ids: ActionIds,
        clock: Clock,
        *,
        gateway: str,
    ) -> None:
        """`gateway`: the SPIFFE ID of this one, for events."""
        self.view = view
        self.evaluator = evaluator
        self.injector = injector
        self.recorder = recorder
        self.task_history = task_history
        self.ids = ids
        self.clock = clock
        self.gateway = gateway


class CachedDecision:
    """The `CachedAllowance` of this gateway. See the protocol for the contract of each method."""

    __slots__ = (
        "_action",
        "_answer",
        "_at_hand",
        "_count",
        "_events",
        "_key",
        "_sender",
        "_validity",
        "lease",
        "target",
    )  # fmt: skip

    def __init__(
        self,
        at_hand: FastPathDependencies,
        sender: Sender,
        target: TargetState,
        action: Action,
        chosen: ChosenLease,
        attempt: Attempt,
        validity: CacheValidity,
    ) -> None:
        """`validity`: taken when the decision was made, just now."""
        access = access_of(attempt.method)
        self.lease: Lease = chosen.lease
        self.target: TargetState = target
        self._at_hand = at_hand
        self._sender = sender
        self._action = action
        self._validity = validity
        self._key = cache_key(chosen, action, reads=access == "read")
        self._answer = NO_ANSWER
        """The bundle's answer. It is renewed when it is no longer valid."""
        self._events = AllowedEvents(at_hand.gateway, sender.agent_id, self.lease, action, access, attempt)
        self._count = decision_counter("allowed", access)

    def is_valid(self) -> bool:
        now_ms = self._at_hand.clock.now_ms()
        # Another lease may allow the action where this one no longer does.
        return self._validity.is_valid(now_ms / 1000) and self._at_hand.view.table.is_live(
            self.lease.lease_id, now_ms
        )

    def allow(
        self, rate_check: RateCheck, on_recorded: Callable[[bool], None]
    ) -> tuple[str, Mapping[str, str]] | None:
        at_hand, began_ns = self._at_hand, time.perf_counter_ns()
        now_ms = at_hand.clock.now_ms()
        try:
            injects = self._injects(now_ms)
        except Exception:  # noqa: BLE001 - whatever it is, `decide` comes upon it too, and says so
            return None
        if injects is None or not isinstance(rate_check(self._sender.agent_id), Allowed):
            return None
        id, took_ns = at_hand.ids.new(), time.perf_counter_ns() - began_ns
        at_hand.recorder.append_at_end_of_turn(self._events.entry(id, took_ns // 1000, now_ms), on_recorded)
        self._count.tally()
        metrics.DECISION_TIME.tally(took_ns / 1e9)
        at_hand.task_history.add(
            self.lease.task_id, self.lease.target_id, self._action.verb, allowed=True, now_ms=now_ms
        )
        return id, injects

    def verdict(self, action_id: str, injected: Mapping[str, str]) -> Verdict:
        return Verdict(
            action_id, allowed=True, status=200, lease=self.lease, target=self.target, action=self._action,
            task_id=self.lease.task_id, injected=injected,
        )  # fmt: skip

    def _injects(self, now_ms: int) -> Mapping[str, str] | None:
        """The headers to inject if the request is allowed now; otherwise None. Raises an error if there is no
        credential.
        """
        at_hand, lease = self._at_hand, self.lease
        if not self._validity.is_valid(now_ms / 1000):
            return None
        if not at_hand.evaluator.is_valid(self._answer, now_ms):
            self._answer = at_hand.evaluator.cached_answer(self._key)
            if not at_hand.evaluator.is_valid(self._answer, now_ms):
                return None
        injects = at_hand.injector.cached_headers(lease, self.target)
        # Last, as in `decide`. There was no await, so nothing has changed since.
        if not at_hand.view.table.is_live(lease.lease_id, now_ms) or at_hand.view.stale() is not None:
            return None
        return injects
