"""What the gateway answers proxies, whatever they ask: 200 with the headers to inject, 401, or 403."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from ringfence.client.agent.dpop import proof
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.dev.processes import LOOPBACK
from ringfence.gateway.proxies import PROBLEM
from ringfence.model.http_targets import MAX_BODY_BYTES
from tests.gateway_external.agent import HOST, Agent, Answer, Headers, exchange, request
from tests.gateway_external.conftest import HUB, Stage, next_action
from tests.support.benches.gateway_flows import action
from tests.support.benches.sdk_clients import client

FORWARDED = (("X-Forwarded-Host", HOST), ("X-Forwarded-Proto", "https"))
NOTE = b'{"kind": "note"}'


@pytest.fixture(scope="module")
async def agent(stage: Stage) -> Agent:
    """With a lease to read below `/a`."""
    return await stage.agent(stage.proxy.port, "read")


async def ask(
    agent: Agent,
    where: str,
    headers: Headers = (),
    body: bytes | None = None,
    *,
    method: str = "GET",
    about: tuple[str, str] = ("GET", f"https://{HOST}/a/x"),
    host: str = HOST,
) -> Answer:
    """The answer to a question, by an agent whose proof is for the request `about`."""
    answer = Answer(0)
    for _ in range(2):
        made = proof(agent.key, *about, access_token=agent.handle, now_s=int(time.time()), nonce=agent.nonce)
        shown = [("Authorization", f"DPoP {agent.handle}"), ("DPoP", made), *headers]
        answer = await put(agent.port, request(method, where, shown, body, host=host))
        agent.nonce = answer.get("DPoP-Nonce") or agent.nonce
        if "use_dpop_nonce" not in answer.get("WWW-Authenticate"):
            break
    return answer


async def put(port: int, raw: bytes) -> Answer:
    reader, writer = await asyncio.open_connection(LOOPBACK, port)
    try:
        return await exchange(reader, writer, raw)
    finally:
        writer.close()


def told(method: str = "GET", uri: str = "/a/x") -> list[tuple[str, str]]:
    return [*FORWARDED, ("X-Forwarded-Method", method), ("X-Forwarded-Uri", uri)]


JSON = ("Content-Type", "application/json")


def allowed(answer: Answer) -> bool:
    """Whether it is a 200; else it is a refusal as it should be."""
    if answer.status == 200:
        assert answer.get("Authorization").startswith("Bearer ey")
        return True
    assert answer.status in (401, 403)
    assert answer.get("Authorization") == ""
    assert answer.get("Content-Type") == "application/problem+json"
    assert answer.get("Cache-Control") == "no-store"
    problem = answer.json()
    assert problem["status"] == answer.status
    short = json.loads(answer.get(PROBLEM))
    assert (short["code"], short["status"]) == (problem["code"], answer.status)
    assert len(answer.get(PROBLEM)) <= 2048
    return False


async def test_each_proxy_form_of_question_is_answered(agent: Agent) -> None:
    assert allowed(await ask(agent, "/authz/fwd/hub", told()))
    assert allowed(await ask(agent, "/authz/envoy-target/hub/a/x", FORWARDED[1:]))
    by_host = ("GET", f"https://{HUB}/a/x")
    at_hub = [("X-Forwarded-Host", HUB), *told()[1:]]
    assert allowed(await ask(agent, "/authz/fwd", at_hub, about=by_host))
    assert allowed(await ask(agent, "/authz/envoy/a/x", FORWARDED[1:], about=by_host, host=HUB))


@pytest.mark.parametrize(
    ("where", "code"),
    [
        ("/authz/envoy-target/hub/b/x", "beyond_lease"),
        ("/authz/envoy-target/hub/a/x?%zz", "200"),
        ("/authz/envoy-target/hub/a//x", "invalid_dpop_proof"),
        ("/authz/envoy-target/hub/a/..%2f..%2fb", "invalid_dpop_proof"),
        ("/authz/envoy-target/hub/a%0ax", "invalid_dpop_proof"),
        ("/authz/envoy-target/nowhere/a/x", "target_unknown"),
        ("/authz/envoy/a/x", "target_unknown"),
        ("/authz/envoy", "question_invalid"),
        ("/authz/envoy-target/hub", "question_invalid"),
        ("/authz/envoy-target//a/x", "question_invalid"),
        ("/authz/envoy-target/hub*", "question_invalid"),
        ("/authz/fwd/", "target_unknown"),
        ("/authz/fwd/hub/a/x", "target_unknown"),
        ("/authz/fwd/hub?body=none", "question_invalid"),
        ("/authz/fwd/hub?body=whole&x", "question_invalid"),
        ("/authz", "question_invalid"),
        ("/", "question_invalid"),
    ],
)
async def test_another_place_is_another_question(agent: Agent, where: str, code: str) -> None:
    about = ("GET", f"https://{HOST}/b/x") if "/b/x" in where else ("GET", f"https://{HOST}/a/x")
    answer = await ask(agent, where, told(), about=about)
    assert allowed(answer) == (code == "200")
    assert code == "200" or answer.json()["code"] == code


@pytest.mark.parametrize("method", ["HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PROPFIND", "TRACE"])
async def test_envoy_asks_with_the_method_of_the_request(agent: Agent, method: str) -> None:
    about = (method, f"https://{HOST}/a/x")
    answer = await ask(agent, "/authz/envoy-target/hub/a/x", FORWARDED[1:], method=method, about=about)
    assert answer.status == 403
    assert "Bearer" not in str(answer.headers)


@pytest.mark.parametrize("name", [name for name, _ in told()])
async def test_missing_or_repeated_proxy_header_is_refused(agent: Agent, name: str) -> None:
    said = [pair for pair in told() if pair[0] == name]
    for headers in ([pair for pair in told() if pair[0] != name], told() + said, [*told(), (name, "")]):
        answer = await ask(agent, "/authz/fwd/hub", headers)
        assert not allowed(answer)
        assert answer.json()["code"] == "question_invalid"


@pytest.mark.parametrize("name", ["Authorization", "DPoP"])
async def test_repeated_agent_credential_header_is_refused(agent: Agent, name: str) -> None:
    for where, headers in (("/authz/fwd/hub", told()), ("/authz/envoy-target/hub/a/x", FORWARDED[1:])):
        answer = await ask(agent, where, [*headers, (name, "x")])
        assert not allowed(answer)
        assert answer.json()["code"] == "question_invalid"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("X-Forwarded-Uri", "https://hub.gateway.example/a/x"), ("X-Forwarded-Uri", "a/x"), ("X-Forwarded-Uri", ""),
        ("X-Forwarded-Proto", "ws"), ("X-Forwarded-Proto", "https, http"), ("X-Forwarded-Host", ""),
    ],
)  # fmt: skip
async def test_malformed_forwarded_request_is_refused(agent: Agent, name: str, value: str) -> None:
    answer = await ask(
        agent, "/authz/fwd/hub", [pair for pair in told() if pair[0] != name] + [(name, value)]
    )
    assert not allowed(answer)
    assert answer.json()["code"] == "question_invalid"


async def test_a_fragment_cannot_hide_the_rest(agent: Agent) -> None:
    answer = await ask(agent, "/authz/envoy-target/hub/a/x#/../../b", FORWARDED[1:])
    assert answer.status == 400
    answer = await ask(agent, "/authz/fwd/hub", told(uri="/a/x#/b"))
    assert not allowed(answer)


async def test_a_body_counts_only_where_the_configuration_says_that_it_is_whole(agent: Agent) -> None:
    about = ("POST", f"https://{HOST}/a/x")
    answer = await ask(agent, "/authz/fwd/hub", [*told("POST"), JSON], NOTE, about=about)
    assert not allowed(answer)
    assert answer.json()["code"] == "body_unseen"
    assert allowed(await ask(agent, "/authz/fwd/hub?body=whole", [*told("POST"), JSON], NOTE, about=about))
    answer = await ask(agent, "/authz/fwd/hub?body=whole", told("POST"), about=about)
    assert not allowed(answer)
    assert answer.json()["code"] == "request_unmapped"


async def test_a_person_is_asked_only_where_the_configuration_promises_all_headers(stage: Stage) -> None:
    agent = await stage.agent(stage.proxy.port, "read", "merge")
    about, plain = ("PATCH", f"https://{HOST}/a/x"), ("Content-Type", "text/plain")
    sent = [*told("PATCH"), plain, ("X-Note", "s3cret-of-the-agent")]
    for where, shown in (
        ("/authz/fwd/hub?body=whole", sent),
        ("/authz/fwd/hub?body=whole&headers=whole", [*sent, ("traceparent", "00-1")]),
    ):
        answer = await ask(agent, where, shown, b"merge it", about=about)
        assert (answer.status, answer.json()["code"]) == (403, "headers_unseen")
    envoy = [*FORWARDED[1:], plain, ("x-envoy-auth-partial-body", "false")]
    answer = await ask(agent, "/authz/envoy-target/hub/a/x", envoy, b"merge it", method="PATCH", about=about)
    assert (answer.status, answer.json()["code"]) == (403, "headers_unseen")
    whole = "/authz/fwd/hub?body=whole&headers=whole"
    async with Sponsor.connect(stage.desk.sam.key, client(stage.world)) as sam:
        asking = asyncio.create_task(ask(agent, whole, sent, b"merge it", about=about))
        pending = await next_action(sam)
        values = {one.name: one.value for one in pending.headers}
        assert (values["content-type"], values["x-note"]) == ("text/plain", None)
        assert not {"authorization", "dpop", "x-forwarded-uri", "host"} & set(values)
        other = [*told("PATCH"), ("Content-Type", "text/html"), sent[-1]]
        changed = asyncio.create_task(ask(agent, whole, other, b"merge it", about=about))
        second = await next_action(sam, pending.digest)
        assert second.headers_digest != pending.headers_digest
        await sam.approve_action(pending)
        assert allowed(await asking)
        await sam.deny_action(second)
        assert (await changed).json()["code"] == "approval_denied"


async def test_a_proxy_that_waits_no_more_uses_up_no_yes(stage: Stage) -> None:
    agent = await stage.agent(stage.proxy.port, "read", "merge")
    about, where = ("PATCH", f"https://{HOST}/a/x"), "/authz/fwd/hub?body=whole&headers=whole"
    sent = [*told("PATCH"), ("Content-Type", "text/plain")]
    async with Sponsor.connect(stage.desk.sam.key, client(stage.world)) as sam:
        asking = asyncio.create_task(ask(agent, where, sent, b"merge this", about=about))
        pending = await next_action(sam)
        asking.cancel()
        left = await action(stage.world, lease_id=agent.handle, allowed=False)
        assert left.reasons[0].code == "client_gone"
        await sam.approve_action(pending)
        assert allowed(await ask(agent, where, sent, b"merge this", about=about))


async def test_envoy_says_itself_whether_a_body_is_whole(agent: Agent) -> None:
    about = ("POST", f"https://{HOST}/a/x")
    for said, code in (
        (["false"], ""),
        ([], "body_unseen"),
        (["true"], "question_invalid"),
        (["false", "true"], "question_invalid"),
        (["FALSE"], "question_invalid"),
    ):
        headers = [FORWARDED[1], JSON, *(("X-Envoy-Auth-Partial-Body", value) for value in said)]
        answer = await ask(agent, "/authz/envoy-target/hub/a/x", headers, NOTE, method="POST", about=about)
        assert allowed(answer) == (not code)
        assert not code or answer.json()["code"] == code


async def test_a_body_that_is_longer_than_what_is_looked_at_was_not_seen(agent: Agent) -> None:
    about = ("POST", f"https://{HOST}/a/x")
    for size, code in ((MAX_BODY_BYTES, "request_unmapped"), (MAX_BODY_BYTES + 1, "body_unseen")):
        answer = await ask(
            agent, "/authz/fwd/hub?body=whole", [*told("POST"), JSON], b"x" * size, about=about
        )
        assert not allowed(answer)
        assert answer.json()["code"] == code


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ([("Content-Type", "application/x-www-form-urlencoded")], "body_not_json"),
        ([], "body_not_json"),
        ([("Content-Type", "application/json; charset=utf-7")], "body_not_json"),
        ([JSON, ("Content-Encoding", "gzip")], "body_not_json"),
        ([JSON, JSON], "question_invalid"),
        ([("Content-Type", "application/merge-patch+json; charset=utf-8")], ""),
    ],
)
async def test_a_body_counts_only_as_what_its_head_says_it_is(
    agent: Agent, said: list[tuple[str, str]], code: str
) -> None:
    about = ("POST", f"https://{HOST}/a/x")
    whole = ("X-Envoy-Auth-Partial-Body", "false")
    for path, headers in (
        ("/authz/fwd/hub?body=whole", [*told("POST"), *said]),
        ("/authz/envoy-target/hub/a/x", [FORWARDED[1], whole, *said]),
    ):
        answer = await ask(agent, path, headers, NOTE, method="POST", about=about)
        assert allowed(answer) == (not code)
        assert not code or answer.json()["code"] == code
