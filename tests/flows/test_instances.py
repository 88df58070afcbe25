"""Running instances enrol keys of their own with their platform's tokens, and what else is tried enrols nothing."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import jwt
import pytest

from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import TokenCredential
from ringfence.client.errors import EnrolmentRefusedError, IdentityError, InvalidCallError, RequestDeniedError
from ringfence.dev.processes import free_port
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.crypto.jwe import ReplyKey
from ringfence.kernel.crypto.jws import compact_jws, parse, sign
from ringfence.kernel.crypto.keys import SigningKey, b64decode, b64encode
from ringfence.messages.credential import CredentialRequest, RequestWithdraw
from ringfence.messages.enrolment import InstanceEnrolment
from ringfence.messages.lease import Lease
from ringfence.messages.operations import DeadLetter
from ringfence.messages.registry import (
    AgentDecommission,
    AgentResume,
    AgentRotateKey,
    AgentSuspend,
    BackendSettings,
)
from ringfence.messages.topics import ALL, AUDIT, CREDENTIAL_REQUEST, DEAD_LETTER, LEASE, SERVICE_EVENT
from ringfence.model.identity.attestation import audience
from ringfence.model.records.instances import instance_id
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support import platform_tokens
from tests.support.audit_stories import buried, expect_trail, forged
from tests.support.benches.agent_api_bench import NO_KAFKA
from tests.support.benches.attestation_bench import AttestationBench, Given, fresh
from tests.support.benches.gateway_flows import HUB, RULES, VERBS, action, gateway
from tests.support.benches.sdk_clients import READ, client
from tests.support.oidc_tokens import TokenIssuer
from tests.support.world import WITHIN_S, Party, RefusedError, World, scope

ASK: dict[str, Any] = {
    "target": "staging",
    "verbs": ["read"],
    "resources": ["env/a"],
    "reason": "a look",
    "timeout_s": 60,
}


@pytest.fixture(scope="module")
async def yard(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[AttestationBench]:
    """All of Ringfence, once for all tests of this module."""
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        AttestationBench.open(world, tmp_path_factory.mktemp("yard")) as yard,
        world.running("registry", "policy", "issuer", "revoker", "audit", own={"registry": yard.own}),
    ):
        yield await yard.staff()


def opened(enrolment: str) -> InstanceEnrolment:
    return parse(enrolment).unverified_claims(InstanceEnrolment)


# --- what lets in -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("platform", platform_tokens.PLATFORMS)
async def test_a_token_of_each_platform_gets_a_key_and_the_key_gets_a_credential(
    yard: AttestationBench, platform: str
) -> None:
    agent = await yard.agent(yard.selector(platform))
    task, issuer = await yard.task(agent), yard.pinned[platform]
    async with yard.connected(agent, Given(issuer, platform)) as connected:
        credential = await connected.request(task=task, **ASK)
        assert isinstance(credential, TokenCredential)
        enrolment = opened(connected.connection.enrolment or "")
        kid = connected.connection.key.kid
        said = jwt.decode(credential.value, options={"verify_signature": False})
        assert said["instance"] == {
            "id": enrolment.instance_id,
            "iss": issuer.issuer,
            "sub": platform_tokens.claims(platform, issuer, "x")["sub"],
        }
        record = await yard.world.consume_until(LEASE, lambda r: r.key == credential.lease_id)
        lease = yard.world.opened(record, Lease, "issuer")
        assert lease.instance is not None
        assert (lease.instance.instance_id, lease.key_thumbprint) == (enrolment.instance_id, kid)
        assert enrolment.claims == {
            name: value for name, value in enrolment.claims.items() if name in yard.selector(platform).claims
        }
        assert set(enrolment.claims) == set(yard.selector(platform).claims)
        await connected.release(credential, timeout_s=60)


async def test_the_trail_says_which_instance_it_was(yard: AttestationBench) -> None:
    agent = await yard.agent(yard.selector("github"))
    async with yard.connected(agent, Given(yard.pinned["github"])) as connected:
        credential = await connected.request(task=await yard.task(agent), **ASK)
        instance = opened(connected.connection.enrolment or "").instance_id

        def about(code: str) -> Any:
            return lambda record: (
                f'"{instance}"'.encode() in record.value and f'"{code}"'.encode() in record.value
            )

        for code in ("message.accepted", "credential.requested", "credential.issued"):
            await yard.world.consume_until(AUDIT, about(code))
        await connected.release(credential)


async def test_an_issuer_that_publishes_its_keys_is_asked_for_them(yard: AttestationBench) -> None:
    agent = await yard.agent(platform_tokens.selector("github", yard.published.issuer))
    async with yard.connected(agent, Given(yard.published)) as connected:
        credential = await connected.request(task=await yard.task(agent), **ASK)
        assert opened(connected.connection.enrolment or "").token is None, "nobody else could verify it"
        await connected.release(credential)
    asked = len(yard.published.asked)
    await yard.enrol(agent, yard.published.token({"iss": yard.published.issuer}, kid="no"), fresh(agent))
    assert len(yard.published.asked) == asked, "strangers do not make it ask again"


async def test_a_key_of_the_record_goes_on_counting_beside_instances(yard: AttestationBench) -> None:
    agent = await yard.world.agent("both", yard.sam, READ, attestation=(yard.selector("gcp"),))
    task = await yard.task(agent)
    async with (
        Agent.connect(agent.key, client(yard.world)) as one,
        yard.connected(agent, Given(yard.pinned["gcp"], "gcp")) as other,
    ):
        by_key, by_instance = await asyncio.gather(
            one.request(task=task, **ASK), other.request(task=task, **ASK)
        )
        assert isinstance(by_key, TokenCredential)
        assert isinstance(by_instance, TokenCredential)
        assert "instance" not in jwt.decode(by_key.value, options={"verify_signature": False})
        assert "instance" in jwt.decode(by_instance.value, options={"verify_signature": False})
        # Each may give back what the agent holds, whoever of them asked for it.
        await one.release(by_instance, timeout_s=60)
        await other.release(by_key, timeout_s=60)


async def test_an_instance_asks_over_http_with_the_key_that_it_enrolled(
    yard: AttestationBench, tmp_path: Path
) -> None:
    agent, port = await yard.agent(yard.selector("github")), free_port()
    door = f"http://127.0.0.1:{port}"
    async with (
        gateway(yard.world, listen=str(port), spool=tmp_path / "spool"),
        yard.connected(agent, Given(yard.pinned["github"]), door=door, kafka=NO_KAFKA) as connected,
    ):
        credential = await connected.request(task=await yard.task(agent), **ASK)
        assert isinstance(credential, TokenCredential)
        said = jwt.decode(credential.value, options={"verify_signature": False})
        assert said["instance"]["id"] == opened(connected.connection.enrolment or "").instance_id
        await connected.release(credential)
        await yard.world.consume_until(
            LEASE,
            lambda r: (
                r.key == credential.lease_id
                and yard.world.opened(r, Lease, "issuer", "revoker").status == "released"
            ),
        )


NOT_LET_IN = "3003 Refuse: Failure/Denied message.refused [{code}] by registry for bot"


# --- what enrols nothing ----------------------------------------------------------------------------------------------


async def refused(yard: AttestationBench, agent: Party, token: str, by: SigningKey, **claims: Any) -> str:
    answer = await yard.enrol(agent, token, by, **claims)
    assert answer.status_code == 400, answer.text
    assert token not in answer.text
    return str(answer.json()["error"])


@pytest.mark.parametrize(
    ("claims", "code"),
    [
        ({"aud": "test.example"}, "aud_unexpected"),
        ({"aud": "spiffe://other.example/enrol"}, "aud_unexpected"),
        ({"aud": ["spiffe://test.example/enrol", "https://elsewhere"]}, "aud_unexpected"),
        ({"iat": int(time.time()) - 3700, "exp": int(time.time()) + 36_000}, "too_old"),
        ({"exp": int(time.time()) - 60}, "expired"),
        ({"ref": "refs/heads/other"}, "instance_unmatched"),
        ({"repository_id": 75}, "instance_unmatched"),
        ({"environment": None}, "instance_unmatched"),
        ({"sub": "repo:acme/deploy2:ref:refs/heads/main"}, "instance_unmatched"),
    ],
)
async def test_a_token_that_does_not_fit_enrols_nothing(
    yard: AttestationBench, claims: dict[str, Any], code: str
) -> None:
    agent = await yard.agent(yard.selector("github"))
    token = yard.token("github", **claims)
    async with expect_trail(yard.world, NOT_LET_IN.format(code=code), bot=agent.name):
        assert await refused(yard, agent, token, fresh(agent)) == code
    event = await yard.world.event_where(
        lambda e: (e.subject, e.agent_id) == ("instance.enrol", agent.name) and e.kind == "refused"
    )
    assert event.reasons[0].code == code
    for topic in ALL:
        assert not any(token.encode() in record.value for record in await yard.world.records(topic)), (
            topic.what
        )


async def test_enrolment_with_an_unsigned_token_is_reported_only_to_its_sender(
    yard: AttestationBench,
) -> None:
    agent = await yard.agent(yard.selector("github"))
    forger = Given(TokenIssuer("https://github.acme.example"))
    token = await forger.token(audience("test.example"))
    async with expect_trail(yard.world, ""):
        assert await refused(yard, agent, token, fresh(agent)) == "signature_invalid"
        forger = Given(TokenIssuer("https://x.example"))
        with pytest.raises(EnrolmentRefusedError, match="ringfence init --oidc-issuer"):
            async with yard.connected(agent, forger):
                pass
    events = [yard.world.event(r) for r in await yard.world.records(SERVICE_EVENT)]
    assert not [e for e in events if e.agent_id == agent.name and e.subject == "instance.enrol"]


async def test_only_who_has_the_key_enrols_it(yard: AttestationBench) -> None:
    agent = await yard.agent(yard.selector("github"))
    mine, theirs = fresh(agent), fresh(agent)
    token = yard.token("github")
    assert await refused(yard, agent, token, theirs, key=mine.public) == "key_unknown"
    assert await refused(yard, agent, token, mine, exp=int(time.time()) - 5) == "expired"
    assert await refused(yard, agent, token, mine, aud="other.example") == "aud_unexpected"
    assert await refused(yard, agent, token, yard.sam.key) == "key_taken"
    assert await refused(yard, agent, token, mine, max_life_s=60) == "unknown_field"
    assert (await yard.enrol(agent, token, mine)).status_code == 200, "none of that spent it"


async def test_a_token_is_good_for_one_key(yard: AttestationBench) -> None:
    agent = await yard.agent(yard.selector("kubernetes"))
    key, thief, token = fresh(agent), fresh(agent), yard.token("kubernetes")
    first = await yard.enrol(agent, token, key)
    async with expect_trail(
        yard.world, "2004 Create: New token.replayed [token_replayed] by registry for bot", bot=agent.name
    ):
        assert await refused(yard, agent, token, thief) == "token_replayed"
    event = await yard.world.event_where(lambda e: e.kind == "finding" and e.agent_id == agent.name)
    assert event.reasons[0].code == "token_replayed"
    again = await yard.enrol(agent, token, key)
    assert again.json() == first.json(), "a process that starts again has what it had"
    # An agent that lets the same workload in has nothing of it either.
    other = await yard.agent(yard.selector("kubernetes"))
    assert await refused(yard, other, token, fresh(other)) == "token_replayed"
    assert await refused(yard, other, token, key) == "token_replayed", (
        "by the same key, which no event would tell"
    )


async def test_the_key_of_an_instance_is_no_other_agents(yard: AttestationBench) -> None:
    """Nor may somebody register it who has only seen it, in a request or on its way."""
    agent, other = await yard.agent(yard.selector("github")), await yard.agent(yard.selector("github"))
    key, world = fresh(agent), yard.world
    assert (await yard.enrol(agent, yard.token("github"), key)).status_code == 200
    assert await refused(yard, other, yard.token("github"), key) == "key_taken"
    assert (await yard.enrol(agent, yard.token("github"), key)).status_code == 200, "again for its own"
    record = key.record(int(time.time()) + 3600)
    with pytest.raises(RefusedError, match="key_taken"):
        await world.agent("squatter", yard.sam, READ, keys=(record,))
    rotation = world.claims(AgentRotateKey, yard.sam, agent_id=other.name, key=record)
    with pytest.raises(RefusedError, match="key_taken"):
        await world.accepted(rotation, yard.sam)


async def test_two_requests_at_once_with_one_token_enrol_one_key(yard: AttestationBench) -> None:
    agent, token = await yard.agent(yard.selector("kubernetes")), yard.token("kubernetes", jti="at-once")
    answers = await asyncio.gather(*(yard.enrol(agent, token, fresh(agent)) for _ in range(8)))
    assert sorted(answer.status_code for answer in answers) == [200, *[400] * 7]


async def test_a_token_for_one_key_is_good_for_no_other(yard: AttestationBench) -> None:
    agent = await yard.agent(yard.selector("github", key_bound=True))
    key, thief = fresh(agent), fresh(agent)
    assert await refused(yard, agent, yard.token("github"), key) == "instance_unmatched"
    token = yard.token("github", key)
    assert await refused(yard, agent, token, thief) == "aud_unexpected"
    answer = await yard.enrol(agent, token, key)
    assert opened(answer.json()["enrolment"]).key_bound


async def test_suspended_and_decommissioned_agents_let_nobody_in(yard: AttestationBench) -> None:
    agent = await yard.agent(yard.selector("github"))
    await yard.command(agent, AgentSuspend, reason="a look")
    await yard.world.event_where(  # what follows from it is told
        lambda e: (e.kind, e.subject, e.agent_id) == ("accepted", "revocation.request", agent.name)
    )
    token, key = yard.token("github"), fresh(agent)
    async with expect_trail(yard.world, NOT_LET_IN.format(code="agent_suspended"), bot=agent.name):
        assert await refused(yard, agent, token, key) == "agent_suspended"
    await yard.command(agent, AgentResume, reason="fine")
    assert (await yard.enrol(agent, token, key)).status_code == 200
    await yard.command(agent, AgentDecommission, reason="old")
    assert await refused(yard, agent, yard.token("github"), fresh(agent)) == "agent_decommissioned"
    nobody = yard.world.party("agent", "nobody")
    assert await refused(yard, nobody, yard.token("github"), fresh(nobody)) == "agent_unknown"


# --- what was let in, and is no more ----------------------------------------------------------------------------------


async def test_without_its_selector_an_instance_gets_nothing_new(yard: AttestationBench) -> None:
    agent = await yard.agent(yard.selector("github"), yard.selector("gcp"))
    task = await yard.task(agent)
    async with (
        yard.connected(agent, Given(yard.pinned["github"])) as gone,
        yard.connected(agent, Given(yard.pinned["gcp"], "gcp")) as stays,
    ):
        ends, goes_on = await gone.request(task=task, **ASK), await stays.request(task=task, **ASK)
        await yard.attest(agent, yard.selector("gcp"))
        await yard.known("policy")
        with pytest.raises(RequestDeniedError, match="enrol again") as denied:
            await gone.request(task=task, **ASK)
        assert denied.value.code == "instance_void"
        assert (await stays.request(task=task, **ASK)).lease_id
        ended = await yard.world.consume_until(
            LEASE,
            lambda r: r.key == ends.lease_id and yard.world.opened(r, Lease, "revoker").status == "revoked",
        )
        cause = yard.world.opened(ended, Lease, "revoker").cause
        assert cause is not None
        assert "repo:acme/deploy" in (cause.reason or "")
        await stays.release(goes_on, timeout_s=60)


async def test_an_instance_withdraws_requests_only_while_its_agent_lets_it_in(yard: AttestationBench) -> None:
    world, agent = yard.world, await yard.agent(yard.selector("github"), yard.selector("gcp"))

    async def why_not(connected: Agent) -> str:
        """What policy says of a withdrawal, signed by the instance, of a request that never was."""
        key, id = connected.connection.key, str(uuid.uuid4())
        claims = world.claims(RequestWithdraw, agent, request_id=id, enrolment=connected.connection.enrolment)
        await world.send(CREDENTIAL_REQUEST, agent.name, sign(claims, key))
        event = await world.event_where(lambda e: e.ref == claims.jti)
        assert (event.kind, event.subject, event.actor) == ("refused", "request.withdraw", agent.id)
        return event.reasons[0].code

    async with yard.connected(agent, Given(yard.pinned["github"])) as connected:
        assert await why_not(connected) == "request_unknown"
        await yard.attest(agent, yard.selector("gcp"))
        await yard.known("policy")
        assert await why_not(connected) == "instance_void"


async def counts_for_nothing(
    yard: AttestationBench,
    agent: Party,
    key: SigningKey,
    enrolment: str,
    code: str,
    spelt: bytes = b"enrolment",
) -> None:
    """A request with this enrolment is dead-lettered with the code, and nobody is believed to have written it.

    `spelt`: how the member is written.
    """
    claims = yard.world.claims(
        CredentialRequest, agent, task_id=await yard.task(agent), scope=READ, ttl_s=60, reason="x",
        reply_key=ReplyKey().public, enrolment=enrolment,
    )  # fmt: skip
    head, payload, _ = sign(claims, key).split(".")
    payload = b64encode(b64decode(payload).replace(b'"enrolment"', b'"' + spelt + b'"'))
    text = f"{head}.{payload}".encode()
    async with expect_trail(yard.world, forged(code) + buried(code)):
        at = await yard.world.send(CREDENTIAL_REQUEST, agent.name, compact_jws(text, key.sign(text)))
        letter = await yard.world.consume_until(
            DEAD_LETTER, lambda record: DeadLetter.model_validate_json(record.value).source == at
        )
    assert DeadLetter.model_validate_json(letter.value).code == code


async def test_an_enrolment_is_for_its_key_its_agent_and_its_time(yard: AttestationBench) -> None:
    agent, other = await yard.agent(yard.selector("github")), await yard.agent(yard.selector("github"))
    key = fresh(agent)
    enrolment = (await yard.enrol(agent, yard.token("github"), key)).json()["enrolment"]
    await counts_for_nothing(yard, agent, fresh(agent), enrolment, "key_unknown")
    await counts_for_nothing(yard, other, key, enrolment, "enrolment_invalid")
    policy = yard.world.key("policy")
    by_policy = sign(opened(enrolment).model_copy(update={"iss": policy.id}), policy)
    await counts_for_nothing(yard, agent, key, by_policy, "enrolment_invalid")
    over = opened(enrolment)
    over = over.model_copy(update={"key": over.key.model_copy(update={"not_after": int(time.time()) - 1})})
    await counts_for_nothing(yard, agent, key, sign(over, yard.world.key("registry")), "enrolment_ended")


async def test_key_of_the_agent_record_is_rejected_as_an_instance(yard: AttestationBench) -> None:
    agent = await yard.world.agent("keyed", yard.sam, READ, attestation=(yard.selector("github"),))
    enrolment = (await yard.enrol(agent, yard.token("github"), fresh(agent))).json()["enrolment"]
    mine = opened(enrolment)
    mine = mine.model_copy(
        update={"key": mine.key.model_copy(update={"kid": agent.key.kid, "jwk": agent.key.public})}
    )
    for spelt in (b"enrolment", rb"\u0065nrolment"):
        await counts_for_nothing(yard, agent, agent.key, enrolment, "key_unknown", spelt)
        await counts_for_nothing(yard, agent, agent.key, sign(mine, agent.key), "enrolment_invalid", spelt)


async def test_a_registry_that_lies_invents_no_instance_where_keys_are_pinned(yard: AttestationBench) -> None:
    agent = await yard.agent(yard.selector("github"))
    honest = opened((await yard.enrol(agent, yard.token("github"), fresh(agent))).json()["enrolment"])
    liar, key = yard.world.key("registry"), fresh(agent)
    mine: dict[str, Any] = {
        "key": honest.key.model_copy(update={"kid": key.kid, "jwk": key.public}),
        "instance_id": instance_id(honest.token_digest, key.kid),
    }
    unmatched = yard.token("github", ref="refs/heads/evil")
    for lie in (
        {"token": None},
        {"token": unmatched},
        {"claims": {**honest.claims, "ref": "refs/heads/evil"}},
        {"subject": "repo:acme/other:ref:refs/heads/main"},
        {"key_bound": True},
        {"iat": honest.iat - 9 * 3600},
        {"issuer": "https://x.example"},
    ):
        lied = sign(honest.model_copy(update={**mine, **lie}), liar)
        code = "issuer_untrusted" if "issuer" in lie else "enrolment_invalid"
        await counts_for_nothing(yard, agent, key, lied, code)


# --- the SDK ----------------------------------------------------------------------------------------------------------


class Later:
    """A clock that a test sets forward."""

    def __init__(self) -> None:
        self.ahead_s = 0

    def now_ms(self) -> int:
        return int((time.time() + self.ahead_s) * 1000)


async def test_an_instance_renews_before_its_end(yard: AttestationBench) -> None:
    agent = await yard.agent(yard.selector("github", max_life_s=60))
    task, source, clock = await yard.task(agent), Given(yard.pinned["github"]), Later()
    connected = Agent.connect(attest=source, agent_id=agent.name, settings=client(yard.world), clock=clock)
    async with connected:
        await connected.request(task=task, **ASK)
        before = connected.connection.key.kid
        assert (await connected.request(task=task, **ASK)).lease_id
        assert (len(source.asked), connected.connection.key.kid) == (1, before)
        clock.ahead_s = 25  # two thirds of its half minute are over
        await connected.request(task=task, **ASK)
        assert len(source.asked) == 2
        assert connected.connection.key.kid != before
        assert source.asked[1].endswith(connected.connection.key.kid)


async def test_a_file_that_was_not_renewed_is_no_reason_to_stop(
    yard: AttestationBench, tmp_path: Path
) -> None:
    agent = await yard.agent(yard.selector("kubernetes", max_life_s=120))
    task, file, clock = await yard.task(agent), tmp_path / "token", Later()
    file.write_text(yard.token("kubernetes") + "\n")
    settings = client(
        yard.world, attest=f"file:{file}", agent=agent.name, attest_key_file=tmp_path / "key.json"
    )
    connected = Agent.connect(settings=settings, clock=clock)
    async with connected:
        first = connected.connection.enrolment
        clock.ahead_s = 28
        assert (await connected.request(task=task, **ASK)).lease_id
        assert connected.connection.enrolment == first
    # Started again, with the same token and the key that was kept.
    async with Agent.connect(settings=settings) as again:
        assert again.connection.enrolment == first
        assert (await again.request(task=task, **ASK)).lease_id
    without = client(yard.world, attest=f"file:{file}", agent=agent.name)
    with pytest.raises(EnrolmentRefusedError) as refused:
        async with Agent.connect(settings=without):
            pass
    assert refused.value.code == "token_replayed"


async def test_instance_with_missing_settings_is_told_which(yard: AttestationBench, tmp_path: Path) -> None:
    settings = client(yard.world)
    with pytest.raises(IdentityError, match="RINGFENCE_AGENT"):
        Agent.connect(attest="github", settings=settings)
    with pytest.raises(InvalidCallError, match="file:PATH, github or gcp"):
        Agent.connect(attest="kubernetes", agent_id="x", settings=settings)
    with pytest.raises(InvalidCallError, match="not both"):
        Agent.connect(yard.sam.key, settings, attest="github", agent_id="x")
    nowhere = client(yard.world, registry_url="http://127.0.0.1:9")
    with pytest.raises(UnavailableError, match="RINGFENCE_REGISTRY_URL"):
        async with Agent.connect(attest=Given(yard.pinned["github"]), agent_id="x", settings=nowhere):
            pass


# --- the registry's memory --------------------------------------------------------------------------------------------


async def test_spent_token_stays_spent_after_a_registry_restart(
    kafka: Kafka, redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        AttestationBench.open(world, tmp_path) as yard,
    ):
        async with world.running("registry", own={"registry": yard.own}):
            await yard.staff()
            agent = await yard.agent(yard.selector("kubernetes"))
            key, token = fresh(agent), yard.token("kubernetes")
            first = await yard.enrol(agent, token, key)
            assert first.status_code == 200
        async with world.running("registry", own={"registry": yard.own}):
            # Until it has the commands it lets nobody in.
            await yard.attest(agent, yard.selector("kubernetes"), yard.selector("gcp"))
            assert await refused(yard, agent, token, fresh(agent)) == "token_replayed"
            again = opened((await yard.enrol(agent, token, key)).json()["enrolment"])
            before = opened(first.json()["enrolment"])
            assert (again.instance_id, again.key, again.iat) == (before.instance_id, before.key, before.iat)


# --- through a gateway ------------------------------------------------------------------------------------------------


async def test_an_instance_goes_through_a_gateway_with_the_key_that_it_enrolled(
    yard: AttestationBench,
) -> None:
    world, wide = yard.world, scope("hub", ("read",), ("path/**",))
    backend = BackendSettings.model_validate({"kind": "jwt", "url": f"https://{HUB}"})
    await world.target("hub", backend=backend, requests=RULES, verbs=VERBS)
    pia = await world.user("pia", entitlements=wide)
    agent = await world.agent("walker", yard.sam, wide, keys=(), attestation=(yard.selector("github"),))
    task = await world.task(agent, by=pia, scope=wide)
    async with gateway(world) as proxy, yard.connected(agent, Given(yard.pinned["github"])) as connected:
        credential = await connected.request(
            task=task, target="hub", verbs=["read"], resources=["path/a"], reason="x", delivery="gateway",
            timeout_s=WITHIN_S,
        )  # fmt: skip
        handle, key = credential.lease_id, connected.connection.key
        url = f"https://{HUB}/a"
        async with asyncio.timeout(WITHIN_S):  # until the gateway has heard of the lease
            while (await proxy.as_agent(key, handle, "GET", url)).status_code != 200:
                await asyncio.sleep(0.05)
        assert (await proxy.as_agent(fresh(agent), handle, "GET", url)).status_code == 401
        await yard.attest(agent, yard.selector("gcp"))
        # The gateway hears of the record, and of the order that the revoker makes of it, by different topics.
        over = ("instance_void", "lease_cut", "lease_ended")
        async with asyncio.timeout(WITHIN_S):
            while (answer := await proxy.as_agent(key, handle, "GET", url)).status_code == 200 or (
                answer.json()["code"] not in over
            ):
                await asyncio.sleep(0.05)
        problem = answer.json()
        told = await action(world, action_id=problem["instance"].removeprefix("urn:uuid:"))
        assert (answer.status_code, told.agent_id, told.lease_id) == (403, agent.name, handle)
        assert told.reasons[0].code == problem["code"]
