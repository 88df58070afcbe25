"""Whether the signer of an order had a say in it when it was given, from the records of people, agents and tasks alone.

Said once more here, and not by the code that revokers and gateways ask. They judge an order when they come to it, by
tables that may be as old as their grace: whoever was entitled at any moment from that much before the order until it
was carried out had a say.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from ringfence.kernel.base.ids import derived_id
from ringfence.messages.lease import EndKind, Lease
from ringfence.messages.registry import AgentState, AnyState, TargetState, TaskState, UserState
from ringfence.model.identity.spiffe_ids import subject_of
from ringfence.model.lifecycle.holds import hold_of
from ringfence.model.scope.scope import missing
from tests.chaos.history import Order, State

_S = TypeVar("_S", bound=AnyState)


class Offices:
    """Who held which office when."""

    def __init__(self, states: Sequence[State], grace_ms: int) -> None:
        self._grace_ms = grace_ms
        self._states = sorted(states, key=lambda state: state.at_ms)
        self._by_subject: dict[tuple[Any, str], list[State]] = defaultdict(list)
        for state in self._states:
            self._by_subject[type(state.state), _id_of(state.state)].append(state)

    def objection(self, order: Order, lease: Lease | None, until_ms: int) -> str | None:
        """Why the signer had no say in what the order asks for, or in the end of this lease by it; None where they had.

        `until_ms`: when it was carried out.
        """
        claims = order.claims
        if claims.lease_id is not None and (lease is None or lease.lease_id != claims.lease_id):
            return "it names another lease"
        if agent_id := subject_of(claims.aud, claims.iss, "agent"):
            if claims.kind == "release" and lease is not None and lease.agent_id == agent_id:
                return None
            return f"agent {agent_id} gives back its own leases only"
        if user_id := subject_of(claims.aud, claims.iss, "user"):
            if claims.kind != "revocation":
                return f"user {user_id} may not ask for {claims.kind}"
            since_ms = order.at.appended_at_ms - self._grace_ms
            if self._user_has_a_say(user_id, order, lease, since_ms, until_ms):
                return None
            return f"user {user_id} had no say in it"
        if subject_of(claims.aud, claims.iss, "service") is None:
            return f"{claims.iss} is nobody who orders anything"
        for state in self._states:
            if state.at_ms <= order.at.appended_at_ms and self._follows(order, state, lease, until_ms):
                return None
        return f"no record says that, by which {claims.iss} could have ordered it"

    def held(self, lease: Lease, at_ms: int) -> str | None:
        """What a lease rests on that a report of a compromised key held since the grace before; None: nothing."""
        subjects: list[tuple[type[Any], str]] = [
            (AgentState, lease.agent_id), (TaskState, lease.task_id), (TargetState, lease.target_id),
            (UserState, lease.on_behalf_of), (UserState, lease.sponsor),
        ]  # fmt: skip
        for kind, id in subjects:
            was = self._during(kind, id, at_ms - self._grace_ms, at_ms)
            if was and all(hold_of(one) is not None for one in was):
                return f"{kind.__name__} {id}"
        return None

    # --- people ---

    def _user_has_a_say(
        self, user_id: str, order: Order, lease: Lease | None, since_ms: int, until_ms: int
    ) -> bool:
        was = [one for one in self._during(UserState, user_id, since_ms, until_ms) if one.status == "active"]
        if not was:
            return False
        if any("operator" in one.roles for one in was):
            return True
        selector = order.claims.selector
        if selector is None:
            if lease is None:
                return False
            pairs = [(lease.agent_id, lease.task_id)]
            pairs += [(one.agent_id, one.task_id) for one in lease.delegators or ()]
            return user_id == lease.on_behalf_of or any(
                self._answers_for(user_id, agent_id, task_id, since_ms, until_ms)
                for agent_id, task_id in pairs
            )
        return user_id in (selector.sponsor, selector.user_id) or self._answers_for(
            user_id, selector.agent_id, selector.task_id, since_ms, until_ms
        )

    def _answers_for(
        self, user_id: str, agent_id: str | None, task_id: str | None, since_ms: int, until_ms: int
    ) -> bool:
        tasks = self._during(TaskState, task_id or "", since_ms, until_ms)
        if any(user_id in (task.assigned_by, task.on_behalf_of) for task in tasks):
            return True
        agents = {agent_id} if agent_id else {task.agent_id for task in tasks}
        return any(
            state.sponsor == user_id
            for agent in agents
            for state in self._during(AgentState, agent, since_ms, until_ms)
        )

    # --- services: each kind of end, and the record that it follows from ---

    def _follows(self, order: Order, state: State, lease: Lease | None, until_ms: int) -> bool:
        """Whether an order of a service follows from a record: by its name, and by what the record says."""
        claims = order.claims
        what = claims.lease_id or (
            claims.selector.model_dump_json(exclude_defaults=True) if claims.selector else ""
        )
        if claims.jti != derived_id("revocation.request", state.subject, state.revision, what):
            return False
        says = _SAYS.get(claims.kind)
        if says is None or not says(state.state, lease):
            return False
        if claims.selector is None:
            return lease is not None and _id_of(state.state) in _names(lease)
        if _id_of(state.state) in claims.selector.model_dump(exclude_defaults=True).values():
            return True
        # An agent without a sponsor ends by the record of who was it.
        agents = self._during(
            AgentState, claims.selector.agent_id or "", state.at_ms - self._grace_ms, until_ms
        )
        return claims.kind in _OF_SPONSORS and any(one.sponsor == _id_of(state.state) for one in agents)

    # --- who was what ---

    def _during(self, kind: type[_S], id: str, since_ms: int, until_ms: int) -> list[_S]:
        """What a subject was at any moment of these: as it was when they began, and all that it became."""
        found: list[_S] = []
        for one in self._by_subject[kind, id]:
            if one.at_ms > until_ms:
                break
            if one.at_ms <= since_ms:
                found.clear()
            if isinstance(one.state, kind):
                found.append(one.state)
        return found


_OF_SPONSORS = ("user_disabled", "agent_orphaned")


def _is_narrowed(state: AnyState, lease: Lease | None) -> bool:
    if lease is None:
        return False
    match state:
        case AgentState():
            return lease.instance is not None or bool(missing(lease.scope, state.ceiling))
        case UserState():
            return bool(missing(lease.scope, state.entitlements.scope))
    return False


_SAYS: dict[EndKind, Callable[[AnyState, Lease | None], bool]] = {
    "task_ended": lambda state, _: isinstance(state, TaskState) and state.status == "ended",
    "agent_suspended": lambda state, _: isinstance(state, AgentState) and state.status == "suspended",
    "agent_decommissioned": lambda state, _: (
        isinstance(state, AgentState) and state.status == "decommissioned"
    ),
    "user_disabled": lambda state, _: isinstance(state, UserState) and state.status == "disabled",
    "agent_orphaned": lambda state, _: isinstance(state, UserState) and "sponsor" not in state.roles,
    "target_removed": lambda state, _: isinstance(state, TargetState) and state.status != "active",
    "scope_narrowed": _is_narrowed,
    "key_compromised": lambda state, _: (
        hold_of(state) is not None or (isinstance(state, AgentState) and bool(state.compromised))
    ),
}


def _names(lease: Lease) -> Iterator[str]:
    yield from (lease.agent_id, lease.task_id, lease.target_id, lease.on_behalf_of, lease.sponsor)
    for one in lease.delegators or ():
        yield from (one.agent_id, one.task_id, one.sponsor)


def _id_of(state: AnyState) -> str:
    match state:
        case AgentState():
            return state.agent_id
        case UserState():
            return state.user_id
        case TaskState():
            return state.task_id
        case TargetState():
            return state.target_id
