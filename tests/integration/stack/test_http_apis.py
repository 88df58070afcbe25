"""The OpenAPI documents and the running services say the same."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Iterable
from typing import Any

import httpx
import pytest

from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.api import ConsoleToken, api_audience
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
    "GET /v1/proposals/{proposal_id}/evidence": "nothing waits for a second person: tests/flows/test_proposals.py",
    "GET /v1/grants/{grant_id}": "there is no grant: tests/flows/test_grants.py",
}
"""Operations that answer 404 here as the document says, and where they are tested with more."""
OF_A_NEW_AGENT = "GET /v1/agents/{agent_id}/ceiling-report"
"""Operators get it for agents that somebody proposes; others get 404: tests/flows/test_proposals.py."""
CONSOLES = {"GET /v1/trust", "GET /v1/passkeys/{credential_id}"}
"""For consoles alone: tests/console."""


class Calls:
    """Calls a service as its document says, and notes what does not fit."""

    def __init__(self, realm: RunningStack, service: ServiceRole) -> None:
        self.realm, self.service = realm, service
        self.document = Document(service)
        self.http = plain_client(base_url=realm.stack.url(service), timeout=WITHIN_S, trust_env=False)

    def token(self, key: SigningKey) -> dict[str, str]:
        token = api_token(key, self.service, now_ms=int(time.time() * 1000))
        return {"Authorization": f"Bearer {token}"}

    def console_token(self, key: SigningKey) -> dict[str, str]:
        """A token like a console's. What no console may read is refused before anybody looks who signed it."""
        now = int(time.time())
        domain = self.realm.stack.options.trust_domain
        claims = ConsoleToken(
            iss=key.id,
            aud=api_audience(domain, self.service),
            iat=now,
            exp=now + 60,
            jti=NOBODY,
            session="a.b.c",
        )
        return {"Authorization": f"Bearer {sign(claims, key)}"}

    async def call(
        self, operation: str, key: SigningKey | None, values: dict[str, str], **options: Any
    ) -> httpx.Response:
        """One call; the answer fits the document."""
        return await self.send(operation, self.token(key) if key else {}, values, **options)

    async def send(
        self, operation: str, headers: dict[str, str], values: dict[str, str], **options: Any
    ) -> httpx.Response:
        """One call with these header fields; the answer fits the document."""
        answer = await self.http.request(
            operation.partition(" ")[0], path_of(operation, values), headers=headers, **options
        )
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
            "grant_id": NOBODY, "credential_id": "a" * 24, "proposal_id": "0" * 64, "uid": NOBODY, "id": lease.lease_id,
            "target_id": realm.target,
        }  # fmt: skip
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)


QUERIES: dict[str, dict[str, str]] = {
    "GET /v1/checkpoints/{tree}/consistency": {"from": "1"},
    "GET /v1/reach": {"target": "TARGET"},
    "GET /v1/agents/{agent_id}/ceiling-report": {"ceiling": "[]", "people": "sam"},
    "GET /v1/who": {"target": "TARGET"},
    "GET /v1/approval-history": {"agent": "deploy-bot"},
    "GET /v1/events": {"limit": "3"},
    "GET /v1/export": {"limit": "3"},
    "GET /v1/actions": {"limit": "3"},
    "GET /v1/model-usage": {"limit": "3"},
}


@pytest.mark.parametrize("service", SERVICES)
async def test_every_documented_operation_answers_as_described(
    realm: RunningStack, waiting: dict[str, str], service: ServiceRole
) -> None:
    calls = Calls(realm, service)
    olga = SigningKey.load(realm.stack.trust.user_key(realm.stack.options.operator))
    async with calls.http:
        for operation, described in calls.document.operations().items():
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
        await _posts(calls)
        await _refusals(calls, waiting, olga)
    unseen = {f"{operation} {status}" for operation, status in calls.document.answers() - calls.document.seen}
    assert {one for one in unseen if not one.endswith(" 503")} - SOMETIMES == NOT_HERE.get(service, set())


def _for_each(operations: Iterable[str], *statuses: int) -> set[str]:
    return {f"{operation} {status}" for operation in operations for status in statuses}


SOMETIMES = {"GET /v1/events/{uid}/proof 400"}
"""Only while no checkpoint covers the event."""
NOT_HERE: dict[ServiceRole, set[str]] = {
    "registry": {
        *_for_each(CONSOLES, 200),
        *_for_each(["GET /v1/passkeys/{credential_id}"], 400, 404),
        "POST /v1/enrol 200",
        "GET /v1/proposals/{proposal_id}/evidence 200",
    },
    "policy": {
        *_for_each((one for one in ELSEWHERE if "approvals" in one or "grants" in one), 200),
        f"{OF_A_NEW_AGENT} 404",
        *_for_each(("POST /access/v1/evaluation", "POST /access/v1/evaluations"), 500),
    },
    "issuer": _for_each(["GET /v1/leases/{lease_id}/sealed-credential"], 200, 403, 404),
    "revoker": _for_each(["GET /v1/runs/{id}"], 200),
}
"""Answers that only others get: consoles (tests/flows/test_console_answers.py), instances, gateways; and those of
`ELSEWHERE`. 503 is the answer of a service that is not ready (tests/flows/test_starting_up.py), 500 that of a defect.
"""
WRONG_QUERIES: dict[str, dict[str, str]] = {
    "GET /v1/approvals": {"limit": "x"},
    "GET /v1/inventory": {"limit": "x"},
    "GET /v1/inventory/changes": {"after": "lost"},
    "GET /v1/trace/{id}": {"kind": "x"},
    "GET /v1/checkpoints/{tree}/consistency": {"from": "x"},
    "GET /v1/events": {"class": "x"},
    "GET /v1/reach": {},
    "GET /v1/who": {},
    "GET /v1/approval-history": {},
}
"""By operation: a query that it refuses. Of all others a limit that is no number."""


async def _refusals(calls: Calls, values: dict[str, str], olga: SigningKey) -> None:
    """Every operation: without a credential, with a wrong one, by a console, with a wrong query, for an unknown id."""
    for operation, described in calls.document.operations().items():
        if not described["security"]:
            continue
        values = {**values, "tree": "none", "id": "none", **dict.fromkeys(UNKNOWN, NOBODY)}
        assert (await calls.call(operation, None, values)).status_code == 401
        assert (await calls.send(operation, {"Authorization": "Bearer wrong"}, values)).status_code == 401
        if operation in CONSOLES or "/sealed-credential" in operation or not operation.startswith("GET "):
            continue
        if "403" in described["responses"]:
            assert (await calls.send(operation, calls.console_token(olga), values)).status_code == 403
        if "404" in described["responses"] and operation != OF_A_NEW_AGENT:
            answer = await calls.call(operation, olga, values)
            assert (answer.status_code, answer.json()["error"]) == (404, "not_found")
        if "400" in described["responses"] and not operation.endswith("/proof"):
            query = WRONG_QUERIES.get(operation, {"limit": "x"})
            assert (await calls.call(operation, olga, values, params=query)).status_code == 400, operation
    await _wrong_methods(calls, values)


UNKNOWN = ("request_id", "lease_id", "agent_id", "grant_id", "uid", "target_id")


async def _wrong_methods(calls: Calls, values: dict[str, str]) -> None:
    """Every path by a method that it does not have, and a path that is not there."""
    for path, methods in calls.document.content["paths"].items():
        for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - {one.upper() for one in methods}:
            answer = await calls.http.request(method, path_of(f"{method} {path}", values))
            assert (answer.status_code, answer.json()["error"]) == (405, "method_unexpected"), path
            allowed = {one.strip() for one in answer.headers["allow"].split(",")} - {"HEAD"}
            assert allowed == {one.upper() for one in methods}
    answer = await calls.http.get("/v1/nothing")
    assert (answer.status_code, answer.json()["error"]) == (404, "not_found")


async def _posts(calls: Calls) -> None:
    """Every operation with a body: one that counts, and those that do not."""
    realm, key = calls.realm, calls.realm.key("target", calls.realm.target)
    sam = realm.key("user", realm.name("sam"))
    as_sam = {"headers": lambda: calls.token(sam)}
    question = {
        "subject": {"type": "agent", "id": realm.agent}, "action": {"name": "read"},
        "resource": {"type": realm.target, "id": "env/staging/web"}, "context": {"task_id": realm.task},
    }  # fmt: skip
    others = {**question, "resource": {"type": "another", "id": "env/staging/web"}}
    json_type, too_large = {"Content-Type": "application/json"}, b" " * (1024 * 1024 + 1)
    posts: dict[ServiceRole, list[tuple[str, dict[str, Any], int]]] = {
        "registry": [
            ("POST /v1/enrol", {"content": b"no.jws.here"}, 400),
            ("POST /v1/enrol", {"content": too_large}, 413),
        ],
        "issuer": [
            ("POST /oauth2/introspect", {"data": {"token": "none"}}, 200),
            ("POST /oauth2/introspect", {"data": {"no": "token"}}, 400),
            ("POST /oauth2/introspect", {"content": too_large}, 400),
        ],
        "policy": [
            ("POST /access/v1/evaluation", {"json": question}, 200),
            ("POST /access/v1/evaluation", {"json": {}}, 400),
            ("POST /access/v1/evaluation", {"json": others}, 403),
            ("POST /access/v1/evaluation", {"content": too_large, "type": json_type}, 413),
            ("POST /access/v1/evaluations", {"json": {"evaluations": [question, others]}}, 200),
            ("POST /access/v1/evaluations", {"json": question}, 200),
            ("POST /access/v1/evaluations", {"json": {"evaluations": 7}}, 400),
            ("POST /access/v1/evaluations", {"json": others}, 403),
            ("POST /access/v1/evaluations", {"content": too_large, "type": json_type}, 413),
            ("POST /v1/combinations", {"json": {"ceiling": []}, **as_sam}, 200),
            ("POST /v1/combinations", {"json": {}, **as_sam}, 400),
            ("POST /v1/combinations", {"json": {"ceiling": []}, "headers": lambda: calls.console_token(sam)}, 403),
            ("POST /v1/combinations", {"content": too_large, "type": json_type, **as_sam}, 413),
        ],
    }  # fmt: skip
    for operation, options, status in posts.get(calls.service, []):
        more = options.pop("type", {})
        caller = options.pop("headers", lambda: calls.token(key))
        async with asyncio.timeout(WITHIN_S):
            while True:
                headers = {**caller(), **more} if calls.service != "registry" else more
                answer = await calls.send(operation, headers, {}, **options)
                if answer.status_code != 401:
                    break
                await asyncio.sleep(0.05)  # it has not heard of the target yet
        assert answer.status_code == status, (operation, answer.text)


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
            "GET /v1/tasks/{id}": await http.get(f"{base}/v1/tasks/{NOBODY}"),
        }
        assert answers.keys() == document.operations().keys()
        for operation, answer in answers.items():
            assert document.problems(operation, answer) == []
        assert answers["GET /v1/trust"].status_code == 200
        assert {answer.status_code for name, answer in answers.items() if not name.endswith("trust")} == {401}


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
