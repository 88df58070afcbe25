"""A whole state by somebody who saw an older one: refused where it widens, taken where it only narrows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from ringfence.messages.codes import Code
from ringfence.messages.enrolment import AttestationSelector
from ringfence.messages.registry import (
    AgentSetAttestation,
    AgentSetCeiling,
    Delegation,
    GroupDelegation,
    ProvisionerSet,
)
from tests.support.dual_control import DualControl
from tests.support.in_memory_registry import InMemoryRegistry, permission
from tests.support.verdicts import refusal_code

WEB, DB = permission("env/web"), permission("env/db")


class Office(InMemoryRegistry):
    """sam has the agent bot, at revision 1; olga made the user uma, the target staging and the provisioner scim."""

    def __init__(self) -> None:
        super().__init__()
        self.organisation()
        self.give(self.register("sam", "bot", "sam", ceiling=(WEB,)))
        self.give(self.provisioner("sponsor"))
        self.give(self.target_set("olga", "staging"))

    def ceiling(self, *scope: Any, **fields: Any) -> AgentSetCeiling:
        return self.claims(AgentSetCeiling, "sam", agent_id="bot", ceiling=scope, **fields)

    def attestation(self, **fields: Any) -> AgentSetAttestation:
        selector = AttestationSelector(issuer="https://idp.example", claims={"sub": "pod"})
        return self.claims(AgentSetAttestation, "sam", agent_id="bot", attestation=(selector,), **fields)

    def provisioner(self, *roles: Any, **fields: Any) -> ProvisionerSet:
        delegation = Delegation(source="scim:acme", groups=(GroupDelegation(group="staff", roles=roles),))
        keys = (self.key_record(self.key("scim")),)
        return self.claims(
            ProvisionerSet,
            "olga",
            provisioner_id="scim",
            name="x",
            keys=keys,
            delegation=delegation,
            **fields,
        )

    def state(self, kind: Any, id: str) -> tuple[Any, int]:
        entry = self.directory.entry(kind, id)
        assert entry is not None
        return entry.state, entry.revision


def refused(office: Office, claims: Any) -> str:
    return refusal_code(lambda: office.give(claims))


WIDER: dict[str, Callable[[Office, int], Any]] = {
    "agent bot": lambda o, seen: o.ceiling(WEB, DB, revision=seen),
    "agent bot's selectors": lambda o, seen: o.attestation(revision=seen),
    "user uma": lambda o, seen: o.user_set("olga", "uma", ["sponsor"], revision=seen),
    "user scim": lambda o, seen: o.provisioner("sponsor", "auditor", revision=seen),
    "target staging": lambda o, seen: o.target_set("olga", "staging", max_ttl_s=7200, revision=seen),
}


@pytest.mark.parametrize("subject", WIDER)
@pytest.mark.parametrize("off", [-1, 1])
def test_wider_state_on_another_revision_is_refused_and_changes_nothing(subject: str, off: int) -> None:
    office = Office()
    kind, id = subject.removesuffix("'s selectors").split()
    before, revision = office.state(kind, id)
    wider = WIDER[subject]
    assert refused(office, wider(office, revision + off)) == Code.REVISION_STALE
    assert office.state(kind, id) == (before, revision)
    office.give(wider(office, revision))
    assert office.state(kind, id)[1] == revision + 1


def test_new_subject_replaces_revision_0_only() -> None:
    office = Office()
    assert refused(office, office.target_set("olga", "other", revision=1)) == Code.REVISION_STALE
    office.give(office.target_set("olga", "other", revision=0))
    again = office.target_set("olga", "other", max_ttl_s=7200, revision=0)
    assert refused(office, again) == Code.REVISION_STALE


def test_narrowing_by_a_stale_signer_lands() -> None:
    office = Office()
    office.give(office.ceiling(WEB, DB, revision=1))
    office.give(office.ceiling(DB, revision=1))
    assert office.state("agent", "bot")[0].ceiling == (DB,)
    assert refused(office, office.ceiling(WEB, revision=1)) == Code.REVISION_STALE


def test_root_that_saw_an_older_state_widens_nothing() -> None:
    office = Office()
    stale = office.user_set("root", "uma", ["operator"], revision=0)
    assert refused(office, stale) == Code.REVISION_STALE


def test_stale_state_is_no_proposal_either() -> None:
    org = DualControl()
    command = org.claims(AgentSetCeiling, "olga", agent_id="bot", ceiling=(WEB,), revision=7)
    assert org.refusal(lambda: org.propose(command)) == Code.REVISION_STALE
    command = org.claims(AgentSetCeiling, "olga", agent_id="bot", ceiling=(WEB,), revision=1)
    org.second("otto", org.propose(command))
