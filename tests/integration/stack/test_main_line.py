"""The whole line on the running stack: ask, decide, approve, issue, use, give back, expire, revoke, audit."""

from __future__ import annotations

import asyncio
import json

import jwt
import pytest
from jsonschema.validators import Draft202012Validator

from ringfence import Agent
from ringfence.client.errors import ApiError, RefusedError, RequestDeniedError, TokenRejectedError
from ringfence.client.reports.read_api import ReadApi
from ringfence.client.resource_server.verifier import TokenVerifier
from ringfence.kernel.crypto.jws import parse
from ringfence.kernel.tracing.api import trace_id
from ringfence.messages.approval import ApprovalRequest
from ringfence.messages.audit import AuditEvent
from ringfence.messages.lease import Lease
from ringfence.messages.topics import APPROVAL_REQUEST, AUDIT, CREDENTIAL_DECISION, CREDENTIAL_REPLY, LEASE
from tests.support.http_client import plain_client
from tests.support.stack import WITHIN_S, RunningStack, Seen, first_pending, now_s
from tools.schemas.generate import json_schema

pytestmark = pytest.mark.broker


def audience(realm: RunningStack) -> str:
    return f"spiffe://{realm.settings.trust_domain}/target/{realm.target}"


def verifier(realm: RunningStack, *, introspect: bool = True) -> TokenVerifier:
    key = realm.key("target", realm.target) if introspect else None
    return TokenVerifier(realm.settings.issuer_url, audience(realm), introspection_key=key)


async def approved_write(realm: RunningStack, agent: Agent, resource: str = "env/staging/web"):
    """A write credential, asked for by the agent and approved by sam."""
    async with realm.sponsor() as sam:
        asked = asyncio.create_task(
            agent.request(
                task=realm.task, target=realm.target, verbs=["write"], resources=[resource], reason="to deploy",
                timeout_s=WITHIN_S,
            )
        )  # fmt: skip
        pending = await first_pending(sam)
        assert pending.agent == realm.agent
        assert pending.on_behalf_of == realm.name("maria")
        await sam.approve(pending)
        return await asked


async def test_a_credential_from_request_to_release(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.seen(LEASE, AUDIT) as seen, verifier(realm) as server:
        credential = await approved_write(realm, agent)
        token = await server.verify(credential.value)
        assert token.agent == agent.connection.key.id
        assert token.lease_id == credential.lease_id
        assert token.on_behalf_of.endswith(realm.name("maria"))
        assert token.allows("write", "env/staging/web")
        assert not token.allows("write", "env/staging/api")
        assert not token.allows("read", "env/staging/web")
        await agent.release(credential)
        end = await realm.end_of(agent, seen, credential.lease_id)
        assert (end.status, end.cause and end.cause.kind) == ("released", "release")
        with pytest.raises(TokenRejectedError) as refused:
            await server.verify(credential.value)
        assert refused.value.code == "inactive"


async def test_the_token_says_what_the_contract_says(realm: RunningStack) -> None:
    async with realm.as_agent() as agent:
        credential = await realm.read(agent)
    header = jwt.get_unverified_header(credential.value)
    claims = jwt.decode(credential.value, options={"verify_signature": False})
    assert header["alg"] == "ES256"
    assert header["typ"] == "at+jwt"
    assert claims["iss"] == realm.settings.issuer_url
    assert claims["sub"] == f"spiffe://{realm.settings.trust_domain}/agent/{realm.agent}"
    assert claims["aud"] == audience(realm)
    assert claims["jti"] == credential.lease_id
    assert claims["exp"] == credential.expires_at
    assert claims["task"] == realm.task
    assert claims["sponsor"].endswith(realm.name("sam"))
    assert claims["act"]["sub"] == claims["sub"]
    assert claims["cnf"] == {"kid": agent.connection.key.kid}
    (detail,) = claims["authorization_details"]
    assert detail == {
        "type": "urn:ringfence:permission",
        "target": realm.target,
        "verbs": ["read"],
        "resources": ["env/staging/web"],
    }


async def test_a_lease_ends_by_itself_at_its_deadline(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.seen(LEASE) as seen, verifier(realm) as server:
        credential = await realm.read(agent, ttl_s=15)
        await server.verify(credential.value)
        end = await realm.end_of(agent, seen, credential.lease_id)
        assert (end.status, end.cause and end.cause.kind) == ("expired", "deadline")
        assert now_s() >= end.deadline, "never before its time"
        with pytest.raises(TokenRejectedError):
            await server.verify(credential.value)
        assert (
            len([lease for lease in realm.leases(agent, seen, credential.lease_id) if lease.seq == end.seq])
            == 1
        )


@pytest.mark.parametrize("how", ["lease", "agent", "task", "target", "sponsor", "user"])
async def test_entitled_people_revoke_by_each_selector(realm: RunningStack, how: str) -> None:
    async with realm.as_agent() as agent, realm.seen(LEASE) as seen, verifier(realm) as server:
        credential = await realm.read(agent)
        what = {
            "lease": {"lease_id": credential.lease_id, "agent_id": realm.agent},
            "agent": {"agent_id": realm.agent},
            "task": {"task_id": realm.task},
            "target": {"target_id": realm.target},
            "sponsor": {"sponsor": realm.name("sam")},
            "user": {"user_id": realm.name("maria")},
        }[how]
        by_operator = how in ("target", "user")
        async with realm.as_operator() if by_operator else realm.administrator("sam") as person:
            await person.revoke(reason="a test", **what)
        end = await realm.end_of(agent, seen, credential.lease_id)
        assert (end.status, end.cause and end.cause.kind) == ("revoked", "revocation")
        with pytest.raises(TokenRejectedError):
            await server.verify(credential.value)


async def test_strangers_revoke_nothing(realm: RunningStack, stack) -> None:
    other = await RunningStack(stack, realm.settings).make()
    async with realm.as_agent() as agent, other.administrator("sam") as stranger, verifier(realm) as server:
        credential = await realm.read(agent)
        for what in ({"lease_id": credential.lease_id, "agent_id": realm.agent}, {"agent_id": realm.agent}):
            with pytest.raises(RefusedError):
                await stranger.revoke(reason="mischief", **what)
        await server.verify(credential.value)


async def test_the_end_of_the_task_ends_its_leases_and_new_requests(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.seen(LEASE) as seen, realm.administrator("maria") as maria:
        credential = await realm.read(agent)
        await maria.end_task(realm.task, reason="done")
        end = await realm.end_of(agent, seen, credential.lease_id)
        assert end.cause is not None
        assert end.cause.kind == "task_ended"
        reasons = await realm.denial(agent, seen, lambda: realm.read(agent))
        assert "task_ended" in {reason.code for reason in reasons}


async def test_a_suspended_agent_loses_everything_until_it_is_resumed(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.seen(LEASE) as seen, realm.administrator("sam") as sam:
        credential = await realm.read(agent)
        await sam.suspend_agent(realm.agent, reason="odd")
        end = await realm.end_of(agent, seen, credential.lease_id)
        assert end.cause is not None
        assert end.cause.kind == "agent_suspended"
        reasons = await realm.denial(agent, seen, lambda: realm.read(agent))
        assert "agent_suspended" in {reason.code for reason in reasons}
        await sam.resume_agent(realm.agent, reason="explained")
        await realm.read(agent)


async def test_a_refusal_names_each_permission_and_the_side_that_lacks_it(realm: RunningStack) -> None:
    async with realm.as_agent() as agent:
        with pytest.raises(RequestDeniedError) as denied:
            await agent.request(
                task=realm.task, target=realm.target, verbs=["read", "write"], resources=["env/production/web"],
                reason="too much", timeout_s=WITHIN_S,
            )  # fmt: skip
    (reason,) = [reason for reason in denied.value.reasons if reason.code == "beyond_scope"]
    assert reason.side == f"entitlements:{realm.name('maria')}"
    assert reason.permission == realm.permission(["write"], "env/production/web")


async def test_a_person_can_say_no(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.sponsor() as sam:
        asked = asyncio.create_task(
            agent.request(
                task=realm.task, target=realm.target, verbs=["write"], resources=["env/staging/web"], reason="please",
                timeout_s=WITHIN_S,
            )
        )  # fmt: skip
        await sam.deny(await first_pending(sam), comment="not on a Friday")
        with pytest.raises(RequestDeniedError, match="Friday"):
            await asked


async def trail_with(api: ReadApi, id: str, word: str) -> str:
    """The trail of something as JSON text, once it holds a word."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                story = json.dumps(await api.get("audit", "trace", id))
            except ApiError as error:
                if error.status != 404:
                    raise
                story = ""
            if word in story:
                return story
            await asyncio.sleep(0.05)


async def test_the_trail_leads_from_the_lease_back_to_the_human(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.seen(LEASE, AUDIT) as seen:
        credential = await approved_write(realm, agent)
        await agent.release(credential)
        await realm.end_of(agent, seen, credential.lease_id)

        def events() -> list[dict[str, object]]:
            mine = [json.loads(record.value) for record in seen.of(AUDIT)]
            return [event for event in mine if event["unmapped"].get("lease") == credential.lease_id]

        await seen.until(
            lambda: any("released" in str(event) for event in events()), "the release on the audit topic"
        )
        async with ReadApi(realm.key("user", realm.name("sam")), realm.settings) as api:
            story = await trail_with(api, credential.lease_id, "released")
    for expected in (realm.name("maria"), realm.name("sam"), realm.agent, realm.task, credential.lease_id):
        assert expected in story
    for event in events():
        assert event["unmapped"]["trace_id"] == credential.trace_id  # type: ignore[index]


async def test_one_request_is_one_trace_over_all_hops(realm: RunningStack) -> None:
    topics = (CREDENTIAL_DECISION, LEASE, CREDENTIAL_REPLY, AUDIT)
    async with realm.as_agent() as agent, Seen(realm.settings, topics) as seen:
        credential = await realm.read(agent)

        def complete() -> bool:
            mine = [r for r in seen.records if trace_id(r.traceparent) == credential.trace_id]
            return {r.topic.what for r in mine} == {t.what for t in topics}

        await seen.until(complete, "the trace on each topic")


async def test_published_messages_validate_against_the_schemas(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, Seen(realm.settings, (APPROVAL_REQUEST, AUDIT)) as seen:
        await approved_write(realm, agent)
        await seen.until(
            lambda: len(seen.of(AUDIT)) >= 5 and seen.of(APPROVAL_REQUEST), "audit events and the question"
        )
    for topic, model in ((APPROVAL_REQUEST, ApprovalRequest), (AUDIT, AuditEvent)):
        schema = Draft202012Validator(json_schema(model))
        assert seen.of(topic)
        for record in seen.of(topic):
            body = parse(record.value).payload if topic is APPROVAL_REQUEST else record.value
            assert [error.message for error in schema.iter_errors(json.loads(body))] == []


async def test_introspection_tells_nothing_to_others(realm: RunningStack, stack) -> None:
    other = await RunningStack(stack, realm.settings).make()
    async with realm.as_agent() as agent:
        credential = await realm.read(agent)
    url = f"{realm.settings.issuer_url}/oauth2/introspect"
    async with plain_client(timeout=WITHIN_S) as http:
        assert (await http.post(url, data={"token": credential.value})).status_code == 401
    stranger = TokenVerifier(
        realm.settings.issuer_url, audience(realm), introspection_key=other.key("target", other.target)
    )
    async with stranger:
        with pytest.raises(TokenRejectedError) as refused:
            await stranger.verify(credential.value)
    assert refused.value.code == "inactive"


async def test_the_lease_record_has_what_later_readers_need(realm: RunningStack) -> None:
    async with realm.as_agent() as agent, realm.seen(LEASE) as seen:
        credential = await realm.read(agent)
        lease: Lease = (
            await seen.until(lambda: realm.leases(agent, seen, credential.lease_id), "the lease record")
        )[0]
    assert (lease.status, lease.seq, lease.delivery, lease.backend) == ("active", 1, "agent", "jwt")
    assert lease.sponsor == realm.name("sam")
    assert lease.act == (realm.agent,)
    assert trace_id(lease.traceparent) == credential.trace_id
    assert lease.decision_digest


@pytest.mark.parametrize("role", ["registry", "policy", "issuer", "revoker", "audit"])
async def test_every_service_tells_how_it_is(stack, role) -> None:
    async with plain_client(base_url=stack.url(role), timeout=WITHIN_S) as http:
        assert (await http.get("/healthz")).json() == {"status": "ok"}
        said = (await http.get("/readyz")).json()
        assert (said["status"], said["reasons"], said["denies"]) == ("ready", [], [])
        assert said["trust_bundle"] == 1
        assert "ringfence_records_total" in (await http.get("/metrics")).text
