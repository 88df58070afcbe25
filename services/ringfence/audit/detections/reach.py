"""Rules about how far agents reach: beyond their user, again and again, for the first time, or never. Pure.

Each keeps so much and no more; what is forgotten is not judged.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from ringfence.audit.detections.rule import About, Finding, Seen
from ringfence.audit.memory import Recent

AGENTS = 20_000
TARGETS = 256
"""So many are remembered of one agent; of one that has more, no target is the first."""
MOST_WAITING = 200_000
"""Targets of all agents that may turn out never to be used."""
_EVIDENCE = 50
_REFUSED = frozenset({"request.refused", "credential.refused"})
_DENIED = _REFUSED | {"action.denied", "action.by_another"}
_USED = frozenset({"credential.issued", "action.allowed"})
_CEILING_SET = frozenset({"agent.registered", "agent.ceiling_set"})


class BeyondUser:
    """An agent asks for what the user it acts on behalf of may not do: through it, they would."""

    def __init__(self, quiet_s: int) -> None:
        """`quiet_s`: once in so long for an agent, user and target."""
        self._quiet_ms = quiet_s * 1000

    def wants(self, code: str, log_name: str) -> bool:
        return code in _REFUSED

    def take(self, seen: Seen, now_ms: int) -> Iterator[Finding]:
        agent = seen.about.word("agent")
        if seen.code not in _REFUSED or agent is None:
            return
        lacking = [reason for reason in seen.word("reasons") or () if _is_the_users(reason)]
        if not lacking:
            return
        user = str(lacking[0]["side"]).partition(":")[2]
        target = seen.about.word("target") or "unknown"
        what = lacking[0].get("message", "the request is beyond the user")
        yield Finding(
            "beyond_user",
            (agent, user, target, seen.about.time_ms // self._quiet_ms),
            seen.about.time_ms,
            f"agent {agent} asked for what {user}, on whose behalf it acts, may not do: {what}",
            seen.about,
            (seen.about.uid,),
        )

    def due(self, now_ms: int) -> Iterable[Finding]:
        return ()


def _is_the_users(reason: Any) -> bool:
    return str(reason.get("side") or "").startswith("entitlements:")


class Denials:
    """An agent is denied one thing after the other: it tries what it can get, or somebody does with it."""

    def __init__(self, most: int, within_s: int, quiet_s: int) -> None:
        """`most`: so many within so long are a burst; told once in `quiet_s`."""
        self._most = most
        self._within_ms = within_s * 1000
        self._quiet_ms = quiet_s * 1000
        self._by_agent: Recent[str, deque[tuple[int, int, str]]] = Recent(AGENTS)

    def wants(self, code: str, log_name: str) -> bool:
        return code in _DENIED

    def take(self, seen: Seen, now_ms: int) -> Iterator[Finding]:
        agent, at_ms = seen.about.word("agent"), seen.about.time_ms
        if seen.code not in _DENIED or agent is None:
            return
        lately = self._by_agent.get(agent)
        if lately is None:
            lately = deque(maxlen=self._most)
        self._by_agent.put(agent, lately)  # who is forgotten first is who was denied nothing for longest
        if any(uid == seen.about.uid for _, _, uid in lately):
            return  # it stands there twice, and was denied once
        lately.append((at_ms, int(seen.event.get("count", 1)), seen.about.uid))
        within = [one for one in lately if abs(at_ms - one[0]) < self._within_ms]
        count = sum(one[1] for one in within)
        if count < self._most:
            return
        yield Finding(
            "denials",
            (agent, at_ms // self._quiet_ms),
            at_ms,
            f"agent {agent} was denied {count} times within {self._within_ms // 1000} s, the last time: "
            f"{seen.event['message']}",
            seen.about,
            tuple(one[2] for one in within)[-_EVIDENCE:],
            words={"count": count},
        )

    def due(self, now_ms: int) -> Iterable[Finding]:
        return ()


@dataclass(slots=True)
class _Habits:
    since_ms: int
    first_uid: str
    targets: set[str] = field(default_factory=set)


class FirstUse:
    """An agent that has been at work for a while gets a credential for a target where it never was."""

    def __init__(self, known_for_s: int) -> None:
        """`known_for_s`: how long an agent must have been at work before anything is new of it."""
        self._known_for_ms = known_for_s * 1000
        self._by_agent: Recent[str, _Habits] = Recent(AGENTS)

    def wants(self, code: str, log_name: str) -> bool:
        return code == "credential.issued"

    def take(self, seen: Seen, now_ms: int) -> Iterator[Finding]:
        agent, target = seen.about.word("agent"), seen.about.word("target")
        if seen.code != "credential.issued" or agent is None or target is None:
            return
        at_ms = seen.about.time_ms
        habits = self._by_agent.get(agent)
        if habits is None:
            habits = _Habits(at_ms, seen.about.uid)
        self._by_agent.put(agent, habits)
        if target in habits.targets or len(habits.targets) >= TARGETS:
            return
        habits.targets.add(target)
        days = (at_ms - habits.since_ms) // 86_400_000
        if at_ms - habits.since_ms < self._known_for_ms:
            return
        yield Finding(
            "first_use",
            (agent, target),
            at_ms,
            f"agent {agent} got a credential for target {target} for the first time, after {days} days without",
            seen.about,
            (habits.first_uid, seen.about.uid),
        )

    def due(self, now_ms: int) -> Iterable[Finding]:
        return ()


@dataclass(slots=True)
class _Ceiling:
    status: str
    unused: dict[str, About] = field(default_factory=dict)
    """By target: the event about the record that allowed it."""
    used: set[str] = field(default_factory=set)


class CeilingUnused:
    """An agent may hold what it never used: nobody would miss it, but whoever takes the agent over."""

    def __init__(self, after_s: int) -> None:
        self._after_ms = after_s * 1000
        self._by_agent: OrderedDict[str, _Ceiling] = OrderedDict()
        self._waiting: list[tuple[int, str, str]] = []

    def wants(self, code: str, log_name: str) -> bool:
        return code in _USED or log_name == "agent"

    def take(self, seen: Seen, now_ms: int) -> Iterator[Finding]:
        agent = seen.about.word("agent")
        if agent is not None and seen.code in _USED:
            self._use(agent, seen.about.word("target"))
        elif agent is not None and seen.about.log_name == "agent":
            self._record(agent, seen)
        yield from ()

    def _use(self, agent: str, target: str | None) -> None:
        held = self._by_agent.get(agent)
        if held is not None and target in held.unused:
            del held.unused[target]
            held.used.add(target)

    def _record(self, agent: str, seen: Seen) -> None:
        data = seen.event.get("entity_result", {}).get("data")
        if data is None or seen.event.get("status") != "Success":
            return
        held = self._by_agent.get(agent)
        if held is None and seen.code not in _CEILING_SET:
            return  # what it may hold, and since when, is from before this trail
        if held is None:
            held = self._by_agent[agent] = _Ceiling(data["status"])
            if len(self._by_agent) > AGENTS:
                self._by_agent.popitem(last=False)
        held.status = data["status"]
        allowed = sorted({one["target"] for one in data["ceiling"]})[:TARGETS]
        held.unused = {target: about for target, about in held.unused.items() if target in allowed}
        held.used.intersection_update(allowed)
        for target in allowed:
            if target not in held.unused and target not in held.used:
                held.unused[target] = seen.about
                heapq.heappush(self._waiting, (seen.about.time_ms + self._after_ms, agent, target))
        if len(self._waiting) > MOST_WAITING:
            self._forget_what_was_used()

    def _forget_what_was_used(self) -> None:
        every = [
            (about.time_ms + self._after_ms, agent, target)
            for agent, held in self._by_agent.items()
            for target, about in held.unused.items()
        ]
        self._waiting = heapq.nsmallest(MOST_WAITING // 2, every)  # sorted, and so a heap

    def due(self, now_ms: int) -> Iterator[Finding]:
        again: list[tuple[int, str, str]] = []
        while self._waiting and self._waiting[0][0] <= now_ms:
            due_ms, agent, target = heapq.heappop(self._waiting)
            held = self._by_agent.get(agent)
            about = held.unused.get(target) if held is not None else None
            if held is None or about is None or about.time_ms + self._after_ms != due_ms:
                continue
            if held.status == "active":
                del held.unused[target]
                held.used.add(target)  # it is told, and not looked at again
                yield self._found(agent, target, about, due_ms)
            elif held.status != "decommissioned":
                again.append((due_ms, agent, target))
        for one in again:
            heapq.heappush(self._waiting, one)

    def _found(self, agent: str, target: str, about: About, due_ms: int) -> Finding:
        return Finding(
            "ceiling_unused",
            (agent, target, about.time_ms),
            due_ms,
            f"agent {agent} may hold target {target} and did not use it once in {self._after_ms // 86_400_000} days: "
            "take it out of its ceiling",
            about,
            (about.uid,),
            standing=True,
            words={"target": target},
        )
