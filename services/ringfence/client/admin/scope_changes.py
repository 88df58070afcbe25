"""Adds permissions to a scope and removes them: commands replace entitlements and ceilings as a whole."""

from __future__ import annotations

from collections.abc import Iterable

from ringfence.client.errors import InvalidCallError
from ringfence.messages.base import Permission, Scope
from ringfence.model.scope.glob_intersection import meet
from ringfence.model.scope.globs import within
from ringfence.model.scope.scope import missing, validate_scope


def with_added(held: Scope, more: Iterable[Permission]) -> Scope:
    """The union of `held` and `more`, without permissions that the other side contains.

    Raises ScopeError if the result is too large.
    """
    new = tuple(permission for permission in more if missing((permission,), held))
    scope = (*(permission for permission in held if missing((permission,), new)), *new)
    validate_scope(scope, allow_empty=True)
    return scope


def with_removed(held: Scope, less: Iterable[Permission]) -> Scope:
    """`held` without `less`, verb by verb and resource by resource.

    For each named verb, every held resource within a named one is removed. A held resource that only overlaps a named
    one stops the whole change: globs have no exceptions, so the remainder cannot be written down.

    Raises InvalidCallError if something is not held, naming what is; or is held only as part of something wider.
    """
    removed: set[tuple[str, str, str]] = set()
    for permission in less:
        for verb in permission.verbs:
            for resource in permission.resources:
                removed |= _covered(held, permission.target, verb, resource)
    return tuple(part for permission in held for part in _without(permission, removed))


def _covered(held: Scope, target: str, verb: str, resource: str) -> set[tuple[str, str, str]]:
    covered = {
        (target, verb, one)
        for permission in held
        if permission.target == target and verb in permission.verbs
        for one in permission.resources
        if meet(one, resource)
    }
    wider = sorted(one for _, _, one in covered if not within(one, (resource,)))
    text = f"{target}:{verb}:{resource}"
    if wider:
        raise InvalidCallError(
            f"{text} is only a part of what is held, {target}:{verb}:{wider[0]}, and globs know no exception: remove "
            "that, and add what is to stay"
        )
    if not covered:
        raise InvalidCallError(
            f"{text} is not held, so it cannot be removed; held is: {_describe_held(held, target)}"
        )
    return covered


def _without(permission: Permission, removed: set[tuple[str, str, str]]) -> Iterable[Permission]:
    """The remainder of a permission: one for each group of verbs that keep the same resources."""
    verbs_by_resources: dict[tuple[str, ...], list[str]] = {}
    for verb in permission.verbs:
        resources = tuple(
            one for one in permission.resources if (permission.target, verb, one) not in removed
        )
        if resources:
            verbs_by_resources.setdefault(resources, []).append(verb)
    return [
        permission.model_copy(update={"verbs": tuple(verbs), "resources": resources})
        for resources, verbs in verbs_by_resources.items()
    ]


def _describe_held(held: Scope, target: str) -> str:
    """Describe what is held at a target, or everything held if that is nothing."""
    listed = [one for one in held if one.target == target] or held
    return (
        "; ".join(f"{one.target}:{','.join(one.verbs)}:{','.join(one.resources)}" for one in listed)
        or "nothing"
    )
