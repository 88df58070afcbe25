"""Who may stand for which approval, so that as much as can be is met and nobody counts twice."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.messages.credential import RequiredClass
from ringfence.messages.registry import VerbFloor
from ringfence.model.approvals import may_approve, required_classes, unmet
from ringfence.model.directory import Directory
from ringfence.model.lifecycle import subject_key
from ringfence.model.requests import Facts, find_ground
from tests.ledger import Ledger, permission

ROLES = {
    "sam": ("sponsor", "operator"), "maria": ("operator",), "petra": ("sponsor",), "olga": ("operator",),
    "otto": ("operator", "sponsor"), "oscar": ("operator",), "uma": ("auditor",), "gone": ("operator", "sponsor"),
}  # fmt: skip


class People:
    """A directory of them all; the agent's sponsor is sam, and it acts for maria."""

    def user(self, user_id: str) -> Any:
        status = "disabled" if user_id == "gone" else "active"
        state = SimpleNamespace(roles=ROLES[user_id], status=status)
        return SimpleNamespace(state=state) if user_id in ROLES else None


DIRECTORY = cast(Directory, People())
FACTS = cast(
    Facts,
    SimpleNamespace(
        agent=SimpleNamespace(state=SimpleNamespace(sponsor="sam")),
        task=SimpleNamespace(state=SimpleNamespace(on_behalf_of="maria")),
        sponsors=frozenset({"sam"}),
    ),
)


def signed(*people: str) -> Any:
    return [SimpleNamespace(claims=SimpleNamespace(aud="td", iss=f"spiffe://td/user/{p}")) for p in people]


def lacking(required: tuple[RequiredClass, ...], *people: str) -> tuple[RequiredClass, ...]:
    return unmet(required, signed(*people), DIRECTORY, FACTS)


TWO: tuple[RequiredClass, ...] = ("break_glass", "break_glass")


@pytest.mark.parametrize(
    ("required", "people", "left"),
    [
        ((), (), 0),
        (TWO, (), 2),
        (TWO, ("olga",), 1),
        (TWO, ("olga", "olga"), 1),
        (TWO, ("olga", "otto"), 0),
        (TWO, ("olga", "sam", "maria", "petra", "uma", "gone"), 1),
        (("operator", *TWO), ("olga", "otto"), 1),
        (("operator", *TWO), ("olga", "otto", "maria"), 1),  # whom it is for is nobody else
        (("operator", *TWO), ("olga", "otto", "oscar"), 0),
        (("operator",), ("maria",), 1),
        (("operator",), ("sam",), 1),  # nor is who answers for the agent
        (("sponsor", "operator"), ("sam", "maria"), 1),
        (("sponsor", "operator"), ("sam", "olga"), 0),
        (("sponsor", *TWO), ("olga", "otto"), 1),
        (("sponsor", "second_person"), ("sam", "otto"), 0),
        (("second_person", "operator"), ("otto",), 1),
        (("second_person", "operator"), ("otto", "petra"), 0),
    ],
)
def test_what_is_still_missing(required: tuple[RequiredClass, ...], people: tuple[str, ...], left: int):
    assert len(lacking(required, *people)) == left


classes = st.lists(st.sampled_from(["sponsor", "second_person", "operator", "break_glass"]), max_size=5)


@given(classes.map(tuple), st.lists(st.sampled_from(sorted(ROLES)), max_size=5))
def test_it_is_as_few_as_any_assignment_of_people_leaves(
    required: tuple[RequiredClass, ...], people: list[str]
):
    padded: list[str | None] = [*sorted(set(people)), *[None] * len(required)]

    def left(chosen: tuple[str | None, ...]) -> int:
        fits = [
            p is not None and may_approve(DIRECTORY, p, wanted, FACTS)
            for p, wanted in zip(chosen, required, strict=True)
        ]
        return fits.count(False)

    fewest = min(left(chosen) for chosen in set(permutations(padded, len(required))))
    assert len(lacking(required, *people)) == fewest


@pytest.mark.parametrize("wanted", ["second_person", "operator", "break_glass"])
def test_who_hands_their_agent_over_is_nobody_else_by_that(wanted: RequiredClass):
    """sam has the bot's key, and could name whomever he likes as its sponsor, who need not even agree."""
    ledger = Ledger()
    ledger.organisation()
    roles = ("sponsor", "operator")
    for who in ("sam", "suzy", "steve"):
        ledger.give(ledger.user_set("otto", who, roles))
    ledger.give(ledger.target_set("olga", "staging", verbs=(VerbFloor(verb="deploy"),)))
    ledger.give(ledger.register("sam", "bot", "sam", ceiling=(permission("**"),)))
    change = ledger.give(ledger.assign("uma", "bot"))
    assert change is not None
    ledger.give(ledger.transfer("sam", "bot", "suzy"))
    ground = find_ground(ledger.directory, "bot", subject_key(change.state)[1], "staging")
    may = {who: may_approve(ledger.directory, who, wanted, ground) for who in ("sam", "suzy", "steve", "uma")}
    assert may == {"sam": False, "suzy": False, "steve": True, "uma": False}
    assert may_approve(ledger.directory, "suzy", "sponsor", ground)
    assert not may_approve(ledger.directory, "sam", "sponsor", ground)


def test_no_crowd_takes_long():
    many = [f"user-{n}" for n in range(400)]
    ROLES.update(dict.fromkeys(many, ("operator",)))
    try:
        assert lacking(("sponsor", "second_person", "operator", *TWO), *many) == ("sponsor", "second_person")
    finally:
        for name in many:
            del ROLES[name]


def test_break_glass_is_asked_for_by_the_request_alone():
    assert required_classes(("operator",), ("sponsor", "break_glass"), break_glass=False) == (
        "sponsor", "operator",
    )  # fmt: skip
    assert required_classes((), (), break_glass=True) == TWO
    assert required_classes(("none",), TWO, break_glass=True) == TWO
