"""Scopes: validation, difference and intersection. The grammar of resources is in `globs`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import islice, product
from typing import Final

from ringfence.messages.base import Permission, Scope
from ringfence.model.scope.glob_intersection import meet, without_contained
from ringfence.model.scope.globs import ScopeError, is_glob, parse_glob, quoted, within
from ringfence.model.unknown_fields import describe_unknown, unknown_fields

MAX_PAIRS: Final = 4096
"""The most pairs of verb and resource in one scope, so that comparing it is bounded work."""
_MEET_PAIRS: Final = 16384
"""The most pairs of globs that `intersect` compares. It only informs, so pairs beyond that are left out."""
_TARGET_ID: Final = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_VERB: Final = re.compile(r"[a-z][a-z0-9_.:-]{0,63}")


def validate_scope(scope: Scope, *, allow_empty: bool = False) -> None:
    """Validate every permission of a scope. Raises `ScopeError`, which names the first invalid one.

    `allow_empty` is for ceilings and entitlements, which may allow nothing. Tasks and requests need a permission.
    """
    if not scope and not allow_empty:
        raise ScopeError("the scope is empty: name at least one permission")
    for number, permission in enumerate(scope, start=1):
        where = f"permission {number} (target {quoted(permission.target)})"
        if not _TARGET_ID.fullmatch(permission.target):
            raise ScopeError(
                f"{where}: a target id is 1 to 63 of a-z, 0-9 and '-', and no wildcard: correct it"
            )
        if permission.model_extra:
            raise ScopeError(describe_unknown(unknown_fields(permission), where))
        if not permission.verbs or not permission.resources:
            raise ScopeError(f"{where}: name at least one verb and one resource")
        for verb in permission.verbs:
            if not _VERB.fullmatch(verb):
                raise ScopeError(
                    f"{where}: the verb {quoted(verb)} is not 1 to 64 of a-z, 0-9 and '_.:-' after a letter, "
                    "without wildcards: name each verb as the target declares it"
                )
        for resource in permission.resources:
            try:
                parse_glob(resource)
            except ScopeError as error:
                raise ScopeError(f"{where}: {error.message}") from None
    pairs = sum(len(permission.verbs) * len(permission.resources) for permission in scope)
    if pairs > MAX_PAIRS:
        raise ScopeError(
            f"the scope has {pairs} pairs of verb and resource: at most {MAX_PAIRS}, use wildcards"
        )


def missing(wanted: Scope, allowed: Scope) -> tuple[Permission, ...]:
    """What `wanted` has and `allowed` does not, in the order of `wanted`; empty exactly if `allowed` covers all.

    Of a permission that is covered in part, the result has only the verbs and resources that are not covered. If these
    form a product, that is one permission, otherwise one for each group of verbs with the same resources.

    Raises nothing. A permission outside the grammar, or with an unknown field (which may limit it), is not covered if
    it is wanted, and covers nothing if it is allowed.
    """
    found: list[Permission] = []
    for permission in wanted:
        found += _uncovered_part(permission, allowed)
    return tuple(found)


def _uncovered_part(permission: Permission, allowed: Scope) -> Iterable[Permission]:
    if not _is_plain(permission):
        return (permission,)
    relevant = [other for other in allowed if other.target == permission.target and _is_plain(other)]
    verbs_by_uncovered: dict[tuple[str, ...], list[str]] = {}
    for verb in dict.fromkeys(permission.verbs):
        granted = tuple([other.resources for other in relevant if verb in other.verbs])
        if uncovered := _uncovered(permission.resources, granted if _is_verb(verb) else ()):
            verbs_by_uncovered.setdefault(uncovered, []).append(verb)
    if not verbs_by_uncovered:
        return ()
    return [
        permission.model_copy(update={"verbs": tuple(verbs), "resources": uncovered})
        for uncovered, verbs in verbs_by_uncovered.items()
    ]


@lru_cache(maxsize=4096)
def _uncovered(wanted: tuple[str, ...], granted: tuple[tuple[str, ...], ...]) -> tuple[str, ...]:
    """The globs of `wanted` that are not within the union of all of `granted`."""
    globs = tuple(text for texts in granted for text in texts if is_glob(text))
    return tuple(text for text in dict.fromkeys(wanted) if not (is_glob(text) and within(text, globs)))


def _is_plain(permission: Permission) -> bool:
    """Whether this version knows all fields of the permission, it is not empty, and its target id is valid."""
    return (
        not permission.model_extra
        and bool(permission.verbs and permission.resources)
        and _is_target_id(permission.target)
    )


@lru_cache(maxsize=4096)
def _is_target_id(text: str) -> bool:
    return _TARGET_ID.fullmatch(text) is not None


@lru_cache(maxsize=4096)
def _is_verb(text: str) -> bool:
    return _VERB.fullmatch(text) is not None


def intersect(a: Scope, b: Scope) -> Scope:
    """The permissions that both scopes have, for a preview.

    Every name in the result is in both scopes. The result is the whole intersection, unless two globs overlap in more
    ways than the limits of globs or of this function allow: these are left out. It has one permission for each target
    and set of resources, sorted, without redundant resources.

    Raises nothing. Permissions outside the grammar, or with an unknown field, count for nothing.
    """
    pairs = _MEET_PAIRS
    shared: dict[tuple[str, str], dict[str, None]] = {}
    for one in filter(_is_plain, a):
        for other in filter(_is_plain, b):
            if one.target != other.target:
                continue
            verbs = [verb for verb in one.verbs if verb in other.verbs and _VERB.fullmatch(verb)]
            if not verbs:
                continue
            both = product(filter(is_glob, one.resources), filter(is_glob, other.resources))
            texts = [text for left, right in islice(both, pairs) for text in meet(left, right)]
            pairs = max(0, pairs - len(one.resources) * len(other.resources))
            for verb in verbs:
                shared.setdefault((one.target, verb), {}).update(dict.fromkeys(texts))
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for (target, verb), found in sorted(shared.items()):
        if found:
            groups.setdefault((target, without_contained(tuple(sorted(found)))), []).append(verb)
    return tuple(
        Permission.model_construct(target=target, verbs=tuple(verbs), resources=resources)
        for (target, resources), verbs in sorted(groups.items(), key=lambda group: (group[0][0], group[1]))
    )
