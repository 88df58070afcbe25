"""Holdings and recent usage of agents, rebuilt from decisions, leases and refusals on Kafka.

An agent holds what policy allowed it from the decision on. The holding ends at the deadline, when a record says that
the lease has ended, or when the issuer refused to issue it. So missing records widen nothing: whoever withholds a lease
record only keeps the agent from being allowed more.

Records are verified only if they would change something. For most leases policy knows everything from its own decision,
and their use today from an earlier lease.
"""

from __future__ import annotations

import asyncio
import heapq
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import orjson

from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import lease_id
from ringfence.kernel.base.log_limiter import rate_limited
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.crypto.jws import parse, verify
from ringfence.kernel.crypto.trust_store import TrustStore
from ringfence.kernel.kafka.record import Received
from ringfence.messages.credential import CredentialDecision, CredentialRequest
from ringfence.messages.lease import TERMINAL, Lease
from ringfence.messages.operations import ServiceEvent
from ringfence.messages.registry import AgentState
from ringfence.model.leases.epochs import Epochs
from ringfence.model.leases.lifecycle import is_short_lived
from ringfence.model.leases.unverified_records import unverified_claims, verify_lease
from ringfence.policy.agents.usage import DAY_S, WINDOW_DAYS, Usage, Used, Verb, summary, verbs_of
from ringfence.policy.domain import Case, Evaluation, RequestAllowed

log = logging.getLogger(__name__)

LEASES_SINCE_MS = (WINDOW_DAYS + 1) * DAY_S * 1000
"""How far back leases are read at start: a lease that ended before was not used within the window."""
REFUSALS_SINCE_MS = (DAY_S + 3600) * 1000
"""How far back refusals are read at start: what was allowed before has passed its deadline."""
SLACK_S = 60
"""How long after its deadline a lease is forgotten, because clocks differ and requests wait for their turn."""
MAX_HELD = 32
"""An agent that holds more different things than this is denied anything more."""

_REFUSED_KEPT = 10_000
"""The most remembered refusals whose decisions have not been read yet."""
_SWEPT_AT_ONCE = 1000
_lease_id = lru_cache(maxsize=1024)(lease_id)
"""Cached: each request needs it three times."""
_NEVER_ISSUED = frozenset({"minting", "aborted"})


class LeaseGroup(NamedTuple):
    """Leases of one task that have the same end. Either all are short-lived or none is."""

    task_id: str
    short_lived: bool
    until_s: int
    leases: int


class Live(NamedTuple):
    """One live lease. Times are seconds since 1970."""

    lease_id: str
    task_id: str
    since_s: int
    """When it was allowed."""
    until_s: int


@dataclass(slots=True)
class _HeldLease:
    """One lease that may be live, or that ended before its deadline."""

    agent_id: str
    what: bytes
    since_s: int
    deadline_s: int
    decided: bool = False
    """Whether its decision, or a record of it, is on Kafka."""
    seq: int = 0
    """The highest verified `seq`; 0 if no record had to be verified."""
    over: bool = False


@dataclass(slots=True)
class _EquivalentLeases:
    """The live leases of one agent that allow the same in the same task."""

    task_id: str
    scope: list[dict[str, Any]]
    leases: dict[str, int] = field(default_factory=dict)
    """Deadlines by lease id, the latest lease last."""
    endings: dict[tuple[bool, int], int] = field(default_factory=dict)
    """Number of leases by (short-lived, deadline). It avoids a pass over very many leases."""

    def put(self, id: str, lease: _HeldLease) -> None:
        self.leases[id] = lease.deadline_s
        ending = (is_short_lived(lease.since_s, lease.deadline_s), lease.deadline_s)
        self.endings[ending] = self.endings.get(ending, 0) + 1

    def drop(self, id: str, lease: _HeldLease) -> bool:
        """Remove a lease, and return whether it was there. `lease` must be as it was put."""
        if self.leases.pop(id, None) is None:
            return False
        self._uncount(lease)
        return True

    def change(self, id: str, lease: _HeldLease, since_s: int, until_s: int) -> None:
        """Change start and deadline of a lease, whether or not it is in this group."""
        counted = id in self.leases
        if counted:
            self._uncount(lease)
        lease.since_s, lease.deadline_s = since_s, until_s
        if counted:
            self.put(id, lease)

    def _uncount(self, lease: _HeldLease) -> None:
        ending = (is_short_lived(lease.since_s, lease.deadline_s), lease.deadline_s)
        self.endings[ending] -= 1
        if not self.endings[ending]:
            del self.endings[ending]


@dataclass(slots=True)
class _Holder:
    """State of one agent."""

    held: dict[bytes, _EquivalentLeases] = field(default_factory=dict)
    """Its live leases, by what they allow in which task (`_group_key`)."""
    usage: Usage = field(default_factory=Usage)
    version: int = 0
    """Grows with each change of `held` or `usage`."""
    kinds: int = 0
    """Grows with each new kind of holding."""
    uses: int = 0
    asked_ms: int = 0
    """Append time of the latest request whose lease record was verified."""
    told: tuple[object, dict[str, Any]] | None = None
    """The last summary, and the state that it was made from."""


class Holdings:
    """Holdings and usage of every agent. Memory grows with live leases, and with agents times verbs."""

    def __init__(self, trust: TrustStore, clock: Clock) -> None:
        self._trust = trust
        self._clock = clock
        self._epochs = Epochs(trust)
        self._holders: dict[str, _Holder] = {}
        self._leases: dict[str, _HeldLease] = {}
        self._ends: list[tuple[int, str]] = []
        self._refused: BoundedDict[str, None] = BoundedDict(_REFUSED_KEPT)
        self._verbs: dict[Verb, Verb] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._swept_on = 0
        self._to_sweep: list[str] = []

    def on_change(self, listener: Callable[[str], None]) -> None:
        """Call `listener` with the id of each agent whose state changed."""
        self._listeners.append(listener)

    # --- look-up ---

    def turn(self, agent_id: str) -> AbstractAsyncContextManager[None]:
        """Return a lock for work that must not run for two requests of an agent concurrently."""
        lock = self._turns.get(agent_id)
        if lock is None:
            lock = self._turns[agent_id] = asyncio.Lock()
        return lock

    def kinds(self, agent_id: str) -> int:
        """Return a number that grows whenever `held` gains a new kind of holding."""
        holder = self._holders.get(agent_id)
        return holder.kinds if holder else 0

    def version(self, agent_id: str) -> int:
        """Return a number that changes with any change of the agent's state."""
        holder = self._holders.get(agent_id)
        return holder.version if holder else 0

    def held(self, agent_id: str, now_s: int, *, but_for: str | None = None) -> list[dict[str, Any]]:
        """Return the policy input `held`. Of leases that allow the same in the same task, the latest stands for all.

        `but_for` is the id of the request being decided: its own lease does not count against it.
        """
        holder = self._holders.get(agent_id)
        if holder is None or not holder.held:
            return []
        own = _lease_id(but_for) if but_for else None
        entries = []
        for alike in holder.held.values():
            for id, deadline_s in reversed(alike.leases.items()):
                if deadline_s > now_s and id != own:
                    entries.append(
                        {
                            "lease_id": id,
                            "task_id": alike.task_id,
                            "scope": alike.scope,
                            "deadline": deadline_s,
                        }
                    )
                    break
        return entries

    def live(self, agent_id: str, now_s: int) -> list[Live]:
        """Return every lease of an agent that is live or about to be. There may be very many."""
        holder = self._holders.get(agent_id)
        return [
            Live(id, alike.task_id, self._leases[id].since_s, until_s)
            for alike in (holder.held.values() if holder else ())
            for id, until_s in alike.leases.items()
            if until_s > now_s
        ]

    def endings(self, agent_id: str, now_s: int) -> list[LeaseGroup]:
        """Return when the leases of `live` end, in groups.

        There are at most as many groups as seconds until the last end.
        """
        holder = self._holders.get(agent_id)
        return [
            LeaseGroup(alike.task_id, short_lived, until_s, count)
            for alike in (holder.held.values() if holder else ())
            for (short_lived, until_s), count in alike.endings.items()
            if until_s > now_s
        ]

    def used_verbs(self, agent_id: str, now_s: int) -> set[Verb]:
        """Return the verbs that an agent used in the last 30 days."""
        holder = self._holders.get(agent_id)
        return holder.usage.verbs(now_s) if holder else set()

    def asked_ms(self, agent_id: str) -> int | None:
        """Return when an agent last requested something it received, by verified lease records: mostly the first
        request of a day.
        """
        holder = self._holders.get(agent_id)
        return (holder.asked_ms or None) if holder else None

    def used(self, agent_id: str, now_s: int) -> list[Used]:
        """Return the usage of an agent in the last 30 days."""
        holder = self._holders.get(agent_id)
        return list(holder.usage.within(now_s)) if holder else []

    def history(self, agent: AgentState, target_id: str, now_s: int) -> dict[str, Any]:
        """Return the policy input `history` for a request at a target."""
        holder = self._holder(agent.agent_id)
        made_of = (holder.uses, agent.ceiling, target_id, now_s // DAY_S)
        if holder.told is None or holder.told[0] != made_of:
            holder.told = made_of, summary(list(holder.usage.within(now_s)), agent.ceiling, target_id, now_s)
        return holder.told[1]

    # --- policy's own decisions ---

    def record_evaluation(self, case: Case, evaluation: Evaluation) -> None:
        """Record an evaluation before anybody learns of it: the agent holds what was allowed from now on."""
        id, ruling, document = _lease_id(case.request_id), evaluation.ruling, evaluation.input
        if not isinstance(ruling, RequestAllowed) or document is None:
            lease = self._leases.get(id)
            if lease is not None and not lease.decided:
                self._shed(id, lease)
                del self._leases[id]
            return
        now_s, request = self._now_s(), document["request"]
        until_s = now_s + ruling.ttl_s + SLACK_S
        self._hold(id, case.agent_id, request["task_id"], request["scope"], now_s, until_s)

    def decided(self, decision: CredentialDecision, agent_id: str, at_ms: int) -> None:
        """Record an `allowed` decision that is on Kafka since `at_ms`, whichever replica made it."""
        end_s = at_ms // 1000 + (decision.ttl_s or 0)
        if end_s <= self._now_s() - SLACK_S:
            return
        id = _lease_id(decision.request_id)
        lease = self._leases.get(id)
        if lease is None:
            # The request stands inside a decision of this service: it was verified before that was signed.
            request = parse(decision.request).unverified_claims(CredentialRequest)
            scope = [permission.model_dump(mode="json") for permission in request.scope]
            lease = self._hold(id, agent_id, request.task_id, scope, at_ms // 1000, end_s)
            if self._refused.pop(id, True) is None:
                self._shed(id, lease)
        elif not lease.decided:
            self._lives(id, lease, at_ms // 1000, end_s)
        lease.decided = True

    # --- later events ---

    def on_leases(self, records: Sequence[Received]) -> None:
        """Process records of `lease`, in the order of each partition."""
        self._expire()
        for record in records:
            if self._epochs.took(record):
                continue
            claims = unverified_claims(record.value)
            if claims is not None and self._matters(claims, record.key):
                self._verify(record)

    def on_events(self, records: Sequence[Received]) -> None:
        """Process service events, to learn what the issuer refused."""
        for record in records:
            claims = unverified_claims(record.value)
            if claims and (claims.get("kind"), claims.get("subject")) == ("refused", CredentialDecision.typ):
                self._on_refusal(record)

    def _on_refusal(self, record: Received) -> None:
        find = self._trust.finder("issuer", at_s=record.appended_at_ms / 1000)
        try:
            event = verify(parse(record.value), ServiceEvent, find, audience=self._trust.trust_domain).claims
            id = lease_id(event.request_id or "")
        except (InvalidMessageError, ValueError) as error:
            log.warning(
                "ignored a refusal at %s@%d: %s",
                record.topic_name,
                record.offset,
                error,
                extra=rate_limited(record.topic_name, type(error).__name__),
            )
            return
        lease = self._leases.get(id)
        if lease is None:
            self._refused[id] = None
        elif not lease.seq:  # otherwise it was issued after all, at another delivery of the decision
            self._shed(id, lease)

    def _matters(self, unverified: dict[str, Any], key: str | None) -> bool:
        """Return whether an unverified record would change anything if it is valid."""
        try:
            id, seq, status = unverified["lease_id"], unverified["seq"], unverified["status"]
            if id != key or seq < 1:
                return False
            lease, now_s, deadline_s = self._leases.get(id), self._now_s(), unverified["deadline"]
            # A lease past its deadline is no longer held, whether or not its end is known.
            in_time = status in TERMINAL and max(deadline_s, lease.deadline_s if lease else 0) <= now_s
            if deadline_s > now_s - SLACK_S and not in_time:
                if lease is None:
                    return True
                if seq > lease.seq and lease.over != (status in TERMINAL):
                    return True
            return status not in _NEVER_ISSUED and not self._knows(unverified)
        except (KeyError, TypeError, AttributeError):
            return False

    def _knows(self, unverified: dict[str, Any]) -> bool:
        holder = self._holders.get(unverified["agent_id"])
        day = unverified["requested_at_ms"] // (DAY_S * 1000)
        if day <= self._now_s() // DAY_S - WINDOW_DAYS:
            return True
        scope = unverified["scope"]
        verbs = [(permission["target"], verb) for permission in scope for verb in permission["verbs"]]
        return holder is not None and holder.usage.knows(verbs, day)

    def _verify(self, record: Received) -> None:
        try:
            lease = verify_lease(record.value, self._trust, self._clock, appended_at_ms=record.appended_at_ms)
        except InvalidMessageError as error:
            log.error(
                "ignored the record of a lease at %s@%d: %s",
                record.topic_name,
                record.offset,
                error,
                extra=rate_limited(record.topic_name, error.code),
            )
            return
        if lease.lease_id == record.key and not self._epochs.is_void(record, lease.epoch):
            self._take(lease)

    def _take(self, lease: Lease) -> None:
        """Apply a verified record. The highest `seq` counts."""
        if lease.status not in _NEVER_ISSUED:
            self._use(lease)
        if lease.deadline <= self._now_s() - SLACK_S:
            return
        held_lease = self._leases.get(lease.lease_id)
        if held_lease is not None and lease.seq <= held_lease.seq:
            return
        if lease.status in TERMINAL:
            if held_lease is None:
                held_lease = _HeldLease(lease.agent_id, b"", lease.iat, lease.deadline)
                self._remember(lease.lease_id, held_lease)
            self._shed(lease.lease_id, held_lease)
        else:
            scope = [permission.model_dump(mode="json") for permission in lease.scope]
            held_lease = self._hold(
                lease.lease_id, lease.agent_id, lease.task_id, scope, lease.iat, lease.deadline
            )
        held_lease.seq, held_lease.decided = lease.seq, True

    def _use(self, lease: Lease) -> None:
        holder = self._holder(lease.agent_id)
        verbs = [self._verbs.setdefault(verb, verb) for verb in verbs_of(lease.scope)]
        holder.usage.add(verbs, lease.requested_at_ms // (DAY_S * 1000))
        holder.uses += 1
        holder.asked_ms = max(holder.asked_ms, lease.requested_at_ms)
        self._changed(lease.agent_id, holder)

    # --- one lease ---

    def _hold(
        self, id: str, agent_id: str, task_id: str, scope: list[dict[str, Any]], since_s: int, until_s: int
    ) -> _HeldLease:
        """Add a lease. `since_s` counts only if the lease was unknown before."""
        group_key = _group_key(task_id, scope)
        lease = self._leases.get(id)
        if lease is None:
            lease = _HeldLease(agent_id, group_key, since_s, until_s)
            self._remember(id, lease)
        elif lease.what != group_key:
            self._shed(id, lease)
        holder = self._holder(agent_id)
        alike = holder.held.get(group_key)
        if alike is None:
            alike = holder.held[group_key] = _EquivalentLeases(task_id, scope)
        if not alike.leases or next(reversed(alike.leases.values())) <= self._now_s() + SLACK_S:
            holder.kinds += 1  # also if everything it had of this kind may have ended by the broker's clock
        lease.what, lease.over = group_key, False
        self._lives(id, lease, lease.since_s, until_s)
        if id not in alike.leases:
            alike.put(id, lease)
        self._changed(agent_id, holder)
        return lease

    def _lives(self, id: str, lease: _HeldLease, since_s: int, until_s: int) -> None:
        if until_s != lease.deadline_s:
            heapq.heappush(self._ends, (until_s, id))
        alike = self._holder(lease.agent_id).held.get(lease.what)
        if alike is not None:
            alike.change(id, lease, since_s, until_s)
        else:
            lease.since_s, lease.deadline_s = since_s, until_s

    def _remember(self, id: str, lease: _HeldLease) -> None:
        self._leases[id] = lease
        heapq.heappush(self._ends, (lease.deadline_s, id))

    def _shed(self, id: str, lease: _HeldLease) -> None:
        """Remove a lease that ended. It stays known, so that no older record restores it."""
        lease.over = True
        holder = self._holders.get(lease.agent_id)
        alike = holder.held.get(lease.what) if holder else None
        if holder is None or alike is None or not alike.drop(id, lease):
            return
        if not alike.leases:
            del holder.held[lease.what]
        self._changed(lease.agent_id, holder)

    def _changed(self, agent_id: str, holder: _Holder) -> None:
        holder.version += 1
        for listener in self._listeners:
            listener(agent_id)

    # --- removal ---

    def _expire(self) -> None:
        now_s = self._now_s()
        while self._ends and self._ends[0][0] <= now_s - SLACK_S:
            _, id = heapq.heappop(self._ends)
            lease = self._leases.get(id)
            if lease is not None and lease.deadline_s <= now_s - SLACK_S:
                self._shed(id, lease)
                del self._leases[id]
        if now_s // DAY_S != self._swept_on:
            self._swept_on = now_s // DAY_S
            self._to_sweep = list(self._holders)
        self._sweep(self._to_sweep[-_SWEPT_AT_ONCE:])
        del self._to_sweep[-_SWEPT_AT_ONCE:]

    def _sweep(self, agent_ids: Sequence[str]) -> None:
        """Once a day for each agent, drop old usage, and agents that have nothing left."""
        for agent_id in agent_ids:
            holder = self._holders.get(agent_id)
            if holder is None:
                continue
            holder.usage.forget(self._swept_on)
            if not holder.usage and not holder.held:
                del self._holders[agent_id]

    def _holder(self, agent_id: str) -> _Holder:
        holder = self._holders.get(agent_id)
        if holder is None:
            holder = self._holders[agent_id] = _Holder()
        return holder

    def _now_s(self) -> int:
        return self._clock.now_ms() // 1000


def _group_key(task_id: str, scope: list[dict[str, Any]]) -> bytes:
    return task_id.encode() + b" " + orjson.dumps(scope)
