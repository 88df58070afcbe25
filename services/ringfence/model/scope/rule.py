"""The rule that nothing may break: what a credential allows is within *every* side, and it ends no later than
the task.

The sides are the task, the ceiling of every agent in the `act` chain, and the entitlements of the user on
whose behalf the task runs. Policy and issuer both ask this code, each from records that it verified itself. A
wish that reaches beyond one side is denied whole; nothing here narrows a wish to what would fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.permission import Permission, Scope
from ringfence.messages.registry import Entitlements
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.scope import intersect, missing

NO_LIMIT: Final = "none"
"""Stands as the lacking side where no side was given at all."""
MIN_LIFE_MS: Final = 1000


class DeadlineError(RingfenceError):
    """No whole second is left before the deadline; the message says whether TTL or task is to blame."""

    code = "deadline_too_close"


@dataclass(frozen=True, slots=True)
class Limit:
    """One of the scopes that a credential must be within, under the name by which refusals call it.

    The scopes come from verified records. Entitlements past their age count for nothing: give them as an
    empty scope, do not leave the side out.
    """

    name: str
    scope: Scope

    @classmethod
    def task(cls, scope: Scope) -> Limit:
        """The scope that the user assigned."""
        return cls("task", scope)

    @classmethod
    def ceiling(cls, agent_id: str, scope: Scope) -> Limit:
        """The most that one agent may ever hold; one side for every agent in the `act` chain."""
        return cls(f"ceiling:{agent_id}", scope)

    @classmethod
    def entitlements(cls, user_id: str, scope: Scope) -> Limit:
        """What the user whom the task is on behalf of may do."""
        return cls(f"entitlements:{user_id}", scope)


def are_in_force(entitlements: Entitlements, now_s: float, max_age_s: int) -> bool:
    """Whether entitlements count. Past their age they do not, nor with an unknown field, which may limit them. Those of
    a permission are for `missing` to find.
    """
    return entitlements.as_of + max_age_s > now_s and not entitlements.model_extra


@dataclass(frozen=True, slots=True)
class Excess:
    """A permission, or the part of one, that a side does not hold."""

    permission: Permission
    limit: str


def limits_of(
    task: Scope, ceilings: Iterable[tuple[str, Scope]], user_id: str, entitlements: Scope
) -> tuple[Limit, ...]:
    """All sides of one wish, so that no caller forgets one.

    `ceilings`: the id and ceiling of every agent in the `act` chain. If there is none, a ceiling that holds
    nothing stands in.
    """
    held = tuple(Limit.ceiling(agent_id, scope) for agent_id, scope in ceilings)
    return (Limit.task(task), *(held or (Limit("ceiling", ()),)), Limit.entitlements(user_id, entitlements))


def exceeding(wanted: Scope, limits: Iterable[Limit]) -> tuple[Excess, ...]:
    """Everything that stands against the wish: by side, in the order given, then in the order of `wanted`.

    Empty means that the wish is within every side; anything else denies it whole. Without sides everything is
    lacking. Raises `ScopeError` if nothing is wanted: a credential without permissions would mean whatever
    its reader thinks.
    """
    if not wanted:
        raise ScopeError("the request is empty: name at least one permission")
    given = tuple(limits)
    if not given:
        return tuple(Excess(permission, NO_LIMIT) for permission in wanted)
    found: list[Excess] = []
    for limit in given:
        found += [Excess(permission, limit.name) for permission in missing(wanted, limit.scope)]
    return tuple(found)


def effective(limits: Iterable[Limit]) -> Scope:
    """What all sides allow together (see `intersect`), for showing it before anything runs.

    Nothing without sides. Never used to decide: a wish is compared with each side by `exceeding`.
    """
    given = tuple(limits)
    if not given:
        return ()
    scope = given[0].scope
    # The first also meets itself, so that one side alone is checked and gets the same form as several.
    for limit in given:
        scope = intersect(scope, limit.scope)
    return scope


def deadline_ms(appended_ms: int, ttl_s: int, task_end_ms: int) -> int:
    """When a lease ends, in ms: the decision's append time plus the TTL, never beyond the task's end.

    A whole second, rounded down, so that tokens (`exp`, in seconds), Redis and the target's own expiry agree.
    It depends on recorded values only and is the same on every redelivery. Raises `DeadlineError` if less
    than one second would be left after the append time.
    """
    end_ms = min(appended_ms + ttl_s * 1000, task_end_ms)
    deadline = end_ms - end_ms % 1000
    if deadline - appended_ms < MIN_LIFE_MS:
        if task_end_ms - appended_ms < ttl_s * 1000:
            raise DeadlineError("the task ends within a second or has ended: assign a new task")
        raise DeadlineError(f"a TTL of {ttl_s} s leaves less than a whole second: ask for at least 2 s")
    return deadline
