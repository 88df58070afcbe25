"""Previews of a change: computes what a new task will allow, and asks the revoker which leases a change would end.

A preview informs only: policy, issuer and revoker decide for themselves.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ringfence.client.admin.unknown_subjects import unknown_subject
from ringfence.client.errors import ApiError
from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.base.text import did_you_mean
from ringfence.messages.base import Permission, Scope
from ringfence.messages.registry import TargetState, TaskTerms
from ringfence.model.records.directory import Directory
from ringfence.model.scope.rule import Excess, are_in_force, effective, exceeding, limits_of
from ringfence.model.scope.scope import missing, validate_scope
from ringfence.model.unknown_fields import is_understood, names_of, unknown_fields


@dataclass(frozen=True, slots=True)
class Loss:
    """A condition under which leases of one agent, sponsor, target or user end."""

    agent: str | None = None
    sponsor: str | None = None
    target: str | None = None
    user: str | None = None
    fits: Scope = ()
    """A lease whose scope is within this one continues. If it is empty, none does."""
    selectors: frozenset[str] | None = None
    """If given, only leases of instances that enrolled by one of these selectors end, whatever their scope."""


@dataclass(frozen=True, slots=True)
class EndingLeases:
    """The leases that a change would end, as far as the revoker can tell."""

    ids: tuple[str, ...] = ()
    more: bool = False
    """Whether the revoker listed only some leases, so that more may end."""
    gap: str | None = None
    """Why the leases are unknown; `ids` is empty then."""

    def describe(self) -> str:
        """Return a text for people: `2: ID, ID`, or why the leases are unknown."""
        if self.gap is not None:
            return f"not known: {self.gap}"
        if not self.ids and not self.more:
            return "none"
        listed = ", ".join(self.ids[:_SHOWN]) + (", ..." if len(self.ids) > _SHOWN else "")
        return f"{'at least ' if self.more else ''}{len(self.ids)}{': ' if listed else ''}{listed}"

    def as_json(self) -> dict[str, Any]:
        is_known = self.gap is None
        return {
            "count": len(self.ids) if is_known else None,
            "ids": self.ids,
            "more": self.more,
            "gap": self.gap,
        }


_SHOWN = 5


async def ending_leases(api: ReadApi, losses: Iterable[Loss]) -> EndingLeases:
    """Return the leases that would end now. Leases issued later are not included."""
    ids: dict[str, None] = {}
    more = False
    for loss in losses:
        try:
            page = await api.leases(
                agent=loss.agent, sponsor=loss.sponsor, target=loss.target, user=loss.user
            )
        except ApiError as error:
            return EndingLeases(gap=str(error))
        ids |= dict.fromkeys(lease["id"] for lease in page["leases"] if _ends(lease, loss))
        more = more or bool(page["more"])
    return EndingLeases(tuple(ids), more)


def _ends(lease: Mapping[str, Any], loss: Loss) -> bool:
    if lease["status"] == "ending":
        return False  # it is ending already
    if loss.selectors is not None:
        return (lease.get("instance") or {}).get("selector") in loss.selectors
    # Not strict: JSON has no tuples.
    scope = tuple(Permission.model_validate(one, strict=False) for one in lease["scope"])
    return not loss.fits or bool(missing(scope, loss.fits))


@dataclass(frozen=True, slots=True)
class Preview:
    """The scope that task, ceiling and entitlements allow together, and what each limit removes from the task's."""

    effective: Scope
    cuts: tuple[Excess, ...]
    """By limit: the permissions, or parts of them, that the task names and this limit does not contain."""
    warnings: tuple[str, ...]
    """Other reasons for which requests would be denied, as the records are now."""


def preview(
    directory: Directory, terms: TaskTerms, on_behalf_of: str, *, now_s: float, entitlements_max_age_s: int
) -> Preview:
    """Compare a task that is not assigned yet with the verified records.

    Raises InvalidCallError if agent or user are unknown, ScopeError if the scope is malformed, ChainError if
    a record does not verify.
    """
    validate_scope(terms.scope)
    agent, user = directory.agent(terms.agent_id), directory.user(on_behalf_of)
    if agent is None:
        remedy = "register it with: ringfence agent register"
        raise unknown_subject(directory, "agent", terms.agent_id, remedy)
    if user is None:
        remedy = "an operator adds one with: ringfence user add"
        raise unknown_subject(directory, "user", on_behalf_of, remedy)
    entitlements = user.state.entitlements
    in_force = are_in_force(entitlements, now_s, entitlements_max_age_s)
    warnings = []
    if agent.state.status != "active":
        warnings.append(f"agent {terms.agent_id} is {agent.state.status}")
    if user.state.status != "active":
        warnings.append(f"user {on_behalf_of} is {user.state.status}")
    if not in_force:
        warnings.append(
            f"the entitlements of {on_behalf_of} are too old, or have a field that is not known here, and count for "
            "nothing until they are set anew"
        )
    if terms.not_after <= now_s:
        warnings.append("the task ends in the past")
    warnings += unknown_names(directory, terms.scope)
    sides = limits_of(
        terms.scope,
        [(terms.agent_id, agent.state.ceiling)],
        on_behalf_of,
        entitlements.scope if in_force else (),
    )
    return Preview(effective(sides), exceeding(terms.scope, sides), tuple(warnings))


def unknown_names(directory: Directory, scope: Scope) -> list[str]:
    """A sentence for each target and verb of a scope that does not exist now, with the nearest name that does."""
    problems = []
    for permission in scope:
        target = directory.target(permission.target)
        if target is None or target.state.status != "active":
            target_ids = [
                entry.state.target_id
                for entry in directory.entries("target")
                if isinstance(entry.state, TargetState) and entry.state.status == "active"
            ]
            problems.append(
                f"there is no target {permission.target}{did_you_mean(permission.target, target_ids)}"
                if target is None
                else f"target {permission.target} was removed"
            )
            continue
        verbs = {floor.verb for floor in target.state.verbs}
        problems += [
            f"the floor of {floor.verb} at {permission.target} has a field that is not known here: "
            f"{names_of(unknown_fields(floor))}; nobody is given that verb"
            for floor in target.state.verbs
            if floor.verb in permission.verbs and not is_understood(floor)
        ]
        unknown = [verb for verb in permission.verbs if verb not in verbs]
        if unknown:
            problems.append(
                f"{permission.target} has no verb {', '.join(unknown)}; it has {', '.join(sorted(verbs))}"
                + (did_you_mean(unknown[0], verbs) if len(unknown) == 1 else "")
            )
    return list(dict.fromkeys(problems))
