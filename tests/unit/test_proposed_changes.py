"""What the second person is shown of a proposed command: the whole change, by verified records."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.client.admin.proposals import ProposedCommand, read_proposal
from ringfence.client.errors import InvalidCallError
from ringfence.messages.base import Permission
from ringfence.messages.registry import (
    AgentSetCeiling,
    BackendSettings,
    Delegation,
    GroupDelegation,
    ProvisionerSet,
    Provisioning,
    TargetRemove,
    UserDisable,
)
from tests.support.dual_control import DualControl
from tests.support.in_memory_registry import permission

WEB, DB = permission("env/web"), permission("env/db")


@pytest.fixture
def org() -> DualControl:
    return DualControl()


def shown(org: DualControl, claims: Any, **lies: Any) -> ProposedCommand:
    """What the second person reads of a command that waits. `lies`: of the registry's list."""
    proposed = org.propose(claims)
    listed = {"command": proposed.jws, "at_ms": proposed.at_ms, "revision": proposed.revision, **lies}
    return read_proposal(org.directory, listed)


def ceiling(org: DualControl, by: str, *scope: Permission) -> AgentSetCeiling:
    return org.claims(AgentSetCeiling, by, agent_id="bot", ceiling=scope)


def test_change_of_ceiling_is_shown_beside_the_present_one(org: DualControl) -> None:
    org.give(ceiling(org, "root", WEB))
    changes = shown(org, ceiling(org, "olga", WEB, DB)).changes()
    assert {name: [len(each) for each in both] for name, both in changes.items()} == {"ceiling": [1, 2]}


def test_delivery_that_the_command_leaves_out_is_shown(org: DualControl) -> None:
    backend = BackendSettings(kind="jwt")
    org.give(org.target_set("root", "platform", backend=backend, delivery="gateway"))
    changes = shown(org, org.target_set("olga", "platform", backend=backend)).changes()
    assert changes == {"delivery": ("gateway", "agent")}


def test_removed_target_that_becomes_active_is_shown(org: DualControl) -> None:
    org.give(org.target_set("root", "platform"))
    org.give(org.claims(TargetRemove, "otto", target_id="platform", reason="x"))
    changes = shown(org, org.target_set("olga", "platform")).changes()
    assert changes == {"status": ("removed", "active")}


def test_disabled_user_who_becomes_active_is_shown(org: DualControl) -> None:
    org.give(org.claims(UserDisable, "otto", user_id="suzy", reason="x"))
    changes = shown(org, org.user_set("olga", "suzy", ["sponsor"])).changes()
    assert changes == {"status": ("disabled", "active")}


def test_user_taken_away_from_their_directory_is_shown(org: DualControl) -> None:
    delegation = Delegation(source="scim", groups=(GroupDelegation(group="Leads", roles=("sponsor",)),))
    keys = (org.key_record(org.key("hr")),)
    org.give(
        org.claims(ProvisionerSet, "root", provisioner_id="hr", name="HR", keys=keys, delegation=delegation)
    )
    entitlements = org.entitlements().model_copy(update={"source": "scim"})
    fields = {"keys": (), "entitlements": entitlements}
    org.give(org.user_set("hr", "ada", ["sponsor"], provisioned=Provisioning(groups=("Leads",)), **fields))
    changes = shown(org, org.user_set("olga", "ada", ["sponsor"], **fields)).changes()
    assert list(changes) == ["provisioned"]
    assert changes["provisioned"][1] is None


def test_time_that_the_registry_claims_hides_no_change(org: DualControl) -> None:
    """A registry that lies says that the command was proposed before the ceiling was narrowed."""
    org.give(ceiling(org, "root", WEB, DB))
    before_ms = org.clock.ms
    org.forward(1000)
    org.give(ceiling(org, "sam"))
    assert list(shown(org, ceiling(org, "olga", WEB, DB), at_ms=before_ms).changes()) == ["ceiling"]


def test_command_that_no_longer_fits_is_marked(org: DualControl) -> None:
    register = org.register("olga", "mule", "sam")
    proposed = org.propose(register)
    listed = {"command": proposed.jws, "at_ms": proposed.at_ms, "revision": proposed.revision}
    assert read_proposal(org.directory, listed).now is None
    org.second("otto", proposed)
    assert read_proposal(org.directory, listed).then is None


def test_command_with_another_signature_is_refused(org: DualControl) -> None:
    proposed = org.propose(ceiling(org, "olga", WEB))
    listed = {"command": proposed.jws[:-4] + "AAAA", "at_ms": proposed.at_ms, "revision": 1}
    with pytest.raises(InvalidCallError):
        read_proposal(org.directory, listed)
