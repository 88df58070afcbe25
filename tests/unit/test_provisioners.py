"""What an operator's delegation lets a provisioner do, and what neither it, nor a registry with its key, can do."""

from __future__ import annotations

from typing import Any

import pytest

from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Claims
from ringfence.messages.registry import (
    AgentRegister,
    Delegation,
    Entitlements,
    GroupDelegation,
    GroupLink,
    ProvisionerLink,
    ProvisionerSet,
    Provisioning,
    UserDisable,
    UserSet,
    UserState,
)
from ringfence.model.lifecycle import CommandRefusedError
from ringfence.model.records.command_chain import ChainError
from tests.support.in_memory_registry import START_MS, InMemoryRegistry, permission

NOW_S = START_MS // 1000
WIDE, NARROW = permission("env/**"), permission("env/a")
SOURCE = "scim:acme"
GROUPS = (
    GroupDelegation(group="Developers", scope=(NARROW,)),
    GroupDelegation(group="Leads", roles=("sponsor",), scope=(permission("env/b"),)),
)


@pytest.fixture
def ledger() -> InMemoryRegistry:
    ledger = InMemoryRegistry()
    ledger.organisation()
    ledger.give(provisioner_set(ledger))
    return ledger


def provisioner_set(
    ledger: InMemoryRegistry, by: str = "olga", groups: tuple[GroupDelegation, ...] = GROUPS, **fields: Any
) -> ProvisionerSet:
    given = {
        "provisioner_id": "scim",
        "name": "Directory",
        "keys": (ledger.key_record(ledger.key("scim")),),
        "delegation": Delegation(source=SOURCE, groups=groups),
    }
    return ledger.claims(ProvisionerSet, by, **{**given, **fields})


def synced(
    ledger: InMemoryRegistry,
    user: str = "maria",
    *groups: str,
    scope: tuple[Any, ...] = (),
    by: str = "scim",
    **fields: Any,
) -> UserSet:
    """What a directory says of a user."""
    said = {name: fields.pop(name) for name in ("active", "external_id") if name in fields}
    given = {
        "user_id": user,
        "name": user.title(),
        "roles": (),
        "keys": (),
        "entitlements": Entitlements(scope=scope, source=SOURCE, as_of=ledger.clock.ms // 1000),
        "provisioned": Provisioning(groups=groups, **said),
    }
    return ledger.claims(UserSet, by, **{**given, **fields})


def refused(ledger: InMemoryRegistry, claims: Claims, key: SigningKey | None = None) -> str:
    with pytest.raises(CommandRefusedError) as caught:
        ledger.give(claims, key)
    return caught.value.code


def user(ledger: InMemoryRegistry, id: str = "maria") -> UserState:
    entry = ledger.directory.user(id)
    assert entry is not None
    return entry.state


def enrolled(ledger: InMemoryRegistry, user_id: str = "maria", by: str = "olga", **fields: Any) -> None:
    """An operator gives a user who comes from a directory a key, and leaves the rest as it is."""
    state = user(ledger, user_id)
    given = {
        "entitlements": state.entitlements,
        "name": state.name,
        "provisioned": state.provisioned,
        **fields,
    }
    ledger.give(ledger.user_set(by, user_id, state.roles, **given))


# --- the delegation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("who", ["sam", "adam", "uma"])
def test_only_operators_delegate(ledger: InMemoryRegistry, who: str):
    assert refused(ledger, provisioner_set(ledger, who)) == "not_operator"


def _fresh(ledger: InMemoryRegistry) -> Any:
    return ledger.key_record(SigningKey.generate(ledger.key("scim").id))


@pytest.mark.parametrize(
    ("groups", "code"),
    [
        ((GROUPS[0], GROUPS[0]), "group_twice"),
        ((GroupDelegation(group="x", scope=(permission("../*"),)),), "scope_invalid"),
    ],
)
def test_a_delegation_that_means_nothing(
    ledger: InMemoryRegistry, groups: tuple[GroupDelegation, ...], code: str
):
    assert refused(ledger, provisioner_set(ledger, groups=groups)) == code


def test_a_key_of_somebody_else_is_no_provisioners(ledger: InMemoryRegistry):
    taken = (ledger.key_record(ledger.key("sam")),)
    assert refused(ledger, provisioner_set(ledger, provisioner_id="other", keys=taken)) == "key_taken"


# --- what it may do ---------------------------------------------------------------------------------------------------


def test_users_get_what_their_groups_are_delegated_and_no_key(ledger: InMemoryRegistry):
    scope = (NARROW, permission("env/b"))
    ledger.give(
        synced(ledger, "maria", "Developers", "Leads", roles=("sponsor",), scope=scope, external_id="e1")
    )
    maria = user(ledger)
    assert (maria.roles, maria.entitlements.scope, maria.keys, maria.status) == (
        ("sponsor",),
        scope,
        (),
        "active",
    )
    assert maria.provisioned is not None
    assert (maria.provisioned.by, maria.provisioned.external_id) == ("scim", "e1")
    ledger.chains().verify(ledger.directory.user("maria").record)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"groups": ("Admins",)}, "group_not_delegated"),
        ({"groups": ("Developers",), "roles": ("sponsor",)}, "beyond_delegation"),
        ({"groups": ("Leads",), "roles": ("operator",)}, "beyond_delegation"),
        ({"groups": ("Leads",), "scope": (NARROW,)}, "beyond_delegation"),
        ({"groups": ("Developers",), "scope": (WIDE,)}, "beyond_delegation"),
        ({"groups": (), "scope": (NARROW,)}, "beyond_delegation"),
        ({"source": "other"}, "source_not_delegated"),
        ({"as_of": NOW_S + 3600}, "as_of_in_future"),
        ({"provisioned": None}, "groups_missing"),
    ],
)
def test_provisioning_beyond_the_delegation_is_refused(
    ledger: InMemoryRegistry, change: dict[str, Any], code: str
):
    fields = dict(change)
    groups = fields.pop("groups", ("Developers",))
    if "source" in fields or "as_of" in fields:
        given = {"source": SOURCE, "as_of": NOW_S, **fields}
        fields = {"entitlements": Entitlements(scope=(), **given)}
    assert refused(ledger, synced(ledger, "maria", *groups, **fields)) == code
    assert ledger.directory.user("maria") is None


def test_a_delegated_operator_is_one_that_was_listed(ledger: InMemoryRegistry):
    ledger.give(provisioner_set(ledger, groups=(*GROUPS, GroupDelegation(group="Ops", roles=("operator",)))))
    ledger.give(synced(ledger, "maria", "Ops", roles=("operator",)))
    assert user(ledger).roles == ("operator",)


def test_provisioner_adds_and_ends_no_keys(ledger: InMemoryRegistry):
    assert refused(ledger, synced(ledger, keys=(_fresh(ledger),))) == "keys_not_delegated"
    ledger.give(synced(ledger, "maria", "Developers"))
    enrolled(ledger)
    before = user(ledger).keys
    ledger.give(synced(ledger, "maria", "Leads"))
    assert user(ledger).keys == before
    assert len(before) == 1


@pytest.mark.parametrize("victim", ["sam", "olga", "scim"])
def test_provisioner_changes_only_users_that_it_made(ledger: InMemoryRegistry, victim: str):
    ledger.give(provisioner_set(ledger, provisioner_id="hr", keys=(ledger.key_record(ledger.key("hr")),)))
    assert refused(ledger, synced(ledger, victim, "Developers")) == "not_its_user"
    gone = ledger.claims(UserDisable, "scim", user_id=victim, reason="x")
    assert refused(ledger, gone) == "not_its_user"
    ledger.give(synced(ledger, "maria", by="hr"))
    assert refused(ledger, synced(ledger, "maria")) == "not_its_user"


def test_provisioner_gives_no_other_command(ledger: InMemoryRegistry):
    ledger.give(synced(ledger, "maria", "Leads", roles=("sponsor",)))
    assert refused(ledger, ledger.register("scim", "bot", "maria")) == "provisioner_only"
    assert refused(ledger, ledger.assign("scim", "bot")) == "provisioner_only"
    assert refused(ledger, ledger.target_set("scim", "staging")) == "provisioner_only"
    assert refused(ledger, provisioner_set(ledger, "scim")) == "provisioner_only"


def test_provisioner_consents_to_nothing(ledger: InMemoryRegistry):
    ledger.give(ledger.register("sam", "bot", "sam"))
    terms = ledger.terms("bot")
    consent = ledger.consent("scim", terms)
    claims = ledger.assign("uma", "bot", terms=terms, on_behalf_of="scim", consent=consent)
    assert refused(ledger, claims) == "on_behalf_of_unsigned"
    key = ledger.key("scim")
    assert ledger.directory.user_key(key.id, key.kid, ledger.clock.ms / 1000) is None


def test_a_disabled_provisioner_is_believed_nothing_any_more(ledger: InMemoryRegistry):
    ledger.give(ledger.claims(UserDisable, "olga", user_id="scim", reason="compromised"))
    with pytest.raises(InvalidMessageError, match="no valid key"):
        ledger.give(synced(ledger))


def test_a_narrower_delegation_counts_from_then_on_and_older_records_still_hold(ledger: InMemoryRegistry):
    ledger.give(synced(ledger, "maria", "Leads", roles=("sponsor",)))
    ledger.give(provisioner_set(ledger, groups=GROUPS[:1]))
    assert refused(ledger, synced(ledger, "maria", "Leads", roles=("sponsor",))) == "group_not_delegated"
    ledger.chains().verify(ledger.directory.user("maria").record)  # type: ignore[union-attr]


# --- leaving and coming back ------------------------------------------------------------------------------------------


def test_provisioner_enables_only_users_that_it_disabled(ledger: InMemoryRegistry):
    ledger.give(synced(ledger, "maria", "Developers"))
    enrolled(ledger)
    ledger.give(ledger.claims(UserDisable, "scim", user_id="maria", reason="on leave"))
    assert user(ledger).status == "disabled"
    ledger.give(synced(ledger, "maria", "Developers", active=False, external_id="e2"))
    assert user(ledger).status == "disabled"
    ledger.give(synced(ledger, "maria", "Developers"))
    assert (user(ledger).status, len(user(ledger).keys)) == ("active", 1)


def test_provisioner_cannot_enable_a_user_disabled_by_an_operator(ledger: InMemoryRegistry):
    ledger.give(synced(ledger, "maria", "Developers"))
    ledger.give(ledger.claims(UserDisable, "olga", user_id="maria", reason="stolen laptop"))
    assert refused(ledger, synced(ledger, "maria", "Developers")) == "disabled_by_operator"
    ledger.give(synced(ledger, "maria", active=False))
    ledger.give(ledger.claims(UserDisable, "scim", user_id="maria", reason="again"))
    assert refused(ledger, synced(ledger, "maria", "Developers")) == "disabled_by_operator"
    enrolled(ledger, provisioned=Provisioning(groups=("Developers",)))
    ledger.give(synced(ledger, "maria", "Developers", scope=(NARROW,)))
    assert user(ledger).status == "active"


def test_deleted_user_never_returns_and_their_keys_end(ledger: InMemoryRegistry):
    ledger.give(synced(ledger, "maria", "Developers"))
    enrolled(ledger)
    ledger.give(ledger.claims(UserDisable, "scim", user_id="maria", reason="deleted", gone=True))
    assert all(key.not_after <= ledger.clock.ms // 1000 for key in user(ledger).keys)
    assert refused(ledger, synced(ledger, "maria", "Developers")) == "user_gone"


def test_an_operator_takes_a_user_over(ledger: InMemoryRegistry):
    ledger.give(synced(ledger, "maria", "Developers"))
    ledger.give(ledger.user_set("olga", "maria", ["sponsor"]))
    assert user(ledger).provisioned is None
    assert refused(ledger, synced(ledger, "maria", "Developers")) == "not_its_user"


# --- nobody widens themselves -----------------------------------------------------------------------------------------


@pytest.fixture
def otilia(ledger: InMemoryRegistry) -> InMemoryRegistry:
    """An operator who comes from the directory."""
    ledger.give(provisioner_set(ledger, groups=(*GROUPS, GroupDelegation(group="Ops", roles=("operator",)))))
    ledger.give(synced(ledger, "otilia", "Ops", roles=("operator",)))
    enrolled(ledger, "otilia")
    return ledger


def test_operator_cannot_widen_the_delegation_they_come_from(otilia: InMemoryRegistry):
    wide = (GroupDelegation(group="Ops", roles=("operator", "sponsor"), scope=(WIDE,)),)
    assert refused(otilia, provisioner_set(otilia, "otilia", groups=wide)) == "self_widening"
    assert otilia.give(provisioner_set(otilia, "olga", groups=wide)) is not None


def test_provisioned_operator_cannot_leave_their_directory(otilia: InMemoryRegistry):
    assert refused(otilia, otilia.user_set("otilia", "otilia", ["operator"])) == "self_widening"


# --- its own groups ---------------------------------------------------------------------------------------------------


def test_provisioner_links_only_delegated_groups(ledger: InMemoryRegistry):
    link = ledger.claims(ProvisionerLink, "scim", provisioner_id="scim", groups=(GroupLink(group="Leads"),))
    ledger.give(link)
    assert [one.group for one in user(ledger, "scim").linked] == ["Leads"]
    other = ledger.claims(ProvisionerLink, "scim", provisioner_id="scim", groups=(GroupLink(group="Admins"),))
    assert refused(ledger, other) == "group_not_delegated"
    foreign = ledger.claims(ProvisionerLink, "olga", provisioner_id="scim", groups=())
    assert refused(ledger, foreign) == "not_entitled"
    ledger.give(provisioner_set(ledger, groups=GROUPS[:1]))
    assert user(ledger, "scim").linked == ()


# --- evidence ---------------------------------------------------------------------------------------------------------


def test_records_do_not_grow_with_each_sync(ledger: InMemoryRegistry):
    ledger.give(synced(ledger, "maria", "Developers", scope=(NARROW,)))
    enrolled(ledger)
    for _ in range(20):
        ledger.give(synced(ledger, "maria", "Developers", scope=(NARROW,)))
        ledger.give(
            ledger.claims(
                ProvisionerLink,
                "scim",
                provisioner_id="scim",
                groups=(GroupLink(group="Leads", external_id=str(ledger.clock.ms)),),
            )
        )
    entries = [ledger.directory.user(id) for id in ("maria", "scim")]
    assert [len(entry.record.commands) for entry in entries if entry] == [4, 2]
    assert user(ledger).entitlements.as_of > NOW_S
    for entry in entries:
        assert entry is not None
        ledger.chains().verify(entry.record)


def test_a_reader_takes_every_revision_of_a_sync(ledger: InMemoryRegistry):
    """What the registry drops is what a reader lets it drop."""
    for _ in range(4):
        ledger.give(synced(ledger, "maria", "Developers", scope=(NARROW,)))
    assert ledger.alarms == []


def test_a_registry_with_the_provisioners_key_cannot_undo_an_operators_taking_over(ledger: InMemoryRegistry):
    """Not even where the operator's command changes neither roles nor keys."""
    ledger.give(synced(ledger, "maria", "Developers"))
    entry = ledger.directory.user("maria")
    assert entry is not None
    ledger.give(ledger.user_set("olga", "maria", keys=()))
    taken = ledger.directory.user("maria")
    assert taken is not None
    command = ledger.embed(synced(ledger, "maria", "Developers", scope=(NARROW,)))
    lie = ledger.follow((*entry.record.commands, command), taken.revision + 1)
    problem = ledger.admit(ledger.sign_record(lie.state, lie.commands, lie.revision))
    assert problem is not None
    assert problem.startswith("history_changed")


def test_a_registry_with_the_provisioners_key_cannot_undo_that_an_operator_ended_keys(
    ledger: InMemoryRegistry,
):
    """The provisioner's commands have no keys either, and end none."""
    ledger.give(synced(ledger, "maria", "Developers"))
    enrolled(ledger)
    ledger.give(synced(ledger, "maria", "Developers"))
    before = ledger.directory.user("maria")
    enrolled(ledger, keys=())
    after = ledger.directory.user("maria")
    assert before is not None
    assert after is not None
    assert all(key.not_after <= ledger.clock.ms // 1000 for key in after.state.keys)
    command = ledger.embed(synced(ledger, "maria", "Developers", scope=(NARROW,)))
    lie = ledger.follow((*before.record.commands, command), after.revision + 1)
    problem = ledger.admit(ledger.sign_record(lie.state, lie.commands, lie.revision))
    assert problem is not None
    assert problem.startswith("history_changed")


def test_a_registry_cannot_make_a_delegation_or_a_user_of_one(ledger: InMemoryRegistry):
    scim = ledger.directory.user("scim")
    assert scim is not None
    wide = Delegation(source=SOURCE, groups=(GroupDelegation(group="Leads", roles=("operator",)),))
    lie = ledger.record(scim.state.model_copy(update={"delegation": wide}), scim.record.commands, 2)
    with pytest.raises(ChainError, match="not what its commands say"):
        ledger.chains().verify(lie)
    command = ledger.embed(synced(ledger, "maria", "Leads", roles=("operator",)))
    state = user(ledger, "sam").model_copy(update={"user_id": "maria"})
    with pytest.raises(ChainError, match="not delegated"):
        ledger.chains().verify(ledger.record(state, (command,)))


def test_agents_may_have_a_provisioned_sponsor(ledger: InMemoryRegistry):
    ledger.give(synced(ledger, "maria", "Leads", roles=("sponsor",)))
    enrolled(ledger)
    assert ledger.give(ledger.claims(AgentRegister, "maria", **_bot(ledger))) is not None
    ledger.give(synced(ledger, "maria", "Developers"))
    assert refused(ledger, ledger.claims(AgentRegister, "maria", **_bot(ledger, "bot2"))) == "not_sponsor"


def _bot(ledger: InMemoryRegistry, name: str = "bot") -> dict[str, Any]:
    key = ledger.key_record(ledger.key(name, "agent"))
    return {"agent_id": name, "sponsor": "maria", "description": "x", "keys": (key,), "ceiling": ()}
