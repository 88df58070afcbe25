"""Observe mode: what goes on that would be blocked, only where it was named, and never with anything of Ringfence."""

from __future__ import annotations

from typing import Any, cast

import httpx
import pytest

from ringfence.audit import app as audit_app
from ringfence.cli.commands import serve
from ringfence.cli.main import main
from ringfence.gateway import app as gateway_app
from ringfence.gateway.contract import PresentedIdentity, Verdict
from ringfence.gateway.decision.context import STILL_DENIED
from ringfence.gateway.decision.gate import DecisionGate, DecisionLog, DecisionSettings, DecisionSteps
from ringfence.gateway.decision.model_budget import ModelMeters
from ringfence.gateway.domain import ApprovalRequired, Sender, refuse
from ringfence.gateway.proxies import HANDLE, NO_CREDENTIAL, READERS, ProxyAuth
from ringfence.gateway.settings import GatewaySettings
from ringfence.kernel.base.errors import SettingsError, UnavailableError
from ringfence.kernel.base.settings import load
from ringfence.kernel.service import process
from ringfence.messages.codes import Code
from ringfence.messages.registry import AgentSuspend, BackendSettings, TargetRemove, TaskEnd, UserDisable
from ringfence.testing.services import InMemoryBudgets
from tests.support.switches import build_options
from tests.support.unknown_field_cases import as_before, planted
from tests.unit.test_gateway_domain import GATEWAY_KEY
from tests.unit.test_gateway_gate import RULES, Parts, attempt

OWN = frozenset({"authorization"})
BEYOND = "/env/production/web"
BARE = refuse(Code.NO_CREDENTIALS, "say who you are", status=401)


class Watched(Parts):
    """The core, with `staging` only observed. `other` is at other.example, and is not named."""

    def __init__(self, *observe: str) -> None:
        super().__init__()
        ledger, played = self.place.ledger, cast(Any, self)
        backend = BackendSettings.model_validate({"kind": "jwt", "url": "https://other.example"})
        ledger.give(ledger.target_set("olga", "other", backend=backend, requests=RULES))
        self.gate = DecisionGate(
            played,
            DecisionSteps(played, self.targets, played, played, played, ModelMeters(InMemoryBudgets())),
            DecisionLog("spiffe://acme.example/service/gateway", played, self.counted),
            DecisionSettings(10**9, observe or ("staging",), **build_options("gateway")),
            clock=ledger.clock,
            key=lambda: GATEWAY_KEY,
        )

    async def ask(
        self, target: str = BEYOND, *, header_names: frozenset[str] = OWN, **fields: Any
    ) -> Verdict:
        return await self.gate.decide(
            PresentedIdentity(header_names=header_names), attempt(target=target, **fields)
        )


@pytest.fixture
def parts() -> Watched:
    return Watched()


async def test_observed_action_asks_no_approver(parts: Watched) -> None:
    parts.refuses = ApprovalRequired("sponsor", "a" * 64)
    verdict = await parts.ask("/env/staging/web")
    assert (verdict.allowed, verdict.observed, verdict.reasons[0].code) == (False, True, "approval_required")
    bare = await parts.ask("/env/staging/web", header_names=frozenset())
    assert (bare.allowed, bare.observed, bare.reasons[0].code) == (False, False, "headers_unseen"), (
        "it is asked about"
    )


async def denied(parts: Watched, verdict: Verdict) -> bool:
    """Whether it is denied, to the plane and in the record."""
    return not (verdict.allowed or verdict.observed or parts.events[-1].allowed or parts.events[-1].observed)


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"target": BEYOND}, "beyond_lease"),
        ({"target": "/env/staging/web", "method": "DELETE"}, "request_unmapped"),
        ({"target": "/r", "method": "POST"}, "body_unseen"),
    ],
)
async def test_blocked_action_is_observed_forwarded_and_recorded(
    parts: Watched, fields: dict[str, Any], code: str
) -> None:
    verdict = await parts.ask(**fields)
    assert (verdict.allowed, verdict.observed) == (False, True)
    assert verdict.target == parts.place.target()
    (event,) = parts.events
    assert (event.allowed, event.observed, event.target_id, event.agent_id) == (False, True, "staging", "bot")
    assert event.reasons[0].code == code
    with pytest.raises(UnavailableError, match="nothing is injected"):
        await parts.gate.headers_to_inject(verdict)


async def test_rule_that_is_not_understood_is_observed_without_injection(parts: Watched) -> None:
    """Whether it would be allowed is not known here; nothing of Ringfence is injected, so nothing becomes possible."""
    ledger, state = parts.place.ledger, parts.place.target()
    rules = tuple(next(planted(rule)) for rule in state.requests)
    as_before(ledger, ledger.target_set("olga", "staging", backend=state.backend, requests=rules))
    verdict = await parts.ask("/env/staging/web")
    assert (verdict.allowed, verdict.observed) == (False, True)
    assert parts.events[-1].reasons[0].code == "rule_not_understood"
    with pytest.raises(UnavailableError, match="nothing is injected"):
        await parts.gate.headers_to_inject(verdict)


async def test_allowed_action_is_unaffected_by_observe_mode(parts: Watched) -> None:
    verdict = await parts.ask("/env/staging/web")
    assert (verdict.allowed, verdict.observed, parts.events[-1].observed) == (True, False, None)
    assert await parts.gate.headers_to_inject(verdict)


async def test_a_target_that_is_not_named_is_as_strict_as_ever(parts: Watched) -> None:
    assert await denied(parts, await parts.ask(authority="other.example"))
    assert await denied(parts, await parts.ask(authority=None, target_id="other"))
    parts.refuses = BARE
    verdict = await parts.gate.decide(
        PresentedIdentity(handle="none", header_names=OWN), attempt(authority="other.example", target=BEYOND)
    )
    assert await denied(parts, verdict)


@pytest.mark.parametrize("where", [{"authority": "nowhere.example"}, {"authority": None, "target_id": "x"}])
async def test_an_unknown_target_is_denied_whoever_asks(parts: Watched, where: dict[str, Any]) -> None:
    assert await denied(parts, await parts.ask(**where))
    parts.refuses = BARE
    verdict = await parts.gate.decide(PresentedIdentity(handle="none", header_names=OWN), attempt(**where))
    assert await denied(parts, verdict)


async def test_naming_a_target_that_is_not_there_opens_nothing() -> None:
    parts = Watched("nowhere")
    assert await denied(parts, await parts.ask())
    assert await denied(parts, await parts.ask(authority=None, target_id="nowhere"))


async def test_without_a_credential_of_its_own_there_is_nothing_to_observe(parts: Watched) -> None:
    """Also of a plane that does not know observe mode: it tells of no headers."""
    for own in (frozenset(), frozenset({"accept", "dpop", "x-api-key"})):
        assert await denied(parts, await parts.ask(header_names=own))
    assert (await parts.ask(header_names=frozenset({"cookie"}))).observed


async def test_the_header_that_the_target_takes_its_secret_in_is_one(parts: Watched) -> None:
    ledger = parts.place.ledger
    backend = BackendSettings.model_validate({
        "kind": "http", "url": "https://hub.example", "auth": "header", "header": "X-Api-Key",
    })  # fmt: skip
    ledger.give(ledger.target_set("olga", "staging", backend=backend, requests=RULES))
    assert (await parts.ask(header_names=frozenset({"x-api-key"}))).observed


async def test_sender_without_credentials_is_observed_without_an_agent(parts: Watched) -> None:
    parts.refuses = BARE
    verdict = await parts.gate.decide(PresentedIdentity(handle="none", header_names=OWN), attempt())
    assert (verdict.observed, verdict.target) == (True, parts.place.target())
    (event,) = parts.events
    assert (event.agent_id, event.target_id, event.observed) == (None, "staging", True)


@pytest.mark.parametrize(
    "code",
    [
        Code.INVALID_DPOP_PROOF,
        Code.PROOF_BY_STRANGER,
        Code.PROOF_MISSING,
        Code.USE_DPOP_NONCE,
        Code.HANDLE_UNKNOWN,
        Code.CERTIFICATE_UNKNOWN,
    ],
)
async def test_invalid_credential_is_denied_while_observing(parts: Watched, code: Code) -> None:
    parts.refuses = refuse(code, "x", status=401)
    verdict = await parts.gate.decide(PresentedIdentity(handle="none", header_names=OWN), attempt())
    assert (verdict.allowed, verdict.observed) == (False, False)
    parts.refuses = refuse(Code.HANDLE_OTHER_AGENT, "x", sender=Sender("thief", None, "L"))
    assert await denied(
        parts, await parts.gate.decide(PresentedIdentity(handle="none", header_names=OWN), attempt())
    )


async def test_ended_task_stays_denied_in_observe_mode(parts: Watched) -> None:
    ledger = parts.place.ledger
    ledger.give(ledger.claims(TaskEnd, "uma", task_id=parts.place.task, reason="done"))
    verdict = await parts.ask()
    assert "task_ended" in {reason.code for reason in verdict.reasons}
    assert await denied(parts, verdict)


@pytest.mark.parametrize(
    ("model", "by", "fields", "code"),
    [
        (AgentSuspend, "sam", {"agent_id": "bot"}, "agent_suspended"),
        (UserDisable, "olga", {"user_id": "uma"}, "user_disabled"),
        (UserDisable, "olga", {"user_id": "sam"}, "agent_orphaned"),
        (TargetRemove, "olga", {"target_id": "staging"}, "target_removed"),
    ],
)
async def test_a_suspension_counts_in_observe_mode(
    parts: Watched, model: Any, by: str, fields: dict[str, str], code: str
) -> None:
    ledger = parts.place.ledger
    ledger.give(ledger.claims(model, by, **fields, reason="x"))
    verdict = await parts.ask(authority=None, target_id="staging")
    assert code in {reason.code for reason in verdict.reasons}
    assert await denied(parts, verdict)


async def test_a_cut_that_overtakes_is_no_question_of_scope(parts: Watched) -> None:
    assert "lease_cut" in STILL_DENIED
    parts.meanwhile = lambda: parts.table.revoke(parts.place.lease.lease_id, parts.place.ledger.clock.ms)
    assert await denied(parts, await parts.ask("/env/staging/web"))


async def test_a_gateway_that_cannot_decide_or_record_denies(parts: Watched) -> None:
    parts.problem = "old"
    assert await denied(parts, await parts.ask())
    parts.problem = None
    parts.refuses = RuntimeError("boom")
    assert await denied(parts, await parts.ask("/env/staging/web"))
    parts.refuses = refuse(Code.POLICY_TIMEOUT, "the bundle gave no answer", status=503)
    assert await denied(parts, await parts.ask("/env/staging/web"))
    parts.refuses, parts.full = None, True
    verdict = await parts.ask()
    assert (verdict.allowed, verdict.observed, verdict.status) == (False, False, 503)


async def test_without_the_setting_nothing_is_observed() -> None:
    parts = Parts()
    verdict = await parts.gate.decide(PresentedIdentity(header_names=OWN), attempt(target=BEYOND))
    assert (verdict.allowed, verdict.observed) == (False, False)


# --- what proxies are told ---


async def told(gate: Any, **headers: str) -> httpx.Response:
    """The answer on both ways to ask, which is the same."""
    asked = {
        "X-Forwarded-Method": "GET", "X-Forwarded-Uri": BEYOND, "X-Forwarded-Host": "hub.example",
        "X-Forwarded-Proto": "https", **headers,
    }  # fmt: skip
    envoy = {"Host": "hub.example", "X-Forwarded-Proto": "https", **headers}
    transport = httpx.ASGITransport(ProxyAuth(gate, READERS))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        answer = await http.get("/authz/fwd", headers=asked)
        other = await http.get(f"/authz/envoy{BEYOND}", headers=envoy)
    for each in (answer, other):  # each question is an action with an id of its own
        each.headers.pop("x-ringfence-problem", None)
    assert (other.status_code, other.headers) == (answer.status_code, answer.headers)
    return answer


async def test_a_proxy_is_told_to_send_the_agents_own(parts: Watched) -> None:
    answer = await told(parts.gate, Authorization="Basic b2xkOm9sZA==", X_Other="x")
    assert (answer.status_code, answer.headers["authorization"]) == (200, "Basic b2xkOm9sZA==")
    assert "x-other" not in answer.headers
    assert answer.headers["cache-control"] == "no-store"
    answer = await told(parts.gate, Cookie="session=old")
    assert (answer.status_code, answer.headers["authorization"]) == (200, NO_CREDENTIAL)
    assert "cookie" not in answer.headers


async def test_a_handle_is_no_credential_of_the_agents_own(parts: Watched) -> None:
    handle = parts.place.lease.lease_id
    assert (await told(parts.gate, Authorization=f"DPoP {handle}")).status_code == 403
    answer = await told(parts.gate, **{HANDLE: handle, "Authorization": "Bearer old"})
    assert (answer.status_code, answer.headers["authorization"]) == (200, "Bearer old")
    assert handle not in str(answer.headers)
    twice = await told(parts.gate, **{HANDLE: handle, "Authorization": f"DPoP {handle}"})
    assert twice.status_code == 403


async def test_an_agent_cannot_ask_for_it() -> None:
    gate = Parts().gate
    for name in ("X-Ringfence-Observe", "X-Observe", "X-Ringfence-Observed"):
        answer = await told(gate, **{name: "staging", "Authorization": "Bearer old"})
        assert answer.status_code == 403


# --- the setting ---


def test_targets_are_named_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load(GatewaySettings).observe == ()
    monkeypatch.setenv("RINGFENCE_GATEWAY_OBSERVE", "partner, hub")
    assert load(GatewaySettings).observe == ("partner", "hub")
    for wrong in ("*", "partner,*", "hub*"):
        monkeypatch.setenv("RINGFENCE_GATEWAY_OBSERVE", wrong)
        with pytest.raises(SettingsError, match="RINGFENCE_GATEWAY_OBSERVE"):
            load(GatewaySettings)


def test_serve_hands_what_it_was_told_to_the_gateway_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    told_to: dict[str, Any] = {}

    def build(settings: Any, own: GatewaySettings) -> None:
        told_to["gateway"] = own.observe

    monkeypatch.setattr(gateway_app, "build", build)
    monkeypatch.setattr(audit_app, "build", lambda settings: None)
    monkeypatch.setattr(process, "run", lambda runtimes, settings: 0)
    monkeypatch.setattr(serve, "check", lambda services: None)
    monkeypatch.setenv("RINGFENCE_GATEWAY_OBSERVE", "other")
    assert main(["serve", "audit", "gateway", "--observe", "staging", "--observe", "hub"]) == 0
    assert told_to == {"gateway": ("staging", "hub")}
    assert main(["serve", "audit", "--observe", "staging"]) == 2
    assert main(["serve", "gateway", "--observe", "*"]) == 1
