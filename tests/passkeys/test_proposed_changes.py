"""Proposals on the sign page: the state that it computes is that of the services, and it shows nothing unverified."""

from __future__ import annotations

import json
from typing import Any

from ringfence.client.admin.proposals import read_proposal, state_as_json
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import PublicJwk
from ringfence.messages.registry import (
    COMMANDS,
    AgentRenewKey,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentSuspend,
    AttestationSelector,
    Delegation,
    GroupDelegation,
    ProvisionerSet,
)
from tests.passkeys.browser import Person
from tests.passkeys.questions import claims_of
from tests.passkeys.test_page_modules import modules
from tests.support.dual_control import DAY_MS, DualControl
from tests.support.in_memory_registry import TD, permission
from tests.support.user_keys import add_key, new_key

__all__ = ["modules"]

WEB = permission("env/web")


def directory_of_leads(org: DualControl, *groups: str) -> ProvisionerSet:
    return org.claims(
        ProvisionerSet, "olga", provisioner_id="hr", name="HR", keys=(org.key_record(org.key("hr")),),
        delegation=Delegation(source="scim", groups=tuple(GroupDelegation(group=one) for one in groups)),
    )  # fmt: skip


def renewed_bot(org: DualControl) -> PublicJwk:
    """Let the agent renew its key."""
    org.forward(DAY_MS)
    renewed = SigningKey.generate(f"spiffe://{TD}/agent/bot")
    org.give(
        org.claims(AgentRenewKey, "sam", iss=renewed.id, agent_id="bot", key=renewed.public),
        org.key("bot", "agent"),
    )
    return renewed.public


def wanted(org: DualControl) -> list[Any]:
    """Commands that wait, of all types that the page shows, about subjects that there are and that there are not."""
    org.give(add_key(org, "sam", "sam", new_key("sam")))
    renewed_bot(org)
    org.give(org.claims(AgentSuspend, "olga", agent_id="bot", reason="x"))
    org.seconded("otto", directory_of_leads(org, "Leads"))
    org.seconded("otto", org.target_set("olga", "platform"))
    platform = org.target_set("olga", "platform")
    bot2 = org.key_record(org.key("bot2", "agent"))
    stolen = {"replaces": (org.key("bot", "agent").kid,), "compromised": True}
    selector = AttestationSelector(issuer="https://cluster.example", claims={"sub": "web"})
    return [
        org.user_set("olga", "uma", ["sponsor"], entitlements=org.entitlements(WEB)),
        org.user_set("olga", "sam", ["sponsor", "operator"]),
        org.user_set("olga", "suzy", ["operator"], keys=()),
        add_key(org, "olga", "sam", new_key("sam")),
        directory_of_leads(org, "Leads", "Ops"),
        org.register("olga", "robot", "sam", inactive=True),
        org.claims(AgentSetCeiling, "olga", agent_id="bot", ceiling=(WEB, permission("env/db"))),
        org.claims(AgentSetAttestation, "olga", agent_id="bot", attestation=(selector,)),
        org.transfer("olga", "bot", "suzy"),
        org.claims(AgentResume, "olga", agent_id="bot", reason="x"),
        org.claims(AgentRotateKey, "olga", agent_id="bot", key=bot2),
        org.claims(AgentRotateKey, "olga", agent_id="bot", key=bot2, overlap_s=60),
        org.claims(AgentRotateKey, "olga", agent_id="bot", key=bot2, **stolen),
        platform.model_copy(update={"max_ttl_s": 3600 * 12, "delivery": "agent"}),
    ]


def set_members(state: Any) -> Any:
    """A state without what is empty, as the page compares it."""
    return {name: value for name, value in state.items() if value not in (None, False, [])}


async def test_page_computes_the_state_after_each_command_as_the_services_do(modules: Person) -> None:
    org = DualControl()
    cases, expected = [], []
    for command in wanted(org):
        proposed = org.propose(command)
        found = read_proposal(
            org.directory,
            {"command": proposed.jws, "at_ms": proposed.at_ms, "revision": proposed.revision},
        )
        entry = org.directory.entry(found.kind, found.id)
        now = claims_of(entry.compact.decode())["state"] if entry else None
        cases.append([command.typ, claims_of(proposed.jws), now, proposed.at_ms // 1000])
        assert found.then is not None, command.typ
        changes = {name for name, (one, other) in found.changes().items() if (one or None) != (other or None)}
        expected.append((set_members(state_as_json(found.then)), changes))
    script = """async (text) => {
      const { stateAfter, changesOf } = await import("./proposals.js");
      return JSON.stringify(JSON.parse(text).map(([typ, claims, now, at]) => {
        const then = stateAfter(typ, claims, now ?? undefined, at);
        return [then, changesOf(now ?? undefined, then).map(([name]) => name)];
      }));
    }"""
    shown = json.loads(await modules.page.evaluate(script, json.dumps(cases)))
    assert {command for command, *_ in cases} == set(await members_on_the_page(modules))
    for (typ, *_), (then, names), (state, changes) in zip(cases, shown, expected, strict=True):
        assert set_members(then) == state, typ
        assert set(names) == changes, typ


async def members_on_the_page(modules: Person) -> dict[str, list[str]]:
    members: dict[str, list[str]] = await modules.page.evaluate(
        "async () => (await import('./proposals.js')).PROPOSED_MEMBERS"
    )
    return members


async def test_page_knows_each_member_of_each_command_that_it_seconds(modules: Person) -> None:
    fields = {model.typ: set(model.model_fields) for model in COMMANDS}
    stamped = {"iss", "aud", "iat", "jti", "exp"}
    for typ, members in (await members_on_the_page(modules)).items():
        assert set(members) == fields[typ] - stamped, typ
