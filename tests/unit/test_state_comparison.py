"""Widening: for every field of every command, whether a change of it needs a second person."""

from __future__ import annotations

import typing
from collections.abc import Iterator
from typing import Any

import pytest

from ringfence.messages.base import ExpiringClaims, KeyRecord, Message, Permission, PublicJwk
from ringfence.messages.enrolment import AttestationSelector
from ringfence.messages.registry import (
    COMMANDS,
    AgentActivate,
    AgentDecommission,
    AgentRegister,
    AgentRenewKey,
    AgentReportReuse,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentState,
    AgentSuspend,
    AgentTransfer,
    AnyState,
    BackendSettings,
    Delegation,
    Entitlements,
    GitRule,
    GroupDelegation,
    Hold,
    ModelLimits,
    ModelRule,
    ProvisionerLink,
    ProvisionerSet,
    Provisioning,
    RequestRule,
    TargetRemove,
    TargetSet,
    TargetState,
    TaskAssign,
    TaskDelegate,
    TaskEnd,
    UserAddKey,
    UserDisable,
    UserEndKey,
    UserReviewCompromise,
    UserSet,
    UserState,
    VerbFloor,
)
from ringfence.model.lifecycle import Actor, CommandRefusedError, Context, apply, delegates_operator, widens
from tests.support.in_memory_registry import START_MS, TD, InMemoryRegistry, permission

NOW_S = START_MS // 1000
ENVELOPE = frozenset(ExpiringClaims.model_fields)
LEAVES = (PublicJwk, Permission, Hold)
WIDE, NARROW = permission("env/**"), permission("env/web")
REGISTRY = InMemoryRegistry()
KEY, OTHER_KEY = (REGISTRY.key_record(REGISTRY.key(name)) for name in ("sam", "sam2"))
SHORT_KEY = KEY.model_copy(update={"not_after": KEY.not_after - 1})
LATE_KEY = KEY.model_copy(update={"not_before": NOW_S - 1})
RULE = RequestRule(method="GET", path="/{name}", verb="read", resource="{name}")
SELECTOR = AttestationSelector(issuer="https://ci.example", claims={"sub": "a"})
LIMITS = ModelLimits(tokens=1000, requests=10)
GROUP = GroupDelegation(group="ops", roles=("sponsor",), scope=(WIDE,))

BASES: dict[type[Message], dict[str, Any]] = {
    UserSet: {
        "user_id": "sam", "name": "Sam", "roles": ("sponsor", "auditor"), "keys": (KEY,),
        "entitlements": Entitlements(scope=(WIDE,), source="test", as_of=NOW_S - 9),
    },
    ProvisionerSet: {
        "provisioner_id": "hr", "name": "HR", "keys": (KEY,), "delegation": Delegation(source="hr", groups=(GROUP,)),
    },
    AgentSetCeiling: {"agent_id": "bot", "ceiling": (WIDE,), "limits": LIMITS},
    AgentSetAttestation: {"agent_id": "bot", "attestation": (SELECTOR,)},
    TargetSet: {
        "target_id": "platform", "description": "it", "backend": BackendSettings(kind="http", audience="a"),
        "verbs": (VerbFloor(verb="read"), VerbFloor(verb="write", floor="sponsor", ask="sponsor", key="file")),
        "requests": (RULE,), "max_ttl_s": 600, "delivery": "gateway", "keys": (KEY,),
    },
}  # fmt: skip


def with_entitlements(**changed: Any) -> dict[str, Any]:
    return {"entitlements": BASES[UserSet]["entitlements"].model_copy(update=changed)}


def with_group(**changed: Any) -> dict[str, Any]:
    group = GROUP.model_copy(update=changed)
    return {"delegation": Delegation(source="hr", groups=(group,))}


def with_floor(**changed: Any) -> dict[str, Any]:
    read, write = BASES[TargetSet]["verbs"]
    return {"verbs": (read, write.model_copy(update=changed))}


def with_rule(**changed: Any) -> dict[str, Any]:
    return {"requests": (RULE.model_copy(update=changed),)}


def with_selector(**changed: Any) -> dict[str, Any]:
    return {"attestation": (SELECTOR.model_copy(update=changed),)}


Change = tuple[dict[str, Any], bool]
ANY_KEY: dict[str, list[Change]] = {
    "keys": [({"keys": (KEY, OTHER_KEY)}, True), ({"keys": (SHORT_KEY,)}, False)],
    "keys.kid": [({"keys": (OTHER_KEY,)}, True)],
    "keys.jwk": [({"keys": (OTHER_KEY,)}, True)],
    "keys.not_before": [({"keys": (LATE_KEY,)}, False)],
    "keys.not_after": [
        ({"keys": (KEY.model_copy(update={"not_after": KEY.not_after + 1}),)}, True),
        ({"keys": (SHORT_KEY,)}, False),
    ],
}
"""What a key may say is refused for another kind of key than it was, and compared all the same (`test_...state`)."""
STATE_ONLY = frozenset({
    "keys.use", "keys.credential_id", "keys.rp_id", "keys.aaguid", "keys.backup_eligible", "keys.attested",
})  # fmt: skip
CHANGES: dict[type[Message], dict[str, list[Change]]] = {
    UserSet: {
        "name": [({"name": "Sammy"}, False)],
        "roles": [
            ({"roles": ("sponsor", "auditor", "operator")}, True), ({"roles": ("auditor", "sponsor")}, False),
            ({"roles": ()}, False),
        ],
        **ANY_KEY,
        "entitlements": [(with_entitlements(), False)],
        "entitlements.scope": [
            (with_entitlements(scope=(WIDE, permission("db/x"))), True), (with_entitlements(scope=(NARROW,)), False),
        ],
        "entitlements.source": [(with_entitlements(source="other"), True)],
        "entitlements.as_of": [(with_entitlements(as_of=NOW_S), True), (with_entitlements(as_of=NOW_S - 99), False)],
    },
    ProvisionerSet: {
        "name": [({"name": "Staff"}, False)],
        **ANY_KEY,
        "delegation": [({"delegation": Delegation(source="hr", groups=())}, False)],
        "delegation.source": [({"delegation": Delegation(source="other", groups=(GROUP,))}, True)],
        "delegation.groups": [
            ({"delegation": Delegation(source="hr", groups=(GROUP, GroupDelegation(group="dev")))}, True),
        ],
        "delegation.groups.group": [(with_group(group="dev"), True)],
        "delegation.groups.roles": [(with_group(roles=("sponsor", "operator")), True), (with_group(roles=()), False)],
        "delegation.groups.scope": [
            (with_group(scope=(WIDE, permission("db"))), True), (with_group(scope=(NARROW,)), False),
        ],
    },
    AgentSetCeiling: {
        "ceiling": [
            ({"ceiling": (WIDE, permission("env/web", verbs=["wipe"]))}, True), ({"ceiling": (NARROW,)}, False),
            ({"ceiling": (NARROW, WIDE)}, False),
        ],
        "limits": [({"limits": None}, True), ({"limits": ModelLimits(tokens=1000)}, True)],
        "limits.tokens": [
            ({"limits": ModelLimits(tokens=1001, requests=10)}, True), ({"limits": ModelLimits(requests=10)}, True),
            ({"limits": ModelLimits(tokens=999, requests=10)}, False),
        ],
        "limits.requests": [
            ({"limits": ModelLimits(tokens=1, requests=11)}, True),
            ({"limits": ModelLimits(tokens=1, requests=9)}, False),
        ],
    },
    AgentSetAttestation: {
        "attestation": [({"attestation": ()}, False)],
        "attestation.issuer": [(with_selector(issuer="https://other.example"), True)],
        "attestation.claims": [(with_selector(claims={"sub": "b"}), True)],
        "attestation.key_bound": [(with_selector(key_bound=True), True)],
        "attestation.max_life_s": [(with_selector(max_life_s=60), True)],
        "attestation.runner": [(with_selector(runner="r"), True)],
    },
    TargetSet: {
        "description": [({"description": "that"}, False)],
        "backend": [({"backend": BackendSettings(kind="http", audience="a", url="https://x")}, True)],  # type: ignore[call-arg]
        "backend.kind": [({"backend": BackendSettings(kind="ssh", audience="a")}, True)],
        "backend.audience": [({"backend": BackendSettings(kind="http", audience="b")}, True)],
        "verbs": [({"verbs": BASES[TargetSet]["verbs"][:1]}, False)],
        "verbs.verb": [({"verbs": (*BASES[TargetSet]["verbs"], VerbFloor(verb="wipe"))}, True)],
        "verbs.floor": [
            (with_floor(floor="none"), True), (with_floor(floor="operator"), True),
            ({"verbs": (VerbFloor(verb="read", floor="sponsor"), BASES[TargetSet]["verbs"][1])}, False),
        ],
        "verbs.ask": [(with_floor(ask=None), True), (with_floor(ask="operator"), True)],
        "verbs.key": [(with_floor(key=None), True), (with_floor(key="attested"), True)],
        "requests": [({"requests": ()}, True)],
        "requests.method": [(with_rule(method="POST"), True)],
        "requests.path": [(with_rule(path="/x/{name}"), True)],
        "requests.query": [(with_rule(query={"a": ("b",)}), True)],
        "requests.body": [(with_rule(body={"a": ("b",)}), True)],
        "requests.mcp": [({"requests": (RULE, RULE)}, True)],
        "requests.mcp.method": [({"requests": (RULE, RULE)}, True)],
        "requests.mcp.name": [({"requests": (RULE, RULE)}, True)],
        "requests.mcp.arguments": [({"requests": (RULE, RULE)}, True)],
        "requests.model": [(with_rule(model=ModelRule(api="openai")), True)],
        "requests.model.api": [(with_rule(model=ModelRule(api="anthropic")), True)],
        "requests.model.server_tools": [(with_rule(model=ModelRule(api="openai", server_tools=True)), True)],
        "requests.git": [(with_rule(git=GitRule(operation="fetch")), True)],
        "requests.git.operation": [(with_rule(git=GitRule(operation="push")), True)],
        "requests.verb": [(with_rule(verb="write"), True)],
        "requests.resource": [(with_rule(resource="x/{name}"), True)],
        "max_ttl_s": [({"max_ttl_s": 601}, True), ({"max_ttl_s": 599}, False)],
        "delivery": [({"delivery": "agent"}, True)],
        **ANY_KEY,
    },
}  # fmt: skip
"""Commands that set a whole state: each field with changes, and whether the change needs a second person."""
IDS = frozenset({"user_id", "agent_id", "target_id", "provisioner_id"})
OF_PROVISIONERS = frozenset({"provisioned", *(f"provisioned.{one}" for one in Provisioning.model_fields)}) | {
    "provisioned.emails.value", "provisioned.emails.type", "provisioned.emails.primary",
}  # fmt: skip
"""Compared in the state (`test_provisioning_of_a_user`)."""

ALWAYS = (AgentRegister, AgentResume, AgentTransfer)
NEVER = (
    AgentActivate, AgentDecommission, AgentRenewKey, AgentReportReuse, AgentSuspend, ProvisionerLink, TargetRemove,
    TaskAssign, TaskDelegate, TaskEnd, UserDisable, UserEndKey, UserReviewCompromise,
)  # fmt: skip
BY_A_FIELD = (AgentRotateKey, UserAddKey)
"""One field, or the signer, decides: the tests of their names."""


def test_every_command_is_in_one_group() -> None:
    groups = [*CHANGES, *ALWAYS, *NEVER, *BY_A_FIELD]
    assert sorted(map(repr, groups)) == sorted(map(repr, COMMANDS))


def messages_in(annotation: Any) -> Iterator[type[Message]]:
    if isinstance(annotation, type) and issubclass(annotation, Message):
        yield annotation
    for argument in typing.get_args(annotation):
        yield from messages_in(argument)


def paths(model: type[Message], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        for inner in messages_in(field.annotation):
            if inner not in LEAVES:
                yield from paths(inner, f"{prefix}{name}.")


@pytest.mark.parametrize("model", CHANGES)
def test_every_field_of_a_command_has_a_change(model: type[Message]) -> None:
    known = {*CHANGES[model], *ENVELOPE, "revision", *IDS, *STATE_ONLY} | (
        OF_PROVISIONERS if model is UserSet else set()
    )
    assert set(paths(model)) - known == set()


CASES = [
    pytest.param(model, change, widening, id=f"{getattr(model, 'typ', '')}-{path}-{number}")
    for model, fields in CHANGES.items()
    for path, changes in fields.items()
    for number, (change, widening) in enumerate(changes)
]


def command(model: type[Any], by: str = "olga", **fields: Any) -> Any:
    envelope = {"iss": f"spiffe://{TD}/user/{by}", "aud": TD, "iat": NOW_S, "exp": NOW_S + 60, "jti": "j"}
    return model(**{**BASES.get(model, {}), **envelope, **fields})


def applied(state: AnyState | None, given: Any, actor: Actor | None = None) -> AnyState:
    context = Context(
        actor or Actor("olga", frozenset({"operator"})), NOW_S, "id", lambda user_id: frozenset({"sponsor"})
    )
    return apply(state, given, context)


def agent(**fields: Any) -> AgentState:
    given = {
        "agent_id": "bot", "sponsor": "sam", "description": "it", "keys": (KEY,), "ceiling": (WIDE,),
        "limits": LIMITS, "status": "active", "attestation": (SELECTOR,),
    }  # fmt: skip
    return AgentState(**{**given, **fields})


def state_before(model: type[Any]) -> AnyState:
    return agent() if model in (AgentSetCeiling, AgentSetAttestation) else applied(None, command(model))


@pytest.mark.parametrize(("model", "change", "widening"), CASES)
def test_change_of_field_needs_second_person(
    model: type[Any], change: dict[str, Any], widening: bool
) -> None:
    before, given = state_before(model), command(model, **change)
    try:
        after = applied(before, given)
    except CommandRefusedError:  # a state that no command makes is compared all the same
        after = before.model_copy(update=change)
    assert widens(before, after, given) is widening


@pytest.mark.parametrize("model", CHANGES)
def test_same_command_again_needs_no_second_person(model: type[Any]) -> None:
    before, given = state_before(model), command(model)
    assert not widens(before, applied(before, given), given)
    if model not in (AgentSetCeiling, AgentSetAttestation):
        assert widens(None, before, given)


@pytest.mark.parametrize("name", sorted({*KeyRecord.model_fields} - {"not_before", "not_after"}))
def test_changed_field_of_key_needs_second_person(name: str) -> None:
    before = agent()
    values = {"jwk": OTHER_KEY.jwk, "backup_eligible": True, "attested": True}
    key = KEY.model_copy(update={name: values.get(name, "other")})
    assert widens(before, before.model_copy(update={"keys": (key,)}), command(AgentSetCeiling))


def test_first_limit_narrows_and_unknown_field_of_limits_widens() -> None:
    unlimited, given = agent(limits=None), command(AgentSetCeiling)
    assert not widens(unlimited, agent(), given)
    newer = ModelLimits.model_validate({"tokens": 1000, "requests": 10, "per_day": True})
    assert widens(agent(), agent(limits=newer), given)


PROVISIONED = Provisioning(groups=("ops",), active=False, user_name="sam")


@pytest.mark.parametrize(
    ("change", "widening"),
    [
        ({"groups": ("ops", "dev")}, True),
        ({"active": True}, True),
        ({"user_name": "sammy"}, True),
        ({"external_id": "x"}, True),
        ({"emails": ()}, False),
        ({"emails": ({"value": "a@b.c"},)}, True),
        *(({name: "x"}, False) for name in ("display_name", "formatted_name", "given_name", "family_name")),
    ],
)
def test_provisioning_of_user_by_operator_needs_second_person(change: dict[str, Any], widening: bool) -> None:
    hr = Actor("hr", frozenset(), Delegation(source="test", groups=(GROUP, GroupDelegation(group="dev"))))
    fields: dict[str, Any] = {
        "keys": (),
        "roles": (),
        "entitlements": Entitlements(source="test", as_of=NOW_S - 9),
    }
    made = command(UserSet, "hr", provisioned=PROVISIONED, **fields)
    before = applied(None, made, hr)
    assert not widens(None, before, made)
    again = Provisioning(**{**PROVISIONED.model_dump(), **change})
    by_hr, by_olga = (command(UserSet, by, provisioned=again, **fields) for by in ("hr", "olga"))
    assert not widens(before, applied(before, by_hr, hr), by_hr)
    assert widens(before, applied(before, by_olga), by_olga) is widening
    taken_over = command(UserSet, **fields)
    assert widens(before, applied(before, taken_over), taken_over)


def test_field_that_this_version_does_not_know_needs_second_person() -> None:
    before = agent()
    after = AgentState.model_validate({**before.model_dump(), "later": 1})
    assert widens(before, after, command(AgentSetCeiling))
    assert not widens(after, after, command(AgentSetCeiling))


def test_key_by_own_key_file_needs_no_second_person_and_by_others_does() -> None:
    before = applied(None, command(UserSet))
    assert isinstance(before, UserState)
    after = before.model_copy(update={"keys": (*before.keys, OTHER_KEY)})
    for by, widening in (("sam", False), ("olga", True)):
        given = command(UserAddKey, by, user_id="sam", key=OTHER_KEY)
        assert widens(before, after, given) is widening


def test_end_of_stolen_key_of_agent_needs_no_second_person_and_another_key_does() -> None:
    before = agent()
    ends = command(AgentRotateKey, agent_id="bot", compromised=True)
    replaces = command(AgentRotateKey, agent_id="bot", key=OTHER_KEY)
    assert not widens(before, applied(before, ends), ends)
    assert widens(before, applied(before, replaces), replaces)


@pytest.mark.parametrize(
    ("before", "given", "widening"),
    [
        (
            None,
            command(AgentRegister, agent_id="bot", sponsor="sam", description="it", keys=(KEY,), ceiling=()),
            True,
        ),
        (agent(), command(AgentTransfer, agent_id="bot", sponsor="suzy", without_consent=True), True),
        (agent(status="suspended"), command(AgentResume, agent_id="bot", reason="x"), True),
        (agent(), command(AgentSuspend, agent_id="bot", reason="x"), False),
        (agent(status="suspended"), command(AgentSuspend, agent_id="bot", reason="x"), False),
        (agent(), command(AgentDecommission, agent_id="bot", reason="x"), False),
    ],
)
def test_commands_about_agents(before: AnyState | None, given: Any, widening: bool) -> None:
    assert widens(before, applied(before, given), given) is widening


def test_activation_by_its_sponsor_needs_no_second_person() -> None:
    sam = Actor("sam", frozenset({"sponsor"}))
    before, given = agent(status="registered"), command(AgentActivate, "sam", agent_id="bot")
    assert not widens(before, applied(before, given, sam), given)


def test_removal_of_target_needs_no_second_person_and_its_return_does() -> None:
    before = state_before(TargetSet)
    removes = command(TargetRemove, target_id="platform", reason="x")
    removed = applied(before, removes)
    assert isinstance(removed, TargetState)
    assert not widens(before, removed, removes)
    assert widens(removed, applied(removed, command(TargetSet)), command(TargetSet))


def test_command_that_frees_held_ceiling_needs_second_person() -> None:
    hold = Hold(
        report="00000000-0000-5000-8000-000000000000", report_digest="0" * 64, by_kid="k", user_id="olga", kid="k",
        parts=("ceiling",), at_ms=1, status="held", since_ms=1,
    )  # fmt: skip
    before, given = agent(holds=(hold,)), command(AgentSetCeiling, "otto")
    assert widens(before, applied(before, given, Actor("otto", frozenset({"operator"}))), given)
    assert not widens(agent(), agent(holds=(hold,)), command(AgentSetCeiling))


def test_operator_role_in_delegation_is_found() -> None:
    before = applied(None, command(ProvisionerSet))
    after = applied(before, command(ProvisionerSet, **with_group(roles=("operator",))))
    assert delegates_operator(before, after)
    assert delegates_operator(None, after)
    assert not delegates_operator(after, after)
