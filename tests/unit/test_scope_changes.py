"""What `--add` and `--remove` make of a scope."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.client.admin.scope_changes import with_added, with_removed
from ringfence.client.errors import InvalidCallError
from ringfence.messages.base import Permission, Scope
from ringfence.model.scope.scope import intersect, missing


def scope(*texts: str) -> Scope:
    return tuple(
        Permission(target=target, verbs=tuple(verbs.split(",")), resources=tuple(resources.split(",")))
        for target, verbs, resources in (text.split(":") for text in texts)
    )


@pytest.mark.parametrize(
    ("held", "less", "left"),
    [
        (("hub:read,write:a,b",), ("hub:write:a",), ("hub:read:a,b", "hub:write:b")),
        (("hub:read,write:a",), ("hub:read,write:a",), ()),
        (("hub:read:env/a", "hub:read:env/b", "hub:read:lab"), ("hub:read:env/*",), ("hub:read:lab",)),
        (("hub:read:a", "hub:read,write:a"), ("hub:read:a",), ("hub:write:a",)),
        (("hub:read:a", "lab:read:a"), ("hub:read:a",), ("lab:read:a",)),
        (("hub:read:**",), ("hub:read:**",), ()),
    ],
)
def test_removal_subtracts_verbs_and_resources(
    held: tuple[str, ...], less: tuple[str, ...], left: tuple[str, ...]
) -> None:
    assert with_removed(scope(*held), scope(*less)) == scope(*left)


@pytest.mark.parametrize(
    ("less", "says"),
    [
        (
            "hub:write:env/**",
            "hub:write:env/** is not held, so it cannot be removed; held is: hub:read:env/**",
        ),
        ("hub:read,write:env/**", "hub:write:env/** is not held"),
        ("hub:read:lab", "held is: hub:read:env/**"),
        ("lab:read:env/**", "held is: hub:read:env/**"),
        ("hub:read:env/a", "only a part of what is held, hub:read:env/**, and globs know no exception"),
        ("hub:read:*/a", "only a part of what is held, hub:read:env/**"),
    ],
)
def test_removal_of_a_permission_not_held_is_refused(less: str, says: str) -> None:
    with pytest.raises(InvalidCallError) as refused:
        with_removed(scope("hub:read:env/**"), scope(less))
    assert says in str(refused.value)
    with pytest.raises(InvalidCallError, match="held is: nothing"):
        with_removed((), scope(less))


def test_added_permission_is_merged_with_the_held_ones() -> None:
    held = scope("hub:read:env/a", "hub:read:lab")
    assert with_added(held, scope("hub:read:env/a")) == held
    assert with_added(held, scope("hub:write:env/a")) == (*held, *scope("hub:write:env/a"))
    assert with_added(held, scope("hub:read:env/**")) == scope("hub:read:lab", "hub:read:env/**")
    # What is held in part is added as it was written.
    assert with_added(held, scope("hub:read,write:env/a")) == scope("hub:read:lab", "hub:read,write:env/a")


_PART = st.builds(
    lambda target, verbs, resources: Permission(
        target=target, verbs=tuple(verbs), resources=tuple(resources)
    ),
    st.sampled_from(["hub", "lab"]),
    st.lists(st.sampled_from(["read", "write"]), min_size=1, unique=True),
    st.lists(st.sampled_from(["a", "a/b", "a/*", "a/**", "*/b", "**"]), min_size=1, max_size=3, unique=True),
)
_SCOPE = st.lists(_PART, max_size=3).map(tuple)


@given(held=_SCOPE, more=_SCOPE, less=_SCOPE)
def test_additions_and_removals_are_exact(held: Scope, more: Scope, less: Scope) -> None:
    both = with_added(held, more)
    assert not missing(held, both)
    assert not missing(more, both)
    assert not missing(both, (*held, *more))
    try:
        left = with_removed(held, less)
    except InvalidCallError:
        return
    assert not intersect(left, less)
    assert not missing(left, held)
    assert not missing(held, (*left, *less))
