"""The decision's fast path: its entry point, and the only module of this folder that others import.

It caches the results of repeated requests, so that the gate does not repeat every step:

- `cached_decision`: the decision on the very same request, without an await (`Gate.cached_allowance`);
- `authorize`: the lease that allows an action, for requests that differ in other ways;
- `allowed_entry`: the event of an allowed action, formatted from a template.

It only saves time: a gate with `DecisionSettings.fast_path` off decides the same without it.
"""

from __future__ import annotations

from collections.abc import Callable

from ringfence.gateway.contract import Attempt, PresentedIdentity
from ringfence.gateway.decision.context import ActionIds
from ringfence.gateway.decision.evaluator import Evaluator
from ringfence.gateway.decision.fast_path.cache import (
    CacheValidity,
    ChosenLeaseCache,
    RequestCache,
    valid_until_s,
)
from ringfence.gateway.decision.fast_path.cached_decision import CachedDecision, FastPathDependencies
from ringfence.gateway.decision.fast_path.event import AllowedEvents
from ringfence.gateway.decision.injection import Injector
from ringfence.gateway.decision.sender import SenderAuthenticator
from ringfence.gateway.decision.targets import Targets
from ringfence.gateway.domain import Access, ChosenLease, Refusal, Sender
from ringfence.gateway.events.recorder import Recorder
from ringfence.gateway.events.task_history import TaskHistory
from ringfence.gateway.state.view import View
from ringfence.kernel.base.clock import Clock
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.http_targets import Action

Authorize = Callable[[Sender, TargetState, Action], ChosenLease | Refusal]


class DecisionFastPath:
    """The caches of one gate."""

    def __init__(
        self,
        view: View,
        targets: Targets,
        authenticator: SenderAuthenticator,
        evaluator: Evaluator,
        injector: Injector,
        recorder: Recorder,
        task_history: TaskHistory,
        ids: ActionIds,
        clock: Clock,
        *,
        gateway: str,
        entitlements_max_age_s: int,
        authorize: Authorize,
    ) -> None:
        """`gateway`: the SPIFFE ID of this gateway, for events; `authorize`: decides without a cache."""
        self._view = view
        self._targets = targets
        self._authenticator = authenticator
        self._clock = clock
        self._gateway = gateway
        self._entitlements_max_age_s = entitlements_max_age_s
        self._authorize = authorize
        self._chosen_leases = ChosenLeaseCache(view.table, view.directory)
        self._decisions: RequestCache[CachedDecision] = RequestCache(view.table, view.directory)
        self._dependencies = FastPathDependencies(
            view, evaluator, injector, recorder, task_history, ids, clock, gateway=gateway
        )

    def authorize(self, sender: Sender, target: TargetState, action: Action) -> ChosenLease | Refusal:
        """The result of the constructor's `authorize`, cached."""
        cached = self._chosen_leases.get(sender, target, action, self._clock.now_ms() / 1000)
        if cached is not None:
            return cached
        chosen = self._authorize(sender, target, action)
        if isinstance(chosen, ChosenLease):
            self._chosen_leases.put(sender, action, chosen, self._entitlements_max_age_s)
        return chosen

    def cached_decision(self, presented: PresentedIdentity, attempt: Attempt) -> CachedDecision | None:
        """The `Gate.cached_allowance` of the gate. Takes the steps of `DecisionGate.decide` that need no await.

        None if a step needs one, or refuses: that is left to `decide`.
        """
        try:
            return self._cached_decision(presented, attempt)
        except Exception:  # noqa: BLE001 - `decide` meets the same error, and reports it
            return None

    def _cached_decision(self, presented: PresentedIdentity, attempt: Attempt) -> CachedDecision | None:
        cached = self._decisions.get(presented, attempt, self._clock.now_ms() / 1000)
        if cached is not None and cached.is_valid():
            return cached
        sender = self._authenticator.without_proof(presented)
        target = self._targets.find(attempt)
        if sender is None or isinstance(target, Refusal) or target.map.speaks_mcp(attempt.target):
            return None
        if not target.can_be_sent(attempt):
            return None
        action = target.map.action(attempt.method, attempt.target, attempt.body if attempt.json else None)
        chosen = self.authorize(sender, target.state, action) if action is not None else None
        if action is None or chosen is None or isinstance(chosen, Refusal):
            return None
        until_s = valid_until_s(chosen, self._entitlements_max_age_s)
        validity = CacheValidity(self._view.table, self._view.directory, chosen, until_s)
        decision = CachedDecision(self._dependencies, sender, target.state, action, chosen, attempt, validity)
        self._decisions.put(presented, attempt, decision, chosen, until_s)
        return decision

    def allowed_entry(
        self,
        action_id: str,
        agent_id: str,
        lease: Lease,
        action: Action,
        access: Access | None,
        attempt: Attempt,
        *,
        took_us: int,
        at_ms: int,
    ) -> bytes:
        """The spool entry for an action that was allowed without a question."""
        return AllowedEvents(self._gateway, agent_id, lease, action, access, attempt).entry(
            action_id, took_us, at_ms
        )
