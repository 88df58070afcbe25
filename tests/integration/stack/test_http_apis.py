"""The OpenAPI documents and the running services say the same."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import ServiceRole
from ringfence.model.identity.api_tokens import api_token
from tests.support.http_client import plain_client
from tests.support.openapi import Document, path_of
from tests.support.stack import WITHIN_S, RunningStack, first_pending

SERVICES: tuple[ServiceRole, ...] = ("registry", "policy", "issuer", "revoker", "audit", "gateway")
NOBODY = str(uuid.UUID(int=4, version=4))
ELSEWHERE = {
    "GET /v1/runs/{id}": "there is no runner in this stack: tests/runner",
    "GET /v1/action-approvals/{request_id}": "no action waits: tests/flows/test_gateway_approvals.py",
    "GET /v1/action-approvals/{request_id}/evidence": "no action waits: tests/console",
    "GET /v1/grants/{grant_id}": "there is no grant: tests/flows/test_grants.py",
}
"""Operations that answer 404 here as the document says, and where they are tested with more."""
CONSOLES = {"GET /v1/trust", "GET /v1/passkeys/{credential_id}"}
"""For consoles alone: tests/console."""


class Calls:
    """Calls a service as its document says, and notes what does not fit."""

    def __init__(self, realm: RunningStack, service: ServiceRole) -> None:
        self.realm, self.service = realm, service
        self.document = Document(service)
        self.http = plain_client(base_url=realm.stack.url(service), timeout=WITHIN_S, trust_env=False)
        self.called: set[str] = set()

    def token(self, key: SigningKey) -> dict[str, str]:
        token = api_token(key, self.service, now_ms=int(time.time() * 1000))
        return {"Authorization": f"Bearer {token}"}

    async def call(
        self, operation: str, key: SigningKey | None, values: dict[str, str], **options: Any
    ) -> httpx.Response:
        """One call; the answer fits the document."""
        self.called.add(operation)
        answer = await self.http.request(
            operation.partition(" ")[0], path_of(operation, values), headers=self.token(key) if key else {}, **options
        )  # fmt: skip
        assert self.document.problems(operation, answer) == []
        return answer


@pytest.fixture
async def waiting(realm: RunningStack) -> AsyncIterator[dict[str, str]]:
    """A realm with a live lease and a request that waits for sam: the values for the variables of paths."""
    async with realm.as_agent() as agent, realm.sponsor() as sam:
        lease = await realm.read(agent, ttl_s=900)
        asking = asyncio.create_task(
            agent.request(
                task=realm.task, target=realm.target, verbs=["write"], resources=["env/staging/web"], reason="to try",
                timeout_s=WITHIN_S * 2,
            )
        )  # fmt: skip
        pending = await first_pending(sam)
        yield {
            "lease_id": lease.lease_id, "request_id": pending.request_id, "agent_id": realm.agent, "tree": "0",
            "grant_id": NOBODY, "credential_id": "a" * 24, "uid": NOBODY, "id": lease.lease_id,
        }  # fmt: skip
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


QUERIES: dict[str, dict[str, str]] = {
    "GET /v1/checkpoints/{tree}/consistency": {"from": "1"},
    "GET /v1/reach": {"target": "TARGET"},
    "GET /v1/who": {"target": "TARGET"},
    "GET /v1/events": {"limit": "3"},
    "GET /v1/export": {"limit": "3"},
    "GET /v1/actions": {"limit": "3"},
}


@pytest.mark.parametrize("service", SERVICES)
async def test_every_documented_operation_answers_as_described(
    realm: RunningStack, waiting: dict[str, str], service: ServiceRole
) -> None:
    calls = Calls(realm, service)
    olga = SigningKey.load(realm.stack.trust.user_key(realm.stack.options.operator))
    async with calls.http:
        for operation, described in calls.document.operations().items():
            if described["security"]:
                refused = await calls.call(operation, None, waiting)
                assert refused.status_code == 401, operation
            elif operation == "POST /v1/enrol":
                refused = await calls.call(operation, None, waiting, content=b"no.jws.here")
                assert refused.status_code == 400
            if not operation.startswith("GET ") or operation in CONSOLES:
                continue
            values = await _values(calls, operation, waiting, olga)
            query = {
                name: value.replace("TARGET", realm.target)
                for name, value in QUERIES.get(operation, {}).items()
            }
            caller = olga if described["security"] else None
            if operation.endswith("/evidence"):
                caller = realm.key("user", realm.name("sam"))
            if operation == "GET /v1/leases/{lease_id}/sealed-credential":
                continue  # for gateways: tests/flows/test_delivery.py
            answer = await _once_there(calls, operation, caller, values, query, operation in ELSEWHERE)
            if operation == "GET /v1/inventory":
                waiting["cursor"] = answer.json()["cursor"]
    assert calls.called == set(calls.document.operations())


async def _values(calls: Calls, operation: str, waiting: dict[str, str], olga: SigningKey) -> dict[str, str]:
    """The values for the path of an operation."""
    kinds = {
        "users": calls.realm.name("sam"),
        "agents": calls.realm.agent,
        "targets": calls.realm.target,
        "tasks": calls.realm.task,
    }
    kind = operation.removeprefix("GET /v1/").partition("/")[0]
    values = {**waiting, "id": kinds.get(kind, waiting["id"])}
    if operation == "GET /v1/inventory/changes":
        QUERIES[operation] = {"after": waiting["cursor"]}
    if operation in ("GET /v1/events/{uid}/proof", "GET /v1/checkpoints/{tree}/consistency"):
        async with asyncio.timeout(WITHIN_S):
            while True:
                page = await calls.call(
                    "GET /v1/events", olga, waiting, params={"lease": waiting["lease_id"]}
                )
                if page.json()["events"]:
                    values["uid"] = page.json()["events"][0]["metadata"]["uid"]
                    values["tree"] = str(page.json()["events"][0]["unmapped"]["chain"]["tree"])
                    break
                await asyncio.sleep(0.05)
    if operation.startswith("GET /v1/decisions/"):
        async with asyncio.timeout(WITHIN_S):
            while (lease := await _lease(calls.realm, waiting["lease_id"], olga)) is None:
                await asyncio.sleep(0.05)
        values["request_id"] = lease["request_id"]
    return values


async def _lease(realm: RunningStack, lease_id: str, olga: SigningKey) -> Any:
    calls = Calls(realm, "revoker")
    async with calls.http:
        answer = await calls.call("GET /v1/leases/{id}", olga, {"id": lease_id})
        return answer.json() if answer.status_code == 200 else None


async def _once_there(
    calls: Calls,
    operation: str,
    caller: SigningKey | None,
    values: dict[str, str],
    query: dict[str, str],
    missing: bool,
) -> httpx.Response:
    """The answer once the service has heard of all; of what is not here, the documented refusal."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            answer = await calls.call(operation, caller, values, params=query)
            if answer.status_code == (404 if missing else 200):
                return answer
            # Not yet: it has not heard of the caller, or of what is asked for, or has not signed a checkpoint.
            assert answer.status_code in (401, 404, 503) or "no_proof" in answer.text, (
                f"{operation}: {answer.text}"
            )
            await asyncio.sleep(0.05)


async def test_posts_of_targets_answer_as_described(realm: RunningStack) -> None:
    key = realm.key("target", realm.target)
    question = {
        "subject": {"type": "agent", "id": realm.agent}, "action": {"name": "read"},
        "resource": {"type": realm.target, "id": "env/staging/web"}, "context": {"task_id": realm.task},
    }  # fmt: skip
    posts: list[tuple[ServiceRole, str, dict[str, Any], int]] = [
        ("issuer", "POST /oauth2/introspect", {"data": {"token": "none"}}, 200),
        ("issuer", "POST /oauth2/introspect", {"data": {"no": "token"}}, 400),
        ("policy", "POST /access/v1/evaluation", {"json": question}, 200),
        ("policy", "POST /access/v1/evaluation", {"json": {}}, 400),
        ("policy", "POST /access/v1/evaluations", {"json": {"evaluations": [question, question]}}, 200),
    ]
    for service, operation, options, status in posts:
        calls = Calls(realm, service)
        async with calls.http, asyncio.timeout(WITHIN_S):
            while (answer := await calls.call(operation, key, {}, **options)).status_code == 401:
                await asyncio.sleep(0.05)  # it has not heard of the target yet
            assert answer.status_code == status, answer.text


async def test_the_api_for_agents_answers_as_described(realm: RunningStack) -> None:
    document = Document("gateway-agents")
    base = f"{realm.stack.door}/ringfence"
    proof = {"Content-Type": "application/jose"}
    async with plain_client(timeout=WITHIN_S, trust_env=False) as http:
        answers = {
            "GET /v1/trust": await http.get(f"{base}/v1/trust"),
            "POST /v1/requests": await http.post(
                f"{base}/v1/requests", headers=proof, content=b"no.jws.here"
            ),
            "GET /v1/requests/{id}": await http.get(f"{base}/v1/requests/{NOBODY}"),
        }
        assert answers.keys() == document.operations().keys()
        for operation, answer in answers.items():
            assert document.problems(operation, answer) == []
        assert answers["GET /v1/trust"].status_code == 200
        assert {answers[one].status_code for one in ("POST /v1/requests", "GET /v1/requests/{id}")} == {401}


def test_an_answer_that_is_not_described_is_found() -> None:
    document, operation = Document("registry"), "GET /v1/users"
    right = httpx.Response(200, json={"users": []})
    assert document.problems(operation, right) == []
    for wrong in (
        httpx.Response(418, json={}),
        httpx.Response(200, text="users"),
        httpx.Response(200, json={"people": []}),
        httpx.Response(200, json={"users": [{"id": 7}]}),
    ):
        assert document.problems(operation, wrong)
