"""An MCP call that waits for a person: clients of 2026-07-28 are told to retry, others wait; nothing else approves."""

from __future__ import annotations

import asyncio
import hashlib
import json
from dataclasses import replace
from typing import Any

import pytest

from ringfence.gateway.contract import Attempt, McpHeaders, PresentedIdentity, Verdict
from ringfence.gateway.dataplane.denials import denial_answer
from ringfence.gateway.domain import ApprovalRequired, Refusal
from ringfence.kernel.crypto.jws import parse
from ringfence.messages.approval import ActionRequest
from ringfence.messages.registry import BackendSettings, McpRule, RequestRule, VerbFloor
from ringfence.model.http_targets import Action
from ringfence.model.mcp import canonical
from ringfence.model.mcp.headers import STATELESS
from ringfence.model.mcp.messages import CAPABILITIES_KEY, VERSION_KEY, read_message
from ringfence.model.verdict import ALLOWED, Allowed
from tests.unit.test_gateway_approving import BUNDLE, Gateway, Sent
from tests.unit.test_gateway_domain import WIDE

META = {VERSION_KEY: STATELESS, CAPABILITIES_KEY: {}}


def rule(method: str, verb: str, resource: str) -> RequestRule:
    return RequestRule(method="MCP", path="/mcp", mcp=McpRule(method=method), verb=verb, resource=resource)


class McpGateway(Gateway):
    """The gateway before a server of MCP, whose calls a person has to approve."""

    def __init__(self, *, url: str = "https://hub.example", **limits: Any) -> None:
        super().__init__(**limits)
        self.by_path = url.startswith("stdio:")
        backend = BackendSettings.model_validate({"kind": "jwt", "url": url})
        rules = (
            rule("tools/call", "deploy", "env/{arguments.env}"),
            rule("response", "read", "env/server"),
            rule("completion/complete", "deploy", "env/server"),
        )
        verbs = (VerbFloor(verb="read"), VerbFloor(verb="deploy"))
        self.ledger.give(
            self.ledger.target_set("olga", "staging", backend=backend, requests=rules, verbs=verbs)
        )
        self.lease_id = self.place.leased(WIDE).lease_id

    async def answer(
        self, chosen: Any, action: Action, **context: Any
    ) -> Allowed | Refusal | ApprovalRequired:
        if self.denies is not None:
            return self.denies
        return ApprovalRequired("sponsor", BUNDLE) if action.verb == "deploy" else ALLOWED

    def posted(self, said: dict[str, Any], *versions: str) -> Attempt:
        method, name = said["method"], said["params"].get("name")
        fields = (("mcp-method", method), *((("mcp-name", name),) if name else ()))
        carried = McpHeaders("application/json", versions=versions, mcp_fields=fields if versions else ())
        attempt = self.attempt(
            "POST", "/mcp", body=json.dumps(said).encode(), json=True, mcp_headers=carried,
            headers=lambda: (("content-type", "application/json"), *fields),
        )  # fmt: skip
        return replace(attempt, authority=None, target_id="staging") if self.by_path else attempt

    async def ask(self, said: dict[str, Any], *versions: str) -> Verdict:
        return await self.gate.decide(PresentedIdentity(), self.posted(said, *versions), holdable=Sent(None))


@pytest.fixture
async def gateway() -> McpGateway:
    return McpGateway()


def call(id: Any = 1, env: str = "staging", meta: Any = META, **params: Any) -> dict[str, Any]:
    given = {"name": "deploy", "arguments": {"env": env, "n": 1}, **params}
    return {"jsonrpc": "2.0", "id": id, "method": "tools/call", "params": {**given, "_meta": meta}}


def answered(verdict: Verdict) -> dict[str, Any]:
    """What the client gets."""
    status, _, body = denial_answer(verdict)
    said: dict[str, Any] = json.loads(body)
    return {"status": status, **said}


def state_of(verdict: Verdict) -> str:
    result = answered(verdict)["result"]
    assert result.keys() == {"resultType", "requestState"}
    assert result["resultType"] == "input_required"
    return str(result["requestState"])


def question(gateway: McpGateway) -> ActionRequest:
    return parse(gateway.sent[-1][1]).unverified_claims(ActionRequest)


async def test_a_client_is_told_to_retry_and_goes_on_once_a_person_said_yes(gateway: McpGateway) -> None:
    first = await gateway.ask(call(), STATELESS)
    assert (first.allowed, first.reasons[0].code) == (False, "approval_pending")
    state = state_of(first)
    assert answered(first)["id"] == 1
    assert (
        question(gateway).body_digest
        == hashlib.sha256(canonical.canonical_form(read_message(json.dumps(call()).encode()))).hexdigest()
    )
    await gateway.said()
    other_meta = {**META, "com.acme/dry-run": False, "progressToken": 7}
    again = await gateway.ask(call("second", meta=other_meta, requestState=state), STATELESS)
    assert again.allowed, again.reasons
    assert len(gateway.sent) == 1, "it is the same question"
    assert again.body is not None
    sent = json.loads(again.body)
    assert sent == {
        "jsonrpc": "2.0", "id": "second", "method": "tools/call", "params": {
            "name": "deploy", "arguments": {"env": "staging", "n": 1}, "_meta": {**META, "progressToken": 7},
        },
    }  # fmt: skip
    once_more = await gateway.ask(call(3), STATELESS)
    assert once_more.reasons[0].code == "approval_pending"
    assert len(gateway.sent) == 2, "an approval counts once"


async def test_a_question_about_a_server_in_a_run_names_its_target(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such a server is nowhere: its record has no URL that a person could read."""
    monkeypatch.setattr("ringfence.gateway.decision.gate._check_run_socket", lambda *of: ALLOWED)
    gateway = McpGateway(url="stdio://run")
    state = state_of(await gateway.ask(call(), STATELESS))
    assert question(gateway).url == "http://staging/mcp"
    await gateway.said()
    assert (await gateway.ask(call(2, requestState=state), STATELESS)).allowed


async def test_outside_of_its_run_nobody_is_asked_about_a_server() -> None:
    gateway = McpGateway(url="stdio://run")
    verdict = await gateway.ask(call(), STATELESS)
    assert (verdict.allowed, verdict.status, verdict.reasons[0].code) == (False, 403, "stdio_outside_run")
    assert gateway.sent == []


async def test_a_retry_is_held_until_the_answer_comes(gateway: McpGateway) -> None:
    state = state_of(await gateway.ask(call(), STATELESS))
    retried = asyncio.create_task(gateway.ask(call(2, requestState=state), STATELESS))
    while not any(one.waiting for one in gateway.questions):
        await asyncio.sleep(0)
    assert await gateway.still_waits(retried)
    await gateway.said()
    assert (await retried).allowed


async def test_a_retry_that_was_held_in_vain_is_told_to_retry_again() -> None:
    gateway = McpGateway(wait_s=0.01)
    state = state_of(await gateway.ask(call(), STATELESS))
    again = state_of(await gateway.ask(call(2, requestState=state), STATELESS))
    assert len(gateway.sent) == 1
    await gateway.said()
    assert (await gateway.ask(call(3, requestState=again), STATELESS)).allowed


async def test_a_no_is_an_error(gateway: McpGateway) -> None:
    state = state_of(await gateway.ask(call(), STATELESS))
    await gateway.said(gateway.claims(verdict="denied"))
    denied = answered(await gateway.ask(call(2, requestState=state), STATELESS))
    assert (denied["status"], denied["error"]["code"], denied["error"]["data"]["code"]) == (
        200, 403, "approval_denied",
    )  # fmt: skip


@pytest.mark.parametrize(
    "responses",
    [{}, {"approval": {"action": "accept", "content": {"approved": True}}}, {"a": {"action": "accept"}}],
)
async def test_no_input_response_approves(gateway: McpGateway, responses: dict[str, Any]) -> None:
    state = state_of(await gateway.ask(call(), STATELESS))
    verdict = await gateway.ask(call(2, requestState=state, inputResponses=responses), STATELESS)
    assert (verdict.allowed, verdict.reasons[0].code) == (False, "mcp_state_other_call")
    alone = await gateway.ask(call(3, inputResponses={"a": {"action": "accept"}}), STATELESS)
    assert (alone.allowed, alone.reasons[0].code) == (False, "mcp_state_missing")


async def test_a_yes_is_for_that_call_alone(gateway: McpGateway) -> None:
    state = state_of(await gateway.ask(call(), STATELESS))
    await gateway.said()
    other = await gateway.ask(call(2, "production", requestState=state), STATELESS)
    assert (other.allowed, other.reasons[0].code) == (False, "mcp_state_other_call")
    without = await gateway.ask(call(3, "production"), STATELESS)
    assert (without.allowed, without.reasons[0].code) == (False, "approval_pending")
    assert question(gateway).resource == "env/production"


async def test_the_servers_own_state_goes_along(gateway: McpGateway) -> None:
    """A round of the server is approved as any call, with what the client answers in it."""
    requests, lease = gateway.gate._mcp, gateway.table.get(gateway.lease_id)
    assert lease is not None
    digest = canonical.call_digest(read_message(json.dumps(call()).encode()))
    sealed = requests._sealed("server", lease, digest, "the server's own")
    responses = {"a": {"action": "accept"}}
    first = await gateway.ask(call(requestState=sealed, inputResponses=responses), STATELESS)
    state = state_of(first)
    await gateway.said()
    again = await gateway.ask(call(2, requestState=state, inputResponses=responses), STATELESS)
    assert again.allowed, again.reasons
    params = json.loads(again.body or b"")["params"]
    assert (params["requestState"], params["inputResponses"]) == ("the server's own", responses)
    changed = {"a": {"action": "decline"}}
    other = await gateway.ask(call(3, requestState=state, inputResponses=changed), STATELESS)
    assert other.reasons[0].code == "mcp_state_other_call"


async def test_a_client_of_before_waits_and_a_retry_with_another_id_finds_its_answer(
    gateway: McpGateway,
) -> None:
    waits = asyncio.create_task(gateway.ask(call(meta={}), "2025-11-25"))
    while not any(one.waiting for one in gateway.questions):
        await asyncio.sleep(0)
    assert await gateway.still_waits(waits)
    waits.cancel()
    await asyncio.gather(waits, return_exceptions=True)
    await gateway.said()
    again = await gateway.ask(call("other", meta={"progressToken": 1, "com.acme/x": 2}), "2025-11-25")
    assert again.allowed
    assert len(gateway.sent) == 1
    assert json.loads(again.body or b"") == {
        "jsonrpc": "2.0", "id": "other", "method": "tools/call", "params": {
            "name": "deploy", "arguments": {"env": "staging", "n": 1}, "_meta": {"progressToken": 1},
        },
    }  # fmt: skip


async def test_method_without_input_rounds_waits_in_every_revision(gateway: McpGateway) -> None:
    said = {
        "jsonrpc": "2.0", "id": 1, "method": "completion/complete", "params": {
            "ref": {"type": "ref/prompt", "name": "a"}, "argument": {"name": "b", "value": "c"}, "_meta": META,
        },
    }  # fmt: skip
    waits = asyncio.create_task(gateway.ask(said, STATELESS))
    while not any(one.waiting for one in gateway.questions):
        await asyncio.sleep(0)
    await gateway.said()
    assert (await waits).allowed


async def test_a_number_that_cannot_be_told_exactly_is_not_asked_about(gateway: McpGateway) -> None:
    verdict = await gateway.ask(call(arguments={"env": "staging", "n": 2**60}), STATELESS)
    assert verdict.reasons[0].code == "action_unshowable"
    assert gateway.sent == []
