"""The invariant: a credential never allows more than *every* limit allows, and never outlives its task.

The limits are the task's scope, the ceiling of every agent in the `act` chain, and the entitlements of the user on
whose behalf the task runs. Policy and issuer both call this code, each with records that it verified itself. A request
that exceeds one limit is denied as a whole: nothing here narrows a request to what would fit.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from ringfence.kernel.base.errors import RingfenceError
from ringfence.messages.base import Permission, Scope
from ringfence.messages.codes import Code
from ringfence.messages.registry import Entitlements
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.scope import intersect, missing

NO_LIMIT: Final = "none"
"""The name of the exceeded limit if no limit was given at all."""
MIN_LIFE_MS: Final = 1000


class DeadlineError(RingfenceError):
    """Less than a whole second is left before the deadline. The message says whether the TTL or the task is
    the cause.
    """

    code = Code.DEADLINE_TOO_CLOSE


@dataclass(frozen=True, slots=True)
class Limit:
    """A scope that a credential must be within, with the name that refusals use for it.

    The scopes come from verified records. Entitlements that are too old count for nothing: pass them as an empty scope,
    do not leave out the limit.
    """

    name: str
    scope: Scope

    @classmethod
    def task(cls, scope: Scope) -> Limit:
        """The scope that the user assigned."""
        return cls("task", scope)

    @classmethod
    def ceiling(cls, agent_id: str, scope: Scope) -> Limit:
        """The most that one agent may ever hold; one limit for each agent in the `act` chain."""
        return cls(f"ceiling:{agent_id}", scope)

    @classmethod
    def entitlements(cls, user_id: str, scope: Scope) -> Limit:
        """What the user may do on whose behalf the task runs."""
        return cls(f"entitlements:{user_id}", scope)


def are_in_force(entitlements: Entitlements, now_s: float, max_age_s: int) -> bool:
    """Whether entitlements count at `now_s`: they are not older than `max_age_s`, and have no unknown field, which
    might limit them. Unknown fields of a permission are checked by `missing`.
    """
    return entitlements.as_of + max_age_s > now_s and not entitlements.model_extra


@dataclass(frozen=True, slots=True)
class Excess:
    """A permission, or a part of one, that exceeds a limit. `limit` is the name of the limit."""

    permission: Permission
    limit: str


def limits_of(
    task: Scope, ceilings: Iterable[tuple[str, Scope]], user_id: str, entitlements: Scope
) -> tuple[Limit, ...]:
    """All limits of one request, so that no caller forgets one.

    `ceilings`: id and ceiling of every agent in the `act` chain. If there is none, an empty ceiling stands in.
    """
    held = tuple(Limit.ceiling(agent_id, scope) for agent_id, scope in ceilings)
    return (Limit.task(task), *(held or (Limit("ceiling", ()),)), Limit.entitlements(user_id, entitlements))


def exceeding(wanted: Scope, limits: Iterable[Limit]) -> tuple[Excess, ...]:
    """What the request has beyond the limits: by limit in the given order, then in the order of `wanted`.

    Empty means that the request is within every limit; anything else denies it as a whole. Without any limit,
    everything exceeds. Raises `ScopeError` if `wanted` is empty: readers could take a credential without permissions
    for anything.
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
    """The intersection of all limits (see `intersect`), for a preview. Empty without limits.

    Never use it to decide: `exceeding` compares a request with each limit.
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
    """The end of a lease in ms: the decision's append time plus the TTL, at most the end of the task.

    Rounded down to a whole second, so that tokens (`exp` in seconds), Redis and the target agree. It depends on
    recorded values only, and is the same on every redelivery. Raises `DeadlineError` if less than one second is left
    after the append time.
    """
    end_ms = min(appended_ms + ttl_s * 1000, task_end_ms)
    deadline = end_ms - end_ms % 1000
    if deadline - appended_ms < MIN_LIFE_MS:
        if task_end_ms - appended_ms < ttl_s * 1000:
            raise DeadlineError("the task ends within a second or has ended: assign a new task")
        raise DeadlineError(f"a TTL of {ttl_s} s leaves less than a whole second: ask for at least 2 s")
    return deadline
