"""Credentials that go to gateways: sealed to each, never to the agent, and once more for a gateway that came later."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from ringfence.client.agent.credentials import GatewayCredential
from ringfence.client.agent.replies import SentRequest, read_reply
from ringfence.dev.processes import free_port
from ringfence.issuer.http import Resealer
from ringfence.kernel.base.api_errors import NotFoundError
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.errors import InvalidMessageError
from ringfence.kernel.crypto.jwe import (
    EncryptionKey,
    ReplyKey,
    enclose,
    recipients_of,
    unverified_about,
)
from ringfence.kernel.crypto.jws import parse, sign, verify
from ringfence.kernel.crypto.keys import SigningKey, b64encode
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.tracing.api import new_traceparent
from ringfence.messages.credential import Credential, CredentialDelivery, ReplyContent
from ringfence.messages.registry import BackendSettings, RequestRule, VerbFloor
from ringfence.messages.topics import CREDENTIAL_REPLY, LEASE
from ringfence.messages.trust import ServiceIdentity
from ringfence.model.lease_store import LeaseStore
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support import secret_canary
from tests.support.benches.issuer_bench import Asked, IssuerBench, another, opened_desks
from tests.support.http_client import plain_client
from tests.support.world import DAY_S, Party, World, scope


@pytest.fixture(scope="module")
async def issuer_bench(kafka: Kafka, redis_server: RedisServer) -> AsyncIterator[IssuerBench]:
    """Registry, issuer and revoker, once for all tests here."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as desk,
        world.running("revoker"),
        world.running("issuer", http=f"127.0.0.1:{port}", issuer_url=url),
    ):
        yield desk


async def envelope_of(desk: IssuerBench, asked: Asked) -> Received:
    return await desk.world.consume_until(CREDENTIAL_REPLY, lambda r: unverified_about(r.value) == asked.id)


def opened(desk: IssuerBench, envelope: str | bytes, key: EncryptionKey) -> CredentialDelivery:
    """As a gateway believes it: by its own key, and by the issuer's signature."""
    find = desk.world.trust.finder("issuer", at_s=time.time())
    return verify(parse(key.open(envelope)), CredentialDelivery, find, audience=desk.world.td).claims


async def handed(desk: IssuerBench, *verbs: str, **fields: Any) -> tuple[Asked, ReplyContent]:
    """A lease for the gateway, asked for, decided and answered."""
    asked = await desk.ask(*verbs, delivery="gateway", **fields)
    await desk.decide(asked)
    content = await desk.answer(asked)
    assert content.lease is not None, desk.refusal(content)
    return asked, content


async def sealed_again(desk: IssuerBench, lease_id: str, by: Party | None) -> httpx.Response:
    return await desk.world.get("issuer", f"/v1/leases/{lease_id}/sealed-credential", by)


def gateway(desk: IssuerBench) -> Party:
    return Party("gateway", desk.world.key("gateway"))


async def newcomer(desk: IssuerBench, name: str, *, sealed_to: bool = True) -> tuple[Party, EncryptionKey]:
    """One more gateway in the trust bundle, of which the issuer knows."""
    world, end_s = desk.world, int(time.time()) + DAY_S
    party, seal = world.party("service", name), EncryptionKey.generate(f"spiffe://{world.td}/service/{name}")
    identity = ServiceIdentity(
        id=party.id,
        roles=("gateway",),
        keys=(party.key.record(end_s),),
        encryption_keys=(seal.record(end_s),) if sealed_to else (),
    )
    trust = world.runtimes["issuer"].trust
    known = trust.require()
    bundle = known.model_copy(
        update={
            "version": known.version + 1,
            "jti": f"with-{name}",
            "services": (*known.services, identity),
        }
    )
    await world.publish_trust(bundle)
    await world.until(lambda: True if trust.version == bundle.version else None, "the new trust bundle")
    return party, seal


# --- to the gateway, not to the agent ---------------------------------------------------------------------------------


async def test_the_agent_gets_a_lease_and_the_gateway_the_credential(desk: IssuerBench) -> None:
    asked, content = await handed(desk, "read")
    assert content.credential is None
    lease = await desk.lease(asked.lease_id, "active")
    assert lease.delivery == "gateway"
    record = await envelope_of(desk, asked)
    seals = desk.world.seals
    assert set(recipients_of(record.value)) >= {seals["gateway"].kid, seals["issuer"].kid}
    delivery = opened(desk, record.value, seals["gateway"])
    assert (delivery.lease_id, delivery.request_id, delivery.target_id) == (
        asked.lease_id, asked.id, "staging",
    )  # fmt: skip
    assert delivery.credential.kind == "jwt"
    assert delivery.credential.expires_at == lease.deadline
    for secret in delivery.credential.value.split("."):
        assert secret.encode() not in record.value
    claims = parse(delivery.credential.value).payload
    assert b'"cnf"' not in claims, "a gateway does not have the agent's key"
    assert lease.key_thumbprint == desk.bot.key.kid, "the handle is the agent's all the same"


async def test_gateways_have_it_before_the_agent_has_its_handle(desk: IssuerBench) -> None:
    asked, _ = await handed(desk, "read")
    envelope = await envelope_of(desk, asked)

    def is_reply(record: Received) -> bool:
        return bool(asked.reply_key.open(record.value))

    reply = await desk.world.consume_until(CREDENTIAL_REPLY, is_reply)
    assert (envelope.partition, envelope.offset) < (reply.partition, reply.offset)
    assert envelope.partition == reply.partition
    lease = await desk.world.consume_until(LEASE, lambda r: r.key == asked.lease_id)
    assert lease.appended_at_ms <= envelope.appended_at_ms


async def test_the_sdk_takes_it_as_a_handle(desk: IssuerBench) -> None:
    asked, content = await handed(desk, "read")
    sent = SentRequest(asked.claims, asked.compact, asked.reply_key, new_traceparent())

    def is_reply(record: Received) -> bool:
        return bool(asked.reply_key.open(record.value))

    reply = await desk.world.consume_until(CREDENTIAL_REPLY, is_reply)
    answer = read_reply(reply.value, sent, desk.world.trust, reply.appended_at_ms)
    assert isinstance(answer, GatewayCredential)
    assert (answer.handle, answer.kind) == (asked.lease_id, "jwt")
    assert content.credential is None


async def test_to_the_agent_nothing_is_sealed_to_gateways(desk: IssuerBench) -> None:
    asked, _ = await desk.issued("read")
    later, _ = await handed(desk, "read")
    await envelope_of(desk, later)
    assert not [
        record
        for record in await desk.world.records(CREDENTIAL_REPLY)
        if unverified_about(record.value) == asked.id
    ]


# --- a gateway that came later ----------------------------------------------------------------------------------------


async def test_a_gateway_that_came_later_asks_the_issuer(desk: IssuerBench) -> None:
    asked, _ = await handed(desk, "read")
    party, seal = await newcomer(desk, "gateway-late")
    first = await envelope_of(desk, asked)
    with pytest.raises(InvalidMessageError, match="not sealed to this key"):
        seal.open(first.value)
    answer = await sealed_again(desk, asked.lease_id, party)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/jose+json"
    assert answer.headers["cache-control"] == "no-store"
    assert recipients_of(answer.content) == (seal.kid,)
    assert opened(desk, answer.content, seal) == opened(desk, first.value, desk.world.seals["gateway"])
    # And what is issued from now on is sealed to it too.
    later, _ = await handed(desk, "read")
    assert opened(desk, (await envelope_of(desk, later)).value, seal).lease_id == later.lease_id


async def test_envelopes_on_kafka_survive_a_restart_of_the_issuer(desk: IssuerBench) -> None:
    """The issuer keeps nothing but its key: another process with that key answers the same."""
    asked, _ = await handed(desk, "read")
    world, clock = desk.world, SystemClock()
    before = await sealed_again(desk, asked.lease_id, gateway(desk))
    settings, seal = world.settings("issuer"), world.seals["gateway"]
    store = LeaseStore(settings)
    try:
        own = EncryptionKey.load(world.folder / "keys" / "issuer-seal.json")
        another_process = Resealer(settings, world.trust, store, own, clock)
        after = await another_process.reseal(asked.lease_id, gateway(desk).id)
        assert opened(desk, after, seal) == opened(desk, before.content, seal)
        without = Resealer(settings, world.trust, store, EncryptionKey.generate(own.id), clock)
        with pytest.raises(NotFoundError):
            await without.reseal(asked.lease_id, gateway(desk).id)
    finally:
        await store.close()


async def test_only_gateways_get_a_credential_sealed_again(desk: IssuerBench) -> None:
    asked, _ = await handed(desk, "read")
    policy = Party("policy", desk.world.key("policy"))
    impostor = Party("gateway", SigningKey.generate(gateway(desk).id))
    for who in (None, desk.bot, desk.sam, desk.target, policy, impostor):
        answer = await sealed_again(desk, asked.lease_id, who)
        assert answer.status_code == 401, who
    assert (await sealed_again(desk, asked.lease_id, gateway(desk))).status_code == 200


async def test_a_token_of_a_gateway_lives_for_a_minute(desk: IssuerBench) -> None:
    asked, _ = await handed(desk, "read")
    path = f"/v1/leases/{asked.lease_id}/sealed-credential"
    now = int(time.time())
    for wrong in ({"exp": now + 300}, {"exp": now - 1, "iat": now - 60}, {"aud": "other.example"}):
        headers = desk.world.bearer(gateway(desk), "issuer", **wrong)
        async with plain_client(base_url=f"http://127.0.0.1:{desk.world.ports['issuer']}") as http:
            assert (await http.get(path, headers=headers)).status_code == 401, wrong


async def test_a_gateway_without_a_key_is_told_what_it_lacks(desk: IssuerBench) -> None:
    asked, _ = await handed(desk, "read")
    party, _ = await newcomer(desk, "gateway-bare", sealed_to=False)
    answer = await sealed_again(desk, asked.lease_id, party)
    assert (answer.status_code, answer.json()["error"]) == (403, "forbidden")
    assert "trust bundle" in answer.json()["message"]


async def test_only_live_leases_for_gateways_are_answered(desk: IssuerBench) -> None:
    for_the_agent, _ = await desk.issued("read")
    ended, _ = await handed(desk, "read")
    claims, _ = await desk.revoke(desk.bot, "release", lease_id=ended.lease_id)
    await desk.verdict(claims)
    await desk.lease(ended.lease_id, "released")
    nobody = "00000000-0000-5000-8000-000000000000"
    for lease_id in (for_the_agent.lease_id, ended.lease_id, nobody, "x", nobody.upper()):
        answer = await sealed_again(desk, lease_id, gateway(desk))
        assert (answer.status_code, answer.json()["error"]) == (404, "not_found"), lease_id


async def test_forged_envelope_on_the_topic_is_skipped(desk: IssuerBench) -> None:
    """Whoever can write to the topic can seal to the issuer: its signature inside is what counts."""
    asked = await desk.ask("read", delivery="gateway")
    world = desk.world
    to = [seal.record(int(time.time()) + 600) for seal in world.seals.values()]
    trap = Credential(kind="jwt", value="trap", expires_at=int(time.time()) + 600)
    fields: dict[str, Any] = {
        "request_id": asked.id, "lease_id": asked.lease_id, "target_id": "staging", "credential": trap,
    }  # fmt: skip
    forged = [
        sign(world.claims(CredentialDelivery, by, **fields), by.key)
        for by in (desk.bot, Party("policy", world.key("policy")), gateway(desk))
    ]
    issuer = Party("issuer", world.key("issuer"))
    other = sign(
        world.claims(CredentialDelivery, issuer, **{**fields, "lease_id": asked.claims.task_id}), issuer.key
    )
    for plain in (b"trap", *(jws.encode() for jws in (*forged, other))):
        await world.send(CREDENTIAL_REPLY, desk.bot.name, enclose(plain, to, about=asked.id))
    await desk.decide(asked)
    await desk.answer(asked)
    answer = await sealed_again(desk, asked.lease_id, gateway(desk))
    assert opened(desk, answer.content, world.seals["gateway"]).credential.value != "trap"


# --- what is refused --------------------------------------------------------------------------------------------------


async def test_without_a_gateway_that_could_open_it_nothing_is_issued(
    kafka: Kafka, redis_server: RedisServer
) -> None:
    async with World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world:
        bare = tuple(
            one.model_copy(update={"encryption_keys": ()}) if "gateway" in one.roles else one
            for one in world.bundle.services
        )
        await world.publish_trust(world.bundle.model_copy(update={"version": 2, "services": bare}))
        async with opened_desks(world) as first, world.running("issuer"):
            desk = await another(first)
            asked = await desk.ask("read", delivery="gateway")
            await desk.decide(asked)
            refusal = await desk.refused(asked)
            assert [reason.code for reason in refusal.reasons] == ["gateway_missing"]
            await desk.issued("read")


@pytest.fixture
async def partner(desk: IssuerBench) -> IssuerBench:
    """A target with a static secret, and an agent for it."""
    wide = scope("partner", ("read",), ("path/**",))
    rules = (RequestRule(method="GET", path="/{path*}", verb="read", resource="path/{path*}"),)
    backend = BackendSettings.model_validate({"kind": "http", "url": "https://api.example"})
    await desk.world.target("partner", backend=backend, requests=rules, verbs=(VerbFloor(verb="read"),))
    ulla = await desk.world.user("ulla", entitlements=wide)
    desk.bot = await desk.world.agent("caller", sponsor=desk.sam, ceiling=wide)
    desk.task = await desk.world.task(desk.bot, by=ulla, scope=wide)
    return desk


async def test_a_static_secret_is_a_lease_and_nothing_else(
    partner: IssuerBench, issuer_bench: IssuerBench, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = scope("partner", ("read",), ("path/x",))
    asked, content = await handed(partner, scope=wanted)
    assert content.credential is None
    lease = await partner.lease(asked.lease_id, "active")
    assert (lease.backend, lease.delivery) == ("http", "gateway")
    later = await another(issuer_bench)
    envelope = await envelope_of(later, (await handed(later, "read"))[0])
    assert envelope
    about = {unverified_about(record.value) for record in await partner.world.records(CREDENTIAL_REPLY)}
    assert asked.id not in about
    answer = await sealed_again(partner, asked.lease_id, gateway(partner))
    assert answer.status_code == 404
    assert "its own source" in answer.json()["message"]

    to_itself = await partner.ask(scope=wanted)
    await partner.decide(to_itself)
    refusal = await partner.refused(to_itself)
    assert [reason.code for reason in refusal.reasons] == ["delivery_gateway_only"]
    assert "delivery to the gateway" in refusal.reasons[0].message

    # Today's registry refuses such a target; there may be records from before.
    monkeypatch.setattr("ringfence.registry.domain.problems", lambda backend: [])
    await partner.world.target(
        "partner", backend=BackendSettings(kind="http"), verbs=(VerbFloor(verb="read"),)
    )
    unset = await partner.ask(scope=wanted, delivery="gateway")
    revisions = partner.revisions.model_copy(update={"target": 2})
    await partner.decide(unset, revisions=revisions)
    refusal = await partner.refused(unset)
    assert [reason.code for reason in refusal.reasons] == ["backend_cannot"]


@pytest.mark.parametrize("delivery", ["agent", "gateway"])
async def test_policy_gets_no_credential_sealed_to_a_key_of_its_own(desk: IssuerBench, delivery: str) -> None:
    """It decides on the agent's request, with the reply key in it replaced and everything else as it was signed."""
    mine = ReplyKey()
    asked = await desk.ask("read", delivery=delivery)
    head, _, signature = asked.compact.split(".")
    claims = asked.claims.model_copy(update={"reply_key": mine.public})
    swapped = f"{head}.{b64encode(claims.model_dump_json(exclude_none=True).encode())}.{signature}"
    await desk.decide(asked, request=swapped)
    finding = await desk.event("finding", asked)
    assert finding.reasons[0].code == "signature_invalid"
    honest, _ = await (desk.issued("read") if delivery == "agent" else handed(desk, "read"))
    if delivery == "gateway":
        seals = desk.world.seals
        envelope = await envelope_of(desk, honest)
        bundle = desk.world.runtimes["issuer"].trust.require()
        own = {
            key.kid
            for service in bundle.services
            if not {"issuer", "gateway"}.isdisjoint(service.roles)
            for key in service.encryption_keys
        }
        assert {seals["gateway"].kid, seals["issuer"].kid} <= set(recipients_of(envelope.value)) <= own
    for record in await desk.world.records(CREDENTIAL_REPLY):
        if record.value[:1] != b"{":
            with pytest.raises(InvalidMessageError):
                mine.open(record.value)


async def test_credential_is_never_stored_in_redis(desk: IssuerBench, issuer_bench: IssuerBench) -> None:
    """Neither of what goes to gateways nor of what goes to agents, under any key, while the leases live."""
    asked, _ = await handed(desk, "read")
    value = opened(desk, (await envelope_of(desk, asked)).value, desk.world.seals["gateway"]).credential.value
    given, content = await desk.issued("read")
    assert content.credential is not None
    secrets = [value, content.credential.value]
    url, canary_key = issuer_bench.world.redis_url, f"{issuer_bench.world.prefix}.canary"
    store = LeaseStore(issuer_bench.world.settings("issuer"))
    try:
        stored = await store.get([asked.lease_id, given.lease_id])
    finally:
        await store.close()
    assert {one.status for one in stored.values()} == {"active"}
    assert not [one for one in stored.values() if b"ciphertext" in one.jws]
    assert await secret_canary.in_redis(url, secrets) == []
    async with Redis.from_url(url) as client:
        await client.set(canary_key, value)
        try:
            assert await secret_canary.in_redis(url, secrets) == [canary_key], "it would have been found"
        finally:
            await client.delete(canary_key)
