"""Detection rules about the reach of agents: beyond their user, bursts of denials, first use, unused ceiling. Pure.

The state of each rule is bounded. Evicted agents and targets are not judged.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ringfence.audit.detections.rule import EventSummary, Finding, TrailEvent
from ringfence.kernel.base.replay_memory import BoundedDict

MAX_AGENTS = 20_000
MAX_TARGETS = 256
"""The most targets remembered of one agent. For an agent with more, no target counts as new."""
MAX_WAITING = 200_000
"""The most (agent, target) pairs that wait for their first use."""
_EVIDENCE = 50
_REFUSED = frozenset({"request.refused", "credential.refused"})
_DENIED = _REFUSED | {"action.denied", "action.by_another"}
_USED = frozenset({"credential.issued", "action.allowed"})
_CEILING_SET = frozenset({"agent.registered", "agent.ceiling_set"})


class BeyondUser:
    """An agent requested something that its user may not do, which the user would then do through the agent."""

    def __init__(self, quiet_s: int) -> None:
        """`quiet_s`: the interval of findings about one agent, user and target, in seconds."""
        self._quiet_ms = quiet_s * 1000

    def wants(self, code: str, log_name: str) -> bool:
        return code in _REFUSED

    def observe(self, event: TrailEvent, now_ms: int) -> Iterator[Finding]:
        agent = event.summary.field("agent")
        if event.code not in _REFUSED or agent is None:
            return
        lacking = [reason for reason in event.field("reasons") or () if _is_beyond_entitlements(reason)]
        if not lacking:
            return
        user = str(lacking[0]["side"]).partition(":")[2]
        target = event.summary.field("target") or "unknown"
        text = lacking[0].get("message", "the request is beyond the user")
        yield Finding(
            "beyond_user",
            (agent, user, target, event.summary.time_ms // self._quiet_ms),
            event.summary.time_ms,
            f"agent {agent} asked for what {user}, on whose behalf it acts, may not do: {text}",
            event.summary,
            (event.summary.uid,),
        )

    def due(self, now_ms: int) -> Iterable[Finding]:
        return ()


def _is_beyond_entitlements(reason: Any) -> bool:
    return str(reason.get("side") or "").startswith("entitlements:")


class DenialBurst:
    """A burst of denials of one agent: the agent, or somebody who uses it, probes its permissions."""

    def __init__(self, most: int, within_s: int, quiet_s: int) -> None:
        """`most` denials within `within_s` seconds are a burst; at most one finding in `quiet_s` seconds."""
        self._most = most
        self._within_ms = within_s * 1000
        self._quiet_ms = quiet_s * 1000
        self._by_agent: BoundedDict[str, deque[tuple[int, int, str]]] = BoundedDict(MAX_AGENTS)

    def wants(self, code: str, log_name: str) -> bool:
        return code in _DENIED

    def observe(self, event: TrailEvent, now_ms: int) -> Iterator[Finding]:
        agent, at_ms = event.summary.field("agent"), event.summary.time_ms
        if event.code not in _DENIED or agent is None:
            return
        denials = self._by_agent.get(agent)
        if denials is None:
            denials = deque(maxlen=self._most)
        self._by_agent[agent] = denials  # evicts the agent without a denial for longest
        if any(uid == event.summary.uid for _, _, uid in denials):
            return  # the event was published twice; the denial happened once
        denials.append((at_ms, int(event.body.get("count", 1)), event.summary.uid))
        within = [denial for denial in denials if abs(at_ms - denial[0]) < self._within_ms]
        count = sum(number for _, number, _ in within)
        if count < self._most:
            return
        yield Finding(
            "denials",
            (agent, at_ms // self._quiet_ms),
            at_ms,
            f"agent {agent} was denied {count} times within {self._within_ms // 1000} s, the last time: "
            f"{event.body['message']}",
            event.summary,
            tuple(uid for _, _, uid in within)[-_EVIDENCE:],
            fields={"count": count},
        )

    def due(self, now_ms: int) -> Iterable[Finding]:
        return ()


@dataclass(slots=True)
class _TargetHistory:
    since_ms: int
    first_uid: str
    targets: set[str] = field(default_factory=set)


class FirstUse:
    """An agent with a history got its first credential for a target."""

    def __init__(self, known_for_s: int) -> None:
        """`known_for_s`: seconds since its first credential before a target counts as new."""
        self._known_for_ms = known_for_s * 1000
        self._by_agent: BoundedDict[str, _TargetHistory] = BoundedDict(MAX_AGENTS)

    def wants(self, code: str, log_name: str) -> bool:
        return code == "credential.issued"

    def observe(self, event: TrailEvent, now_ms: int) -> Iterator[Finding]:
        agent, target = event.summary.field("agent"), event.summary.field("target")
        if event.code != "credential.issued" or agent is None or target is None:
            return
        at_ms = event.summary.time_ms
        history = self._by_agent.get(agent)
        if history is None:
            history = _TargetHistory(at_ms, event.summary.uid)
        self._by_agent[agent] = history
        if target in history.targets or len(history.targets) >= MAX_TARGETS:
            return
        history.targets.add(target)
        days = (at_ms - history.since_ms) // 86_400_000
        if at_ms - history.since_ms < self._known_for_ms:
            return
        yield Finding(
            "first_use",
            (agent, target),
            at_ms,
            f"agent {agent} got a credential for target {target} for the first time, after {days} days without",
            event.summary,
            (history.first_uid, event.summary.uid),
        )

    def due(self, now_ms: int) -> Iterable[Finding]:
        return ()


@dataclass(slots=True)
class _Ceiling:
    status: str
    unused: dict[str, EventSummary] = field(default_factory=dict)
    """By target: the event of the record that put it into the ceiling."""
    used: set[str] = field(default_factory=set)


class UnusedCeiling:
    """A target in an agent's ceiling was never used within `after_s`: it only serves whoever takes over the agent."""

    def __init__(self, after_s: int) -> None:
        self._after_ms = after_s * 1000
        self._by_agent: BoundedDict[str, _Ceiling] = BoundedDict(MAX_AGENTS)
        self._waiting: list[tuple[int, str, str]] = []

    def wants(self, code: str, log_name: str) -> bool:
        return code in _USED or log_name == "agent"

    def observe(self, event: TrailEvent, now_ms: int) -> Iterator[Finding]:
        agent = event.summary.field("agent")
        if agent is not None and event.code in _USED:
            self._use(agent, event.summary.field("target"))
        elif agent is not None and event.summary.log_name == "agent":
            self._record(agent, event)
        yield from ()

    def _use(self, agent: str, target: str | None) -> None:
        ceiling = self._by_agent.get(agent)
        if ceiling is not None and target in ceiling.unused:
            del ceiling.unused[target]
            ceiling.used.add(target)

    def _record(self, agent: str, event: TrailEvent) -> None:
        data = event.body.get("entity_result", {}).get("data")
        if data is None or event.body.get("status") != "Success":
            return
        ceiling = self._by_agent.get(agent)
        if ceiling is None and event.code not in _CEILING_SET:
            return  # its ceiling is older than this trail
        if ceiling is None:
            ceiling = self._by_agent[agent] = _Ceiling(data["status"])
        ceiling.status = data["status"]
        allowed = sorted({one["target"] for one in data["ceiling"]})[:MAX_TARGETS]
        ceiling.unused = {target: summary for target, summary in ceiling.unused.items() if target in allowed}
        ceiling.used.intersection_update(allowed)
        for target in allowed:
            if target not in ceiling.unused and target not in ceiling.used:
                ceiling.unused[target] = event.summary
                heapq.heappush(self._waiting, (event.summary.time_ms + self._after_ms, agent, target))
        if len(self._waiting) > MAX_WAITING:
            self._compact()

    def _compact(self) -> None:
        entries = [
            (summary.time_ms + self._after_ms, agent, target)
            for agent, ceiling in self._by_agent.items()
            for target, summary in ceiling.unused.items()
        ]
        self._waiting = heapq.nsmallest(MAX_WAITING // 2, entries)  # sorted, and so a heap

    def due(self, now_ms: int) -> Iterator[Finding]:
        deferred: list[tuple[int, str, str]] = []
        while self._waiting and self._waiting[0][0] <= now_ms:
            due_ms, agent, target = heapq.heappop(self._waiting)
            ceiling = self._by_agent.get(agent)
            summary = ceiling.unused.get(target) if ceiling is not None else None
            if ceiling is None or summary is None or summary.time_ms + self._after_ms != due_ms:
                continue
            if ceiling.status == "active":
                del ceiling.unused[target]
                ceiling.used.add(target)  # reported once
                yield self._finding(agent, target, summary, due_ms)
            elif ceiling.status != "decommissioned":
                deferred.append((due_ms, agent, target))
        for one in deferred:
            heapq.heappush(self._waiting, one)

    def _finding(self, agent: str, target: str, summary: EventSummary, due_ms: int) -> Finding:
        return Finding(
            "ceiling_unused",
            (agent, target, summary.time_ms),
            due_ms,
            f"agent {agent} may hold target {target} and did not use it once in {self._after_ms // 86_400_000} days: "
            "take it out of its ceiling",
            summary,
            (summary.uid,),
            standing=True,
            fields={"target": target},
        )
