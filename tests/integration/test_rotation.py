"""Keys follow one another under load: of every service at once, and the root itself. Nobody is refused meanwhile."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ringfence.client.admin.key_rotation import rotate_root, rotate_services
from ringfence.client.admin.trust_setup import SERVICE_ROLES, publish_bundle
from ringfence.client.agent.agent import Agent
from ringfence.client.errors import RequestDeniedError
from ringfence.dev.stack import Stack, StackOptions
from ringfence.kernel.crypto.jwe import recipients_of
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Topic
from ringfence.messages.credential import CredentialDecision
from ringfence.messages.operations import DeadLetter
from ringfence.messages.topics import (
    CREDENTIAL_DECISION,
    CREDENTIAL_REPLY,
    DEAD_LETTER,
    HEARTBEAT,
    LEASE,
    SERVICE_EVENT,
    TRUST,
)
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.integration.stack.test_attacks import buried, put
from tests.integration.test_gateway_faults import place_in
from tests.support.http_client import plain_client
from tests.support.stack import WITHIN_S, RunningStack, Seen, realm_in

pytestmark = [pytest.mark.apache, pytest.mark.timeout(300)]


@pytest.fixture
def own_stack(kafka: Kafka, redis_server: RedisServer) -> Iterator[Stack]:
    """A stack of this test's own: its keys change."""
    with tempfile.TemporaryDirectory(prefix="ringfence-rotation-") as folder:
        mark = f"rotation{uuid.uuid4().hex[:8]}"
        options = StackOptions(
            Path(folder) / "state", kafka=kafka.bootstrap, embedded_broker=kafka.embedded,
            redis_url=redis_server.url, topic_prefix=mark, redis_prefix=mark,
        )  # fmt: skip
        with Stack(options) as running:
            yield running


@dataclass
class Load:
    """Credentials asked for without a pause, one after the other, each released again."""

    lease_ids: list[str] = field(default_factory=list)


@asynccontextmanager
async def under_load(realm: RunningStack, agent: Agent) -> AsyncIterator[Load]:
    """While the block runs. Whatever is refused meanwhile fails the test; but what a machine keeps busy for longer than
    tables may go unconfirmed, while a test stops the registry, has to be asked for again.
    """
    load, stop = Load(), asyncio.Event()

    async def work() -> None:
        while not stop.is_set():
            try:
                credential = await realm.read(agent)
            except RequestDeniedError as error:
                if error.code != "stale_view":
                    raise
                continue
            load.lease_ids.append(credential.lease_id)
            await agent.release(credential)

    working = asyncio.create_task(work())
    try:
        yield load
    finally:
        stop.set()
        await working


async def said_by(stack: Stack, what: str) -> dict[str, Any]:
    """What `/readyz` of each service tells of its trust."""
    async with plain_client(timeout=5) as http:
        answers = [await http.get(f"{stack.url(role)}/readyz") for role in SERVICE_ROLES]
    assert all(answer.status_code == 200 for answer in answers), [answer.text for answer in answers]
    return {role: answer.json()[what] for role, answer in zip(SERVICE_ROLES, answers, strict=True)}


async def until(found: Callable[[], Any], what: str) -> None:
    """Return once the coroutine function `found` gives something true."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(WITHIN_S):
            while not await found():
                await asyncio.sleep(0.1)
            return
    raise AssertionError(f"did not come to be: {what}")


def kids(seen: Seen, topic: Topic[Any]) -> set[str]:
    return {parse(record.value).header.kid for record in seen.of(topic) if record.value}


async def test_the_keys_of_all_services_follow_under_load(own_stack: Stack) -> None:
    stack, overlap_s = own_stack, 30
    async with realm_in(stack) as realm, realm.as_agent() as agent:
        old = {role: SigningKey.load(stack.trust.service_key(role)) for role in SERVICE_ROLES}
        held = await realm.read(agent, ttl_s=900)
        async with (
            realm.seen(LEASE, CREDENTIAL_DECISION, HEARTBEAT, SERVICE_EVENT, DEAD_LETTER) as seen,
            realm.publisher() as attacker,
        ):
            async with under_load(realm, agent) as load:
                bundle = rotate_services(stack.trust, SERVICE_ROLES, overlap_s=overlap_s)
                await publish_bundle(stack.trust, realm.settings)
                named = {one.id.rpartition("/")[2]: one for one in bundle.services}
                new = {role: named[role].keys[-1].kid for role in SERVICE_ROLES}
                assert await said_by(stack, "signs_by") == {role: key.kid for role, key in old.items()}

                async def all_sign_by_new_keys() -> bool:
                    return await said_by(stack, "signs_by") == new

                await until(all_sign_by_new_keys, "that all services sign by their new keys")
                done = len(load.lease_ids)
                await seen.until(lambda: len(load.lease_ids) > done + 3, "credentials by the new keys")
                await seen.until(
                    lambda: {new["issuer"], new["revoker"]} <= kids(seen, LEASE), "leases by the new keys"
                )
                await seen.until(lambda: new["policy"] in kids(seen, CREDENTIAL_DECISION), "its decisions")
                await seen.until(lambda: {new["registry"], new["gateway"]} <= kids(seen, HEARTBEAT), "beats")
            assert await said_by(stack, "trust_bundle") == dict.fromkeys(SERVICE_ROLES, 2)

            async def the_old_ones_have_ended() -> bool:
                return time.time() > bundle.iat + overlap_s + 2

            await until(the_old_ones_have_ended, "the end of the old keys")

            # A thief of the old keys comes too late, whatever he says of when he signed.
            decision = next(
                d for r in seen.of(CREDENTIAL_DECISION)
                if (d := realm.verified(agent, r, CredentialDecision, "policy")) and d.outcome == "allowed"
            )  # fmt: skip
            where = await put(attacker, CREDENTIAL_DECISION, realm.agent, sign(decision, old["policy"]))
            assert (await buried(seen, where))["code"] == "key_unknown"

            # Whoever starts from nothing now believes what the old keys signed in their time.
            for role in ("policy", "issuer", "gateway", "registry", "revoker"):
                await asyncio.to_thread(stack.child(role).stop, 10.0)
                stack.start_service(role)
                await asyncio.to_thread(stack.wait_ready, [role])
            assert await realm.read(agent)
            async with realm.as_agent() as again:
                await again.release(held)
                end = await realm.end_of(again, seen, held.lease_id)
            assert end.status == "released"
            assert await said_by(stack, "signs_by") == new
            letters = [record.value for record in seen.of(DEAD_LETTER)]
            assert [letter for letter in letters if b"credential.decision" not in letter][:3] == []
            assert len(letters) == 1, "the thief's alone"


async def test_the_keys_that_credentials_are_sealed_to_follow_without_a_restart(own_stack: Stack) -> None:
    stack = own_stack
    async with place_in(stack) as place, place.realm.seen(CREDENTIAL_REPLY) as seen:
        held = await place.leased()
        pids = stack.children()
        # So that nothing is sealed to the keys of before any more, and whoever has not the new ones opens nothing.
        bundle = rotate_services(stack.trust, ["gateway", "issuer"], compromised=True)
        await publish_bundle(stack.trust, place.realm.settings)
        new = {
            key.kid for one in bundle.services for key in one.encryption_keys if key.not_after > bundle.iat
        }
        assert len(new) == 2, "those of before have ended"

        async def all_have_it() -> bool:
            return await said_by(stack, "trust_bundle") == dict.fromkeys(SERVICE_ROLES, 2)

        await until(all_have_it, "that all services have the bundle")
        assert await place.status() == 200, "what was opened before stays"
        begun = len(seen.of(CREDENTIAL_REPLY))
        later = await place.leased()
        await place.agent.release(held)
        await place.until(200)
        assert later != held

        def sealed() -> list[set[str]]:
            replies = [record.value for record in seen.of(CREDENTIAL_REPLY)[begun:]]
            return [set(recipients_of(value)) for value in replies if value.startswith(b"{")]

        await seen.until(sealed, "the sealed credential")
        assert sealed() == [new]
        assert stack.children() == pids
        # One that starts from nothing opens by the new key what stands on Kafka, and asks for nothing.
        await asyncio.to_thread(stack.child("gateway").stop, 10.0)
        stack.start_service("gateway")
        await asyncio.to_thread(stack.wait_ready, ["gateway"])
        await place.until(200)
        async with plain_client(timeout=5) as http:
            for role in ("gateway", "issuer"):
                said = (await http.get(f"{stack.url(role)}/readyz")).json()
                assert not [one for one in said.get("warnings", []) if "sealed" in one]


async def test_a_root_follows_the_root_that_everybody_is_pinned_to(own_stack: Stack) -> None:
    stack = own_stack
    async with realm_in(stack) as realm, realm.as_agent() as agent:
        old = SigningKey.load(stack.trust.root_key)
        before = stack.trust.bundle.read_text().strip()
        async with realm.seen(LEASE, DEAD_LETTER) as seen:
            async with under_load(realm, agent) as load:
                rotated = rotate_root(stack.trust)
                await publish_bundle(stack.trust, realm.settings)

                async def all_have_followed() -> bool:
                    return await said_by(stack, "trust_bundle") == dict.fromkeys(SERVICE_ROLES, 2)

                await until(all_have_followed, "that all services follow the new root")
                done = len(load.lease_ids)
                await seen.until(lambda: len(load.lease_ids) > done + 3, "credentials under the new root")

                # What the old root would sign now is refused, though everybody is pinned to it.
                rogue = rotated.bundle.model_copy(
                    update={"version": 9, "services": (), "former_roots": (), "handovers": ()}
                )
                async with realm.publisher() as thief:
                    await put(thief, TRUST, "9", sign(rogue, old, header_jwk=True))
                    await put(thief, TRUST, "1", before)
                # One after the other, pinned to the new root: they read records that the old one began.
                for role in ("registry", "policy", "issuer", "revoker", "gateway", "audit"):
                    await asyncio.to_thread(stack.child(role).stop, 10.0)
                    stack.start_service(role)
                    await asyncio.to_thread(stack.wait_ready, [role])
                assert await said_by(stack, "trust_bundle") == dict.fromkeys(SERVICE_ROLES, 2)
                done = len(load.lease_ids)
                await seen.until(lambda: len(load.lease_ids) > done + 3, "credentials after all restarts")
            # What the thief wrote, behind the two that count, and nothing of anybody else under either root.
            buried = [DeadLetter.model_validate_json(r.value).source for r in seen.of(DEAD_LETTER)]
            trust = TRUST.name(realm.settings.topic_prefix)
            assert {(at.topic, at.offset) for at in buried} <= {(trust, 2), (trust, 3)}
            assert buried
        assert stack.trust.fingerprint() == rotated.fingerprint != old.kid
        # Clients: one that is pinned to the old root still, and one to the new.
        for fingerprint in (old.kid, rotated.fingerprint):
            pinned = RunningStack(
                stack, realm.settings.model_copy(update={"trust_root": fingerprint}), realm.mark, realm.keys, realm.task
            )  # fmt: skip
            async with pinned.as_agent() as bot, pinned.administrator("sam") as sam:
                assert (await pinned.read(bot)).lease_id
                await sam.set_ceiling(realm.agent, [realm.permission(["read", "write"], "env/**")])
