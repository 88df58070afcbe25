"""The decision's fast path: its entry point, and the only module of this folder that others import.

It caches the results of repeated requests, so that the gate does not repeat every step:

- `cached_decision`: the decision on the very same request, without an await (`Gate.cached_allowance`);
- `authorize`: the lease that allows an action, for requests that differ in other ways;
- `allowed_entry`: the event of an allowed action, formatted from a template.

It only saves time: a gate with `DecisionSettings.fast_path` off decides the same without it.

A cached decision on a repeated request, and the checks that are repeated for each request.

Cached, for as long as `cache.CacheValidity` holds: sender, target, action, the lease that allows it, and the event.
Checked for each request, as it may change at any moment: the lease, the bundle's answer, the secret, how fresh the view
is, and the limits of the agent.

Caches of decisions, with their invalidation: an entry is valid while nothing that it depends on can have changed.

It depends on records, on the trust bundle, on the leases of one agent at one target, and on time. The first three have
versions, time has an end. Two caches use that:

- `ChosenLeaseCache`: the lease that allows an action, by sender and action;
- `RequestCache`: the result of a request, by the evidence of its sender and its contents.

Only allowed requests are cached. A denied request is decided anew, so that its reasons are current. An entry alone
allows nothing: the gate checks for each request what may change at any moment: the lease, the bundle's answer, the
secret, the freshness of the view (`cached_decision`).

A template for the events of allowed actions, which are most: formatted once, with places for what differs.

The result is the JSON of an `ActionDecided`, without a model in between.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Final, Generic, TypeVar

import orjson

from ringfence.gateway.contract import Attempt, PresentedIdentity, RateCheck, Verdict
from ringfence.gateway.decision.context import ActionIds
from ringfence.gateway.decision.evaluator import NO_ANSWER, Evaluator, cache_key
from ringfence.gateway.decision.injection import Injector
from ringfence.gateway.decision.sender import SenderAuthenticator
from ringfence.gateway.decision.targets import Targets
from ringfence.gateway.domain import Access, ChosenLease, Refusal, Sender, access_of, run_id_of_lease
from ringfence.gateway.events.recorder import (
    Recorder,
    act_of,
    decision_counter,
    digest_of,
    entry_head,
    label_of,
    method_of,
)
from ringfence.gateway.events.task_history import TaskHistory
from ringfence.gateway.state.leases import LeaseTable
from ringfence.gateway.state.view import View
from ringfence.kernel.base import metrics
from ringfence.kernel.base.clock import Clock
from ringfence.messages.lease import Lease
from ringfence.messages.registry import TargetState
from ringfence.model.http_targets import Action
from ringfence.model.records.directory import Directory
from ringfence.model.verdict import Allowed

_ID: Final = "00000000-0000-4000-8000-000000000000"
"""A placeholder for the action id."""


class AllowedEvents:
    """The events of one sender that does one action by one lease."""

    __slots__ = ("_template",)

    def __init__(
        self,
        gateway: str,
        agent_id: str,
        lease: Lease,
        action: Action,
        access: Access | None,
        attempt: Attempt,
    ) -> None:
        before: dict[str, object] = {"gateway": gateway, "agent_id": agent_id}
        if (act := act_of(lease, agent_id)) is not None:
            before["act"] = act
        before["task_id"] = lease.task_id
        if (run_id := run_id_of_lease(lease)) is not None:
            before["run_id"] = run_id
        before |= {
            "lease_id": lease.lease_id, "target_id": lease.target_id,
            "verb": action.verb, "resource": action.resource, "allowed": True, "reasons": (),
        }  # fmt: skip
        if access is not None:
            before["access"] = access
        if (method := method_of(attempt)) is not None:
            before["method"] = method
        before["request_digest"] = digest_of(attempt)
        label = label_of(attempt)
        between = {} if label is None else {"label": label}
        after = {} if lease.traceparent is None else {"traceparent": lease.traceparent}
        head = entry_head(agent_id, _ID, lease.traceparent).split(_ID.encode())
        self._template = b"".join((
            _literal(head[0]), b"%b", _literal(head[1]), b'{"action_id":"%b",', _members(before), b',"latency_us":%d,',
            _members(between), b"," if between else b"", b'"at_ms":%d', b"," if after else b"", _members(after), b"}",
        ))  # fmt: skip

    def entry(self, id: str, took_us: int, at_ms: int) -> bytes:
        """One event, as an entry of the spool. `id`: a UUID."""
        raw = id.encode()
        return self._template % (raw, raw, took_us, at_ms)


def _members(members: dict[str, object] | dict[str, str]) -> bytes:
    return _literal(orjson.dumps(members)[1:-1])


def _literal(text: bytes) -> bytes:
    return text.replace(b"%", b"%%")


MAX_CHOSEN_LEASES: Final = 20_000
MAX_REQUESTS: Final = 10_000
_MAX_TARGET_CHARS: Final = 512
"""Requests with a longer target are not cached: they are seldom repeated, and would fill the memory."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class CacheValidity:
    """The versions that one cached value was computed from."""

    __slots__ = ("_directory", "_leases", "_place", "_records", "_table", "_trust", "_until_s")

    def __init__(self, table: LeaseTable, directory: Directory, chosen: ChosenLease, until_s: float) -> None:
        """`chosen`: the lease that was chosen for the value; `until_s`: when time alone ends it (`valid_until_s`)."""
        self._table = table
        self._directory = directory
        self._place = chosen.lease.agent_id, chosen.lease.target_id
        self._records, self._trust = directory.versions
        self._leases = table.version(self._place)
        self._until_s = until_s

    def is_valid(self, now_s: float) -> bool:
        """Whether the same value would be computed now."""
        return (
            now_s < self._until_s
            and self._records == self._directory.version
            and self._leases == self._table.version(self._place)
            and self._trust == self._directory.trust.version
        )


class ValidatedCache(Generic[K, V]):
    """A cache of the latest `limit` values, each with its `CacheValidity`."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int) -> None:
        self._table = table
        self._directory = directory
        self._limit = limit
        self._entries: OrderedDict[K, tuple[V, CacheValidity]] = OrderedDict()

    def get(self, key: K, now_s: float) -> V | None:
        """The value; None if there is none, or if it may have changed."""
        entry = self._entries.get(key)
        if entry is None:
            return None
        value, validity = entry
        return value if validity.is_valid(now_s) else None

    def put(self, key: K, value: V, chosen: ChosenLease, until_s: float) -> None:
        self._entries[key] = value, CacheValidity(self._table, self._directory, chosen, until_s)
        self._entries.move_to_end(key)
        if len(self._entries) > self._limit:
            self._entries.popitem(last=False)


def valid_until_s(chosen: ChosenLease, entitlements_max_age_s: int) -> float:
    """When time alone changes the decision: the lease or the task ends, or the entitlements get too old."""
    lease, ground = chosen.lease, chosen.ground
    as_of = ground.user.state.entitlements.as_of
    ends = [lease.deadline, ground.task.state.not_after, as_of + entitlements_max_age_s]
    return min(*ends, lease.instance.not_after) if lease.instance is not None else min(ends)


_LeaseKey = tuple[str, str | None, str | None, str | None, bool, str, str, str]


class ChosenLeaseCache:
    """The lease that allows an action, by sender and action."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int = MAX_CHOSEN_LEASES) -> None:
        self._table = table
        self._cache: ValidatedCache[_LeaseKey, ChosenLease] = ValidatedCache(table, directory, limit=limit)

    def get(self, sender: Sender, target: TargetState, action: Action, now_s: float) -> ChosenLease | None:
        """The lease that would be chosen now; None if that is not certain."""
        cached = self._cache.get(_lease_key(sender, target.target_id, action), now_s)
        # Another lease may allow the action where this one no longer does.
        return (
            cached
            if cached is not None and isinstance(self._table.check_live(cached.lease), Allowed)
            else None
        )

    def put(self, sender: Sender, action: Action, chosen: ChosenLease, entitlements_max_age_s: int) -> None:
        """Cache the lease that was chosen just now."""
        key = _lease_key(sender, chosen.lease.target_id, action)
        self._cache.put(key, chosen, chosen, valid_until_s(chosen, entitlements_max_age_s))


def _lease_key(sender: Sender, target_id: str, action: Action) -> _LeaseKey:
    return (
        sender.agent_id, sender.task_id, sender.lease_id, sender.run_id, sender.key_proved,
        target_id, action.verb, action.resource,
    )  # fmt: skip


_RequestKey = tuple[str | None, ...]


class RequestCache(Generic[V]):
    """The results of requests, by all of a request but its body: a request whose body was read is not cached."""

    def __init__(self, table: LeaseTable, directory: Directory, *, limit: int = MAX_REQUESTS) -> None:
        self._cache: ValidatedCache[_RequestKey, V] = ValidatedCache(table, directory, limit=limit)

    def get(self, presented: PresentedIdentity, attempt: Attempt, now_s: float) -> V | None:
        """The result that the request would have now; None if that is not certain."""
        return self._cache.get(_request_key(presented, attempt), now_s) if attempt.body is None else None

    def put(
        self, presented: PresentedIdentity, attempt: Attempt, value: V, chosen: ChosenLease, until_s: float
    ) -> None:
        if attempt.body is None and len(attempt.target) <= _MAX_TARGET_CHARS:
            self._cache.put(_request_key(presented, attempt), value, chosen, until_s)


def _request_key(presented: PresentedIdentity, attempt: Attempt) -> _RequestKey:
    return (
        presented.task_id, presented.run_id, presented.certificate, presented.handle,
        attempt.authority, attempt.target_id, attempt.scheme, attempt.method, attempt.target,
        attempt.label,
    )  # fmt: skip


@dataclass(slots=True, eq=False)
class FastPathDependencies:
    """The parts of the gate that a check uses without an await. Shared by all cached decisions of a gate."""

    view: View
    evaluator: Evaluator
    injector: Injector
    recorder: Recorder
    task_history: TaskHistory
    ids: ActionIds
    clock: Clock
    _: KW_ONLY
    gateway: str
    """The SPIFFE ID of this one, for events."""


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
        if (
            not target.can_be_sent(attempt)
            or target.map.model_api(attempt.method, attempt.target) is not None
        ):
            return None  # what a model uses is reserved and metered for each request
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
