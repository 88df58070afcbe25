"""Separation of duties: ceilings that allow a forbidden combination, and leases that rest on one person."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import httpx
import pytest

from ringfence.cli.shared.changes import ceiling_findings
from ringfence.kernel.base.ids import digest
from ringfence.kernel.crypto.jws import Signed, parse
from ringfence.kernel.service.http import application
from ringfence.messages.approval import Approval
from ringfence.messages.base import Permission
from ringfence.messages.codes import Code
from ringfence.messages.credential import Coordinates, CredentialRequest
from ringfence.messages.registry import AgentDecommission, AgentSetCeiling
from ringfence.model.identity.api_tokens import api_token
from ringfence.model.records.api_access import Authenticator
from ringfence.model.records.seconders import sole_givers
from ringfence.model.requests.facts import load_context
from ringfence.policy.agents.ceilings import CeilingCombinations
from ringfence.policy.api.usage import CeilingApi
from ringfence.policy.decisions.one_person import OnePersonDetector
from ringfence.policy.domain import Case, Evaluation, RequestAllowed, refuse
from ringfence.rego.bundle import Bundle, load_bundle
from ringfence.rego.engine import CEILING
from ringfence.testing.parts import InProcessEngine
from tests.support.benches.decision_bench import DEPLOY, DecisionBench
from tests.support.dual_control import DAY_MS, DualControl
from tests.support.in_memory_registry import InMemoryRegistry


class Published:
    """The runtime of a service, as far as a detector uses it: a clock, a key, and the events that it published."""

    def __init__(self, ledger: InMemoryRegistry) -> None:
        self.clock, self.key = ledger.clock, ledger.policy
        self.events: list[dict[str, Any]] = []

    async def event(self, kind: str, subject: str, **fields: Any) -> None:
        assert kind == "finding"
        self.events.append(fields)

    @property
    def codes(self) -> list[str]:
        return [event["reasons"][0].code for event in self.events]


def verbs(*names: str, target: str = "web") -> Permission:
    return Permission(target=target, verbs=names, resources=("**",))


# --- ceilings ---


class Ceilings:
    """Policy's check of ceilings, with agents `bot` and `other` that have none."""

    def __init__(self) -> None:
        self.ledger = InMemoryRegistry()
        self.ledger.organisation()
        self.runtime = Published(self.ledger)
        engine = InProcessEngine(entry_point=CEILING)
        self.found = CeilingCombinations(cast(Any, self.runtime), self.ledger.directory, engine)
        for agent in ("bot", "other"):
            self.ledger.give(self.ledger.register("olga", agent, "sam", ceiling=()))

    async def set(self, *ceiling: Permission) -> None:
        self.ledger.give(self.ledger.claims(AgentSetCeiling, "olga", agent_id="bot", ceiling=ceiling))
        await self.found.check_marked()

    async def ask(self, who: str, body: object) -> httpx.Response:
        api = CeilingApi(Authenticator(self.ledger.directory, "policy", self.ledger.clock), self.found)
        token = api_token(self.ledger.key(who), "policy", now_ms=self.ledger.clock.ms)
        transport = httpx.ASGITransport(application(api.routes(), []))
        async with httpx.AsyncClient(transport=transport, base_url="http://policy") as client:
            return await client.post(
                "/v1/combinations", json=body, headers={"Authorization": f"Bearer {token}"}
            )


@pytest.fixture
def ceilings() -> Ceilings:
    return Ceilings()


@pytest.mark.parametrize(
    ("code", "ceiling"),
    [
        (Code.CEILING_COMBINATION, (verbs("clone", "run-ci"),)),
        (Code.CEILING_COMBINATION, (verbs("push"), verbs("merge", target="reviews"))),
        (None, (verbs("clone", "push"),)),
        (None, (verbs("pull"), verbs("merge"))),
        (None, ()),
    ],
)
async def test_ceiling_with_both_halves_is_a_finding(
    code: Code | None, ceiling: tuple[Permission, ...], ceilings: Ceilings
) -> None:
    await ceilings.set(*ceiling)
    assert ceilings.runtime.codes == ([code] if code else [])
    assert len(ceilings.found.of_agent("bot")) == (1 if code else 0)
    assert ceilings.found.of_agent("other") == []
    assert ceilings.found.unknown is None


async def test_finding_names_agent_verbs_and_the_time_of_the_ceiling(ceilings: Ceilings) -> None:
    at_ms = ceilings.ledger.clock.ms
    await ceilings.set(verbs("clone", "run-ci", "pull"))
    (event,) = ceilings.runtime.events
    assert (event["agent_id"], event["at_ms"]) == ("bot", at_ms)
    assert event["reasons"][0].message.endswith("; it allows clone, pull, and run-ci")


async def test_same_ceiling_is_reported_once_and_a_narrower_one_no_longer_listed(ceilings: Ceilings) -> None:
    await ceilings.set(verbs("clone", "run-ci"))
    await ceilings.set(verbs("clone", "run-ci", "read"))
    assert len(ceilings.runtime.events) == 1
    await ceilings.set(verbs("clone"))
    assert ceilings.found.of_agent("bot") == []
    await ceilings.set(verbs("clone", "run-ci"))
    assert len({event["about"] for event in ceilings.runtime.events}) == 2


async def test_ceiling_of_a_decommissioned_agent_is_not_listed(ceilings: Ceilings) -> None:
    await ceilings.set(verbs("clone", "run-ci"))
    ceilings.ledger.give(ceilings.ledger.claims(AgentDecommission, "olga", agent_id="bot", reason="x"))
    await ceilings.found.check_marked()
    assert ceilings.found.of_agent("bot") == []


def changed(bundle: Bundle, name: str, change: Callable[[str], str | None]) -> Bundle:
    """A bundle with one file changed, or without it."""
    texts = ((file, change(text) if file == name else text) for file, text in bundle.modules)
    return Bundle(bundle.folder, tuple((file, text) for file, text in texts if text), (), digest(name))


async def test_another_bundle_judges_all_ceilings_again(ceilings: Ceilings) -> None:
    await ceilings.set(verbs("read", "deploy"))
    assert ceilings.runtime.events == []
    await ceilings.found.use(
        changed(load_bundle(), "combinations.rego", lambda text: text.replace('"run-ci"', '"deploy"')
                .replace('"read-code"', '"read"'))
    )  # fmt: skip
    await ceilings.found.check_marked()
    assert ceilings.runtime.codes == [Code.CEILING_COMBINATION]


async def test_bundle_without_the_entry_point_leaves_combinations_unknown(ceilings: Ceilings) -> None:
    await ceilings.found.use(changed(load_bundle(), "ceiling.rego", lambda text: None))
    await ceilings.set(verbs("clone", "run-ci"))
    assert "no rule data.ringfence.ceiling.decision" in str(ceilings.found.unknown)
    assert ceilings.runtime.codes == []
    answer = await ceilings.ask("olga", {"ceiling": []})
    assert answer.status_code == 503, "an unknown answer must not read as none"
    await ceilings.found.use(load_bundle())
    assert "still being checked" in str(ceilings.found.unknown)
    await ceilings.found.check_marked()
    assert (ceilings.found.unknown, ceilings.runtime.codes) == (None, [Code.CEILING_COMBINATION])


async def test_people_who_set_ceilings_ask_for_the_combinations_of_one(ceilings: Ceilings) -> None:
    wanted = {"ceiling": [verbs("push", "merge").model_dump(mode="json")]}
    for who in ("olga", "adam", "sam"):
        (text,) = (await ceilings.ask(who, wanted)).json()["combinations"]
        assert text.startswith("what writes a change must not be what approves it")
    assert (await ceilings.ask("olga", {"ceiling": []})).json() == {"combinations": []}
    assert (await ceilings.ask("uma", wanted)).status_code == 403
    wrong: tuple[object, ...] = ({}, {"ceiling": "all"}, [])
    for body in wrong:
        assert (await ceilings.ask("olga", body)).status_code == 400


# --- one person ---


class Leases:
    """Decisions on requests of bot, whose sponsor is sam, and which works for uma. olga gave all their rights."""

    def __init__(self) -> None:
        self.bench = DecisionBench()
        self.runtime = Published(self.bench.ledger)
        self.detector = OnePersonDetector(cast(Any, self.runtime), self.bench.ledger.directory)

    async def decide(self, *approvers: str, allowed: bool = True) -> list[str]:
        bench = self.bench
        request = bench.request(scope=(DEPLOY,))
        claims = bench.decision(request).claims
        signed = Signed(parse(request).unverified_claims(CredentialRequest), request)
        source = Coordinates(topic="credential.request", partition=0, offset=0, appended_at_ms=bench.now_ms)
        ruling = RequestAllowed(600) if allowed else refuse(Code.POLICY_DENIED, "no")
        facts = load_context(bench.ledger.directory, signed, claims.request_id)
        given = [bench.approval(request, by) for by in approvers]
        approvals = [Signed(parse(one).unverified_claims(Approval), one) for one in given]
        case = Case(signed, claims.request_id, "bot", source, None)
        await self.detector.observe(case, Evaluation(ruling, facts), approvals)
        return [str(code) for code in self.runtime.codes]


@pytest.mark.parametrize(
    ("code", "approvers"),
    [(Code.ONE_PERSON, ("sam",)), (Code.ONE_PERSON, ("sam", "suzy")), (None, ("root-made",)), (None, ())],
)
async def test_lease_behind_which_one_person_is(code: Code | None, approvers: tuple[str, ...]) -> None:
    leases = Leases()
    leases.bench.ledger.give(leases.bench.ledger.user_set("root", "root-made", ["operator"]))
    assert await leases.decide(*approvers) == ([code] if code else [])


async def test_same_people_are_reported_once_a_day() -> None:
    leases = Leases()
    for _ in range(3):
        await leases.decide("sam")
    assert len(leases.runtime.events) == 1
    await leases.decide("suzy")
    assert len(leases.runtime.events) == 2
    leases.bench.ledger.clock.ms += DAY_MS
    await leases.decide("sam")
    assert len(leases.runtime.events) == 3


async def test_denied_request_is_no_finding() -> None:
    assert await Leases().decide("sam", allowed=False) == []


def test_people_whom_two_independent_people_made_rest_on_neither_alone() -> None:
    org = DualControl()
    for name in ("uma", "uri"):
        org.seconded("otto", org.user_set("olga", name, ["sponsor"]))
    assert sole_givers(org.directory, ("uma", "uri"), org.clock.ms) == frozenset()
    assert sole_givers(org.directory, ("olga",), org.clock.ms) == frozenset(), "the root gave olga hers"


def test_author_and_second_person_see_who_is_alone_behind_a_ceiling() -> None:
    ledger = InMemoryRegistry()
    ledger.organisation()

    def fields(*people: str, combinations: list[str] | None) -> dict[str, str]:
        return dict(ceiling_findings(combinations, ledger.directory, people, ledger.clock.ms))

    assert fields("olga", "otto", combinations=[]) == {}
    assert fields("sam", "suzy", combinations=[]) == {
        "one person": "sam and suzy have all rights by the word of olga alone"
    }
    assert fields("otto", combinations=["a, b"]) == {"forbidden combinations": "a, b"}
    assert "not known" in fields("otto", combinations=None)["forbidden combinations"]


def test_giver_who_is_one_of_the_three_is_found() -> None:
    ledger = InMemoryRegistry()
    ledger.organisation()
    assert sole_givers(ledger.directory, ("olga", "sam", "uma"), ledger.clock.ms) == {"olga"}
    assert sole_givers(ledger.directory, ("sam",), ledger.clock.ms) == {"olga"}
    assert sole_givers(ledger.directory, ("sam", "root"), ledger.clock.ms) == frozenset()
    assert sole_givers(ledger.directory, (), ledger.clock.ms) == frozenset()
