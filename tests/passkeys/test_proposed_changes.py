"""Proposals on the sign page: the state that it computes is that of the services, and it shows nothing unverified."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.async_api import expect

from ringfence.client.admin.proposals import read_proposal, state_as_json
from ringfence.client.passkeys.questions import check_answer, question_link
from ringfence.client.signed_messages import Subject, evidence_of, unstamped
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.approval import CeilingReport
from ringfence.messages.base import PublicJwk
from ringfence.messages.enrolment import AttestationSelector
from ringfence.messages.registry import (
    COMMANDS,
    AgentRenewKey,
    AgentResume,
    AgentRotateKey,
    AgentSetAttestation,
    AgentSetCeiling,
    AgentSuspend,
    CommandSecond,
    CommandWithdraw,
    Delegation,
    Entitlements,
    GroupDelegation,
    ModelLimits,
    ProvisionerSet,
    SecondedCommand,
    UserSet,
)
from ringfence.model.identity.spiffe_ids import spiffe_id
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation
from tests.passkeys.questions import Question, altered, claims_of
from tests.passkeys.test_attacks import refused
from tests.passkeys.test_page_modules import modules
from tests.support.dual_control import DAY_MS, DualControl
from tests.support.in_memory_registry import TD, permission
from tests.support.sign_page import Site
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
        org.claims(
            AgentSetCeiling,
            "olga",
            agent_id="bot",
            ceiling=(permission("env/db"),),
            limits=ModelLimits(tokens=5),
        ),
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


# --- the whole question, in a running installation ---


async def question_of(organisation: Organisation, user_id: str) -> tuple[CommandSecond, Question]:
    """Whether `user_id` seconds a ceiling of the operator, as a console composes it: the message, and the question."""
    realm = organisation.realm
    async with realm.as_operator() as olga:
        connection, directory = olga.connection, await olga.directory()
        agent = directory.agent(realm.agent)
        assert agent is not None
        ceiling = (*agent.state.ceiling, realm.permission(["write"], "env/new"))
        command = connection.compose(AgentSetCeiling, agent_id=realm.agent, ceiling=ceiling)
        jws = sign(command, organisation.operator())
        named = SecondedCommand(
            author=command.iss, command=command.jti, proposal=digest(parse(jws).signing_input),
            revision=agent.named_revision,
        )  # fmt: skip
        iss = spiffe_id(realm.settings.trust_domain, "user", user_id)
        asked = connection.compose(CommandSecond, commands=(named,)).model_copy(update={"iss": iss})
        subjects: list[Subject] = [("user", user_id), ("user", olga.id), ("agent", realm.agent)]
        policy = SigningKey.load(realm.stack.trust.service_key("policy"))
        report = CeilingReport(
            iss=policy.id, aud=command.aud, iat=command.iat, jti="report", agent_id=realm.agent, ceiling=ceiling,
            people=(olga.id, agent.state.sponsor), combinations=("push and merge",), used=(),
        )  # fmt: skip
        evidence = evidence_of(directory, connection.trust, subjects)
        return asked, {
            "user": user_id,
            "message": {"typ": asked.typ, "claims": unstamped(asked)},
            "evidence": {**evidence, "commands": [jws], "report": sign(report, policy)},
        }


def link_of(organisation: Organisation, site: Site, question: Question) -> str:
    return question_link(site.sign, json.dumps(question).encode())


@pytest.fixture
async def second(organisation: Organisation, person: Person) -> str:
    """A second operator, who has a passkey and no key file."""
    user_id: str = organisation.realm.name("otto")
    await organisation.enrol(person, user_id, ("operator",))
    return user_id


async def test_whole_ceiling_is_shown_and_seconded_with_a_passkey(
    organisation: Organisation, site: Site, person: Person, second: str
) -> None:
    asked, question = await question_of(organisation, second)
    page = await person.open(link_of(organisation, site, question))
    await expect(page.get_by_role("heading", level=1)).to_contain_text("Second a change of agent")
    for text in (
        "env/new",
        "(new, or written anew)",
        "not used in 30 days",
        "push and merge",
        "ceiling now",
        "As of",
    ):
        await expect(page.locator("dl")).to_contain_text(text)
    await page.get_by_role("button", name="Second it").click()
    answer = await page.get_by_label("Answer").input_value()
    async with organisation.realm.as_operator() as olga:
        directory, now_ms = await olga.directory(), olga.connection.clock.now_ms()
    signed = check_answer(asked, answer, directory, trust_domain=asked.aud, now_ms=now_ms)
    assert signed.claims.commands == asked.commands
    assert person.complaints == []


def other_ceiling(question: Question) -> None:
    (jws,) = question["evidence"]["commands"]
    question["evidence"]["commands"] = [altered(jws, ceiling=[])]


def other_proposal(question: Question) -> None:
    question["message"]["claims"]["commands"][0]["proposal"] = "0" * 64


def other_revision(question: Question) -> None:
    question["message"]["claims"]["commands"][0]["revision"] += 1


def other_use(question: Question) -> None:
    question["evidence"]["report"] = altered(question["evidence"]["report"], combinations=[])


def report_of_another_ceiling(question: Question) -> None:
    del question["evidence"]["commands"][0]


def other_state(question: Question) -> None:
    records = question["evidence"]["records"]
    at = next(i for i, one in enumerate(records) if "/agent/" in claims_of(one)["sub"])
    records[at] = altered(records[at], state={**claims_of(records[at])["state"], "ceiling": []})


def without_subject(question: Question) -> None:
    records = question["evidence"]["records"]
    question["evidence"]["records"] = [one for one in records if "/agent/" not in claims_of(one)["sub"]]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (other_ceiling, "its signature does not verify"),
        (other_proposal, "it is another proposal"),
        (other_revision, "and another one is signed"),
        (other_use, "policy's report: its signature does not verify"),
        (report_of_another_ceiling, "the proposed command did not come with it"),
        (other_state, "its signature does not verify"),
        (without_subject, "there is no record of its subject"),
    ],
)
async def test_tampered_proposal_is_refused_and_not_shown(
    organisation: Organisation,
    site: Site,
    person: Person,
    second: str,
    change: Callable[[Question], None],
    reason: str,
) -> None:
    _, question = await question_of(organisation, second)
    change(question)
    await refused(await person.open(link_of(organisation, site, question)), reason)


# --- a list of users and keys ---


async def list_of(organisation: Organisation, user_id: str) -> Question:
    """Whether `user_id` seconds two new users of the operator and a wider ceiling, which no list may hold."""
    realm = organisation.realm
    async with realm.as_operator() as olga:
        connection, directory = olga.connection, await olga.directory()
        agent = directory.agent(realm.agent)
        assert agent is not None
        commands = [
            connection.compose(
                UserSet, user_id=realm.name(name), name=name, roles=("sponsor",), keys=(),
                entitlements=Entitlements(scope=(), source="manual", as_of=1),
            )
            for name in ("uma", "ulf")
        ]  # fmt: skip
        ceiling = connection.compose(AgentSetCeiling, agent_id=realm.agent, ceiling=agent.state.ceiling)
        signed = [sign(one, organisation.operator()) for one in (*commands, ceiling)]
        revisions = (0, 0, agent.named_revision)
        named = [
            SecondedCommand(
                author=one.iss, command=one.jti, proposal=digest(parse(jws).signing_input), revision=revision
            )
            for one, jws, revision in zip((*commands, ceiling), signed, revisions, strict=True)
        ]
        iss = spiffe_id(realm.settings.trust_domain, "user", user_id)
        asked = connection.compose(CommandSecond, commands=tuple(named)).model_copy(update={"iss": iss})
        subjects: list[Subject] = [("user", user_id), ("user", olga.id), ("agent", realm.agent)]
        evidence = evidence_of(directory, connection.trust, subjects)
        message = {"typ": asked.typ, "claims": unstamped(asked)}
        return {"user": user_id, "message": message, "evidence": {**evidence, "commands": signed}}


def choose(question: Question, *chosen: int) -> None:
    """Leave only some of the commands, in this order."""
    claims, evidence = question["message"]["claims"], question["evidence"]
    claims["commands"] = [claims["commands"][at] for at in chosen]
    evidence["commands"] = [evidence["commands"][at] for at in chosen]


async def test_each_user_of_a_list_is_shown_and_seconded_with_one_passkey(
    organisation: Organisation, site: Site, person: Person, second: str
) -> None:
    question = await list_of(organisation, second)
    choose(question, 0, 1)
    page = await person.open(link_of(organisation, site, question))
    await expect(page.get_by_role("heading", level=1)).to_have_text("Second 2 changes of users and keys")
    for name in ("uma", "ulf"):
        await expect(page.locator("dl")).to_contain_text(f"there is no user {organisation.realm.name(name)}")
    await page.get_by_role("button", name="Second all 2").click()
    answer = parse(await page.get_by_label("Answer").input_value()).unverified_claims(CommandSecond)
    assert [one.proposal for one in answer.commands] == [
        one["proposal"] for one in question["message"]["claims"]["commands"]
    ]
    assert person.complaints == []


def commands_in_another_order(question: Question) -> None:
    choose(question, 0, 1)
    question["evidence"]["commands"].reverse()


def one_command_hidden(question: Question) -> None:
    choose(question, 0, 1)
    del question["evidence"]["commands"][1]


def one_command_twice(question: Question) -> None:
    choose(question, 0, 0)


def ceiling_among_users(question: Question) -> None:
    choose(question, 0, 2)


def no_command(question: Question) -> None:
    choose(question)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (commands_in_another_order, "it is another proposal"),
        (one_command_hidden, "did not come with it"),
        (one_command_twice, "names a subject twice"),
        (ceiling_among_users, "only users and keys are seconded in a list"),
        (no_command, "it seconds no change"),
    ],
)
async def test_list_that_hides_a_change_is_refused(
    organisation: Organisation,
    site: Site,
    person: Person,
    second: str,
    change: Callable[[Question], None],
    reason: str,
) -> None:
    question = await list_of(organisation, second)
    change(question)
    await refused(await person.open(link_of(organisation, site, question)), reason)


async def test_author_withdraws_with_a_passkey(
    organisation: Organisation, site: Site, person: Person, second: str
) -> None:
    _, question = await question_of(organisation, second)
    proposal = question["message"]["claims"]["commands"][0]["proposal"]
    claims = {"proposal": proposal, "exp": question["message"]["claims"]["exp"]}
    question["message"] = {"typ": CommandWithdraw.typ, "claims": claims}
    page = await person.open(link_of(organisation, site, question))
    await expect(page.locator("dl")).to_contain_text("env/new")
    await page.get_by_role("button", name="Withdraw it").click()
    answer = parse(await page.get_by_label("Answer").input_value())
    assert answer.unverified_claims(CommandWithdraw).proposal == proposal
