"""Who may stand for which approval, so that as much as can be is met and nobody counts twice."""

from __future__ import annotations

from itertools import permutations
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import Signed, sign
from ringfence.messages.approval import Approval
from ringfence.messages.credential import CredentialDecision, CredentialRequest, RequiredClass
from ringfence.messages.registry import VerbFloor
from ringfence.model.lifecycle import KeyHistory, KeyOrigin, subject_key
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.approvals import (
    BREAK_GLASS_TTL_S,
    append_time_of,
    check_approval,
    may_approve,
    required_classes,
    unmet,
)
from ringfence.model.requests.facts import RequestContext, load_records
from tests.support.in_memory_registry import InMemoryRegistry, permission
from tests.support.passkeys import SoftwarePasskey
from tests.support.user_keys import first_key, said_by
from tests.support.verdicts import code_of, reason_of
from tools.schemas.examples import EXAMPLES

ROLES = {
    "sam": ("sponsor", "operator"), "maria": ("operator",), "petra": ("sponsor",), "olga": ("operator",),
    "otto": ("operator", "sponsor"), "oscar": ("operator",), "uma": ("auditor",), "gone": ("operator", "sponsor"),
}  # fmt: skip


class People:
    """A directory of them all; the agent's sponsor is sam, and it acts for maria."""

    def user(self, user_id: str) -> Any:
        status = "disabled" if user_id == "gone" else "active"
        keys = (SimpleNamespace(kid=f"key of {user_id}", use=None, not_after=1),)
        state = SimpleNamespace(roles=ROLES[user_id], status=status, keys=keys, compromised=None, holds=())
        return SimpleNamespace(state=state) if user_id in ROLES else None

    def key_history(self, user_id: str) -> KeyHistory:
        return first_key(f"key of {user_id}")

    def compromised_giver(self, origin: KeyOrigin) -> None:
        return None


DIRECTORY = cast(Directory, People())
FACTS = cast(
    RequestContext,
    SimpleNamespace(
        agent=SimpleNamespace(state=SimpleNamespace(sponsor="sam")),
        task=SimpleNamespace(state=SimpleNamespace(on_behalf_of="maria")),
        target=SimpleNamespace(state=SimpleNamespace(verbs=())),
        sponsors=frozenset({"sam"}),
        verbs=frozenset({"read"}),
    ),
)


def signed(*people: str) -> Any:
    return [by(f"spiffe://td/user/{person}", f"key of {person}") for person in people]


def by(iss: str, kid: str) -> Any:
    """What somebody is said to have signed: only its header is read."""
    return SimpleNamespace(claims=SimpleNamespace(aud="td", iss=iss), compact=said_by(kid))


def lacking(required: tuple[RequiredClass, ...], *people: str) -> tuple[RequiredClass, ...]:
    return unmet(required, signed(*people), DIRECTORY, FACTS, at_ms=0)


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
def test_lacking_counts_the_approvals_still_missing(
    required: tuple[RequiredClass, ...], people: tuple[str, ...], left: int
):
    assert len(lacking(required, *people)) == left


classes = st.lists(st.sampled_from(["sponsor", "second_person", "operator", "break_glass"]), max_size=5)


@given(classes.map(tuple), st.lists(st.sampled_from(sorted(ROLES)), max_size=5))
def test_lacking_is_minimal_over_all_assignments(required: tuple[RequiredClass, ...], people: list[str]):
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
def test_transfer_of_an_agent_does_not_make_its_old_sponsor_independent(wanted: RequiredClass):
    """sam has the bot's key, and could name whomever he likes as its sponsor, who need not even agree."""
    ledger = InMemoryRegistry()
    ledger.organisation()
    roles = ("sponsor", "operator")
    for who in ("sam", "suzy", "steve"):
        ledger.give(ledger.user_set("otto", who, roles))
    ledger.give(ledger.target_set("olga", "staging", verbs=(VerbFloor(verb="deploy"),)))
    ledger.give(ledger.register("sam", "bot", "sam", ceiling=(permission("**"),)))
    change = ledger.give(ledger.assign("uma", "bot"))
    assert change is not None
    ledger.give(ledger.transfer("sam", "bot", "suzy"))
    ground = load_records(ledger.directory, "bot", subject_key(change.state)[1], "staging")
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


# --- whether one approval stands --------------------------------------------------------------------------------------

EXAMPLE = cast(Approval, EXAMPLES[Approval])
GIVEN = EXAMPLE.model_copy(
    update={"verdict": "approved", "request_digest": digest(EXAMPLE.request), "exp": 1000}
)
END_MS = 1000 * 1000
STALE = GIVEN.revisions.model_copy(update={"task": GIVEN.revisions.task + 1})


def problem(at_ms: int = END_MS, **changes: Any) -> str | None:
    request = Signed(cast(CredentialRequest, EXAMPLES[CredentialRequest]), GIVEN.request)
    found = check_approval(
        Signed(GIVEN.model_copy(update=changes), ""), cast(RequestContext, SimpleNamespace(request=request)),
        at_ms=at_ms, ttl_s=GIVEN.ttl_s, delivery=GIVEN.delivery, revisions=GIVEN.revisions,
    )  # fmt: skip
    return code_of(found)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({}, None),
        ({"request_digest": "0" * 64}, "approval_other_request"),
        ({"request": "x.y.z"}, "approval_other_request"),
        ({"verdict": "denied"}, "approval_denied"),
        ({"verdict": "denied", "comment": "no"}, "approval_denied"),
        ({"ttl_s": GIVEN.ttl_s + 1}, "approval_other_terms"),
        ({"delivery": "agent" if GIVEN.delivery == "gateway" else "gateway"}, "approval_other_terms"),
        ({"revisions": STALE}, "approval_stale"),
    ],
)
def test_an_approval_is_for_one_request_on_its_terms_and_records(changes: dict[str, Any], code: str | None):
    assert problem(**changes) == code


def test_a_denial_names_who_said_so_and_why():
    request = Signed(cast(CredentialRequest, EXAMPLES[CredentialRequest]), GIVEN.request)
    no = GIVEN.model_copy(update={"verdict": "denied", "comment": "not on a Friday"})
    found = check_approval(
        Signed(no, ""), cast(RequestContext, SimpleNamespace(request=request)), at_ms=END_MS, ttl_s=GIVEN.ttl_s,
        delivery=GIVEN.delivery, revisions=GIVEN.revisions,
    )  # fmt: skip
    assert no.iss in reason_of(found).message
    assert "not on a Friday" in reason_of(found).message


def test_an_approval_ends_a_minute_after_its_time_at_the_latest():
    assert problem(END_MS + 60_000) is None
    assert problem(END_MS + 60_001) == "approval_expired"


def test_break_glass_gives_a_quarter_of_an_hour():
    assert BREAK_GLASS_TTL_S == 900


# --- who may give one -------------------------------------------------------------------------------------------------


def test_required_classes_have_one_order():
    every: tuple[RequiredClass, ...] = ("operator", "second_person", "sponsor")
    assert required_classes(every, (), break_glass=False) == ("sponsor", "second_person", "operator")
    assert required_classes((), every, break_glass=True) == ("sponsor", "second_person", "operator", *TWO)


class Distrusted:
    def user(self, user_id: str) -> Any:
        raise ChainError("it does not hold")


class Nobody:
    def user(self, user_id: str) -> Any:
        return None


@pytest.mark.parametrize("wanted", ["sponsor", "second_person", "operator", "break_glass"])
def test_user_without_a_valid_record_approves_nothing(wanted: RequiredClass):
    for directory in (Distrusted(), Nobody()):
        assert not may_approve(cast(Directory, directory), "sam", wanted, FACTS)


def test_a_class_of_another_version_is_given_by_nobody():
    for who in ROLES:
        for unheard in ("none", "root", ""):
            assert not may_approve(DIRECTORY, who, cast(Any, unheard), FACTS)


def test_the_agents_sponsor_is_one_no_more_without_the_role():
    facts = cast(
        RequestContext,
        SimpleNamespace(**{**vars(FACTS), "agent": SimpleNamespace(state=SimpleNamespace(sponsor="olga"))}),
    )
    assert not may_approve(DIRECTORY, "olga", "sponsor", facts)


def test_approval_not_signed_by_a_user_counts_for_no_role():
    by_agent = [by("spiffe://td/agent/olga", "key of olga")]
    assert unmet(("operator",), by_agent, DIRECTORY, FACTS, at_ms=0) == ("operator",)
    elsewhere = [by("spiffe://other/user/olga", "key of olga")]
    assert unmet(("operator",), [*elsewhere, *signed("otto")], DIRECTORY, FACTS, at_ms=0) == ()


def test_the_append_time_of_a_passkeys_answer_is_what_the_decision_says() -> None:
    passkey = SoftwarePasskey.make("spiffe://acme.example/user/sam")
    approval = cast(Approval, EXAMPLES[Approval])
    answer, by_file = sign(approval, passkey), sign(approval, passkey.plain())
    example = cast(CredentialDecision, EXAMPLES[CredentialDecision])
    says = example.model_copy(update={"answers_at_ms": {digest(answer): 7, digest(by_file): 9}})
    assert append_time_of(says, answer) == 7
    assert append_time_of(says, by_file) is None
    assert append_time_of(example, by_file) is None
    for silent in (example, example.model_copy(update={"answers_at_ms": {digest(by_file): 9}})):
        with pytest.raises(InvalidMessageError, match="does not say when") as refused:
            append_time_of(silent, answer)
        assert refused.value.code == "append_time_unknown"
    with pytest.raises(InvalidMessageError):
        append_time_of(says, "x.y.z")
