"""Inventory rows of agents, joined from what is known and summed, and the detection of keys that two processes share.

Rows and sums are pure. `SharedKeyDetector` examines incoming requests, and publishes each case as a finding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import orjson

from ringfence.kernel.crypto.jws import kid_of, parse
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.codes import Code
from ringfence.messages.credential import CredentialRequest, Reason
from ringfence.messages.registry import AgentState, EmbeddedCommand, TaskState, UserState
from ringfence.model.leases.lifecycle import is_short_lived, is_task_bound
from ringfence.model.records.agent_keys import WINDOW_MS, KeyUses
from ringfence.policy.agents.holdings import LeaseGroup, Live
from ringfence.policy.agents.usage import DAY_S, Verb, verbs_of
from ringfence.policy.domain import Case


class SharedKeyDetector:
    """Examines each request once. An agent's requests come to one replica, in order."""

    def __init__(self, runtime: Runtime, uses: KeyUses) -> None:
        self._runtime = runtime
        self._uses = uses

    async def observe(self, case: Case) -> None:
        """Record who signed a request, and publish a finding if somebody else uses the key at the same time."""
        claims, at_ms = case.request.claims, case.source.appended_at_ms
        kid = kid_of(case.request.compact)
        other_mark = self._uses.saw(case.agent_id, kid, claims.process, at_ms)
        if other_mark is None:
            return
        message = (
            f"two processes use the key {kid} of agent {case.agent_id} at once, so that nobody can tell what which "
            "of them did; give each a key of its own, or let instances enrol theirs"
        )
        await self._runtime.event(
            "finding",
            CredentialRequest.typ,
            about=("key_shared", case.agent_id, kid, at_ms // WINDOW_MS),
            reasons=(Reason(code=Code.KEY_SHARED, message=message),),
            source=case.source,
            actor=claims.iss,
            traceparent=case.traceparent,
            agent_id=case.agent_id,
            request_id=case.request_id,
            task_id=claims.task_id,
        )


MAX_TASKS = 20
"""The most running tasks that are listed of an agent; all are counted."""
_SETS_CEILING = ("agent.set-ceiling", "agent.register")

SponsorIs = Literal["live", "disabled", "no_sponsor", "unknown"]
"""`live`: an active user with the role sponsor. Any other value says why the agent is an orphan."""


@dataclass(frozen=True, slots=True)
class AgentFacts:
    """Everything known of one agent at one moment, verified."""

    agent: AgentState
    revision: int
    commands: Sequence[EmbeddedCommand]
    sponsor: UserState | None
    tasks: Sequence[TaskState]
    endings: Sequence[LeaseGroup]
    live: Callable[[], Sequence[Live]]
    """Returns each of these leases. There may be very many."""
    used: AbstractSet[Verb]
    seen: Mapping[str, int]
    """By key: when it was last seen, as far as this process knows."""
    asked_ms: int | None
    """When it requested something it received, by lease records."""
    now_s: int


class InventoryRow(NamedTuple):
    """The values of one agent that are summed, and that it is found by."""

    status: str
    sponsor: str
    sponsor_is: SponsorIs
    targets: tuple[str, ...]
    key_end_s: int | None
    """When the last of its keys ends; None if it has none."""
    leases: int
    standing: int
    tasks: int
    granted: int
    """The number of (target, verb) pairs in its ceiling."""
    unused: int
    """How many of those it did not use in 30 days."""
    seen: bool
    """Whether it was seen in 30 days."""

    @property
    def counts(self) -> bool:
        """Return False for a decommissioned agent: nobody has to be accountable for it any more."""
        return self.status != "decommissioned"

    @property
    def orphan(self) -> bool:
        return self.counts and self.sponsor_is != "live"

    def key_ends_by(self, by_s: float) -> bool:
        """Return whether all its keys end by this time. An agent without a key does not count."""
        return self.counts and self.key_end_s is not None and self.key_end_s <= by_s


def sponsor_is(sponsor: UserState | None) -> SponsorIs:
    """Return the state of the user who is named as an agent's sponsor."""
    if sponsor is None:
        return "unknown"
    if sponsor.status != "active":
        return "disabled"
    return "live" if "sponsor" in sponsor.roles else "no_sponsor"


def inventory_row(facts: AgentFacts) -> InventoryRow:
    agent, granted = facts.agent, verbs_of(facts.agent.ceiling)
    return InventoryRow(
        status=agent.status,
        sponsor=agent.sponsor,
        sponsor_is=sponsor_is(facts.sponsor),
        targets=tuple(sorted({target for target, _ in granted})),
        key_end_s=max(
            (key.not_after for key in agent.keys if key.kid not in agent.compromised), default=None
        ),
        leases=sum(ending.leases for ending in facts.endings),
        standing=sum(ending.leases for ending in _standing(facts)),
        tasks=len(facts.tasks),
        granted=len(granted),
        unused=len(granted - facts.used),
        seen=bool(facts.used) or _last_seen_ms(facts) is not None,
    )


def next_change_s(facts: AgentFacts) -> int:
    """Return when time alone changes an agent's row, at the latest at the end of the day."""
    moments = [
        *(ending.until_s for ending in facts.endings),
        *(task.not_after for task in facts.tasks),
        *(key.not_after for key in facts.agent.keys),
    ]
    midnight_s = (facts.now_s // DAY_S + 1) * DAY_S
    return min(moment for moment in (midnight_s, *moments) if moment > facts.now_s)


def row_of(facts: AgentFacts, targets: AbstractSet[str]) -> dict[str, Any]:
    """Return an agent as `docs/inventory.md` shows it. `targets` are the existing ones among those in its ceiling."""
    agent, line = facts.agent, inventory_row(facts)
    authorised = list(_authorised(facts.commands))
    return {
        "id": agent.agent_id,
        "description": agent.description,
        "status": agent.status,
        "revision": facts.revision,
        "sponsor": agent.sponsor,
        "sponsor_is": line.sponsor_is,
        "orphan": line.orphan,
        "last_seen_ms": _last_seen_ms(facts),
        "running_tasks": line.tasks,
        "tasks": [
            {
                "id": task.task_id,
                "purpose": task.purpose,
                "on_behalf_of": task.on_behalf_of,
                "assigned_by": task.assigned_by,
                "not_after": task.not_after,
            }
            for task in sorted(facts.tasks, key=lambda task: task.not_after)[:MAX_TASKS]
        ],
        "leases": line.leases,
        "leases_until": max((ending.until_s for ending in facts.endings), default=None),
        "standing_leases": _standing_leases(facts),
        "granted": line.granted,
        "unused": line.unused,
        "reach": _reach(facts, targets),
        "ceiling_by": ceiling_command(facts.commands),
        "authorised_by": authorised,
        "keys": [
            {
                "kid": key.kid,
                "not_before": key.not_before,
                "not_after": key.not_after,
                "last_seen_ms": facts.seen.get(key.kid),
                "replaced": key.kid in agent.replaced,
                "compromised": key.kid in agent.compromised,
            }
            for key in agent.keys
        ],
        "keys_end": line.key_end_s,
    }


def totals(lines: Iterable[InventoryRow], now_s: int, keys_by_s: int) -> dict[str, int]:
    """Return the sums over some agents. All but `decommissioned` exclude decommissioned agents.

    `keys_ending`: agents with a valid key, but none that lasts beyond `keys_by_s`. `keys_ended`: agents without a valid
    key.
    """
    sums = dict.fromkeys(
        (
            "agents", "registered", "active", "suspended", "decommissioned", "live_sponsor", "orphans",
            "keys_ending", "keys_ended",
            "running_tasks", "leases", "standing_leases", "granted", "used", "with_unused", "not_seen",
        ),
        0,
    )  # fmt: skip
    for line in lines:
        sums[line.status] += 1
        if not line.counts:
            continue
        sums["agents"] += 1
        sums["live_sponsor" if line.sponsor_is == "live" else "orphans"] += 1
        if line.key_end_s is not None and line.key_end_s <= keys_by_s:
            sums["keys_ended" if line.key_end_s <= now_s else "keys_ending"] += 1
        sums["running_tasks"] += line.tasks
        sums["leases"] += line.leases
        sums["standing_leases"] += line.standing
        sums["granted"] += line.granted
        sums["used"] += line.granted - line.unused
        sums["with_unused"] += line.unused > 0
        sums["not_seen"] += not line.seen
    return sums


def _standing(facts: AgentFacts) -> list[LeaseGroup]:
    ends = {task.task_id: task.not_after for task in facts.tasks}
    return [
        ending
        for ending in facts.endings
        if not ending.short_lived or not is_task_bound(ending.until_s, ends.get(ending.task_id))
    ]


def _standing_leases(facts: AgentFacts) -> list[str]:
    """Return the ids of standing leases. Mostly there are none, and no lease is looked at."""
    standing = {ending[:3] for ending in _standing(facts)}
    if not standing:
        return []
    return [
        lease.lease_id
        for lease in facts.live()
        if (lease.task_id, is_short_lived(lease.since_s, lease.until_s), lease.until_s) in standing
    ]


def _last_seen_ms(facts: AgentFacts) -> int | None:
    return max((*facts.seen.values(), facts.asked_ms or 0), default=0) or None


def _reach(facts: AgentFacts, targets: AbstractSet[str]) -> list[dict[str, Any]]:
    by_target: dict[str, list[str]] = {}
    for target, verb in sorted(verbs_of(facts.agent.ceiling)):
        by_target.setdefault(target, []).append(verb)
    return [
        {
            "target": target,
            "exists": target in targets,
            "verbs": verbs,
            "unused": [verb for verb in verbs if (target, verb) not in facts.used],
        }
        for target, verbs in by_target.items()
    ]


def ceiling_command(commands: Sequence[EmbeddedCommand]) -> dict[str, Any]:
    """Return who gave the last command of an agent's record that set its ceiling, and when: `{command, by, at_ms}`."""
    return next(one for one in _authorised(reversed(commands)) if one["command"] in _SETS_CEILING)


def _authorised(commands: Iterable[EmbeddedCommand]) -> Iterator[dict[str, Any]]:
    """Yield who gave the commands of a record, and when. The record's chain is verified, and so are these."""
    for command in commands:
        jws = parse(command.jws)
        yield {
            "command": jws.header.typ.removeprefix("ringfence.").removesuffix("+jwt"),
            "by": orjson.loads(jws.payload)["iss"],
            "at_ms": command.appended_at_ms,
        }
