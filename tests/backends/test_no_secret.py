"""No secret is left anywhere by what the stories of PostgreSQL and SSH leave out: Valkey, tokens, static secrets.

Delivered to the agent and to the gateway, which injects them; given back, cut, refused, and at a target that does not
answer. Looked for on every topic, in every value of both Redis, in every log and temporary file, in the spool of the
gateway, and in all that the agent and its command line were told.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import traceback
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from ringfence import Agent
from ringfence.cli.commands.target_templates import TEMPLATES, Template
from ringfence.client.agent.credentials import GatewayCredential, IssuedCredential
from ringfence.client.errors import CredentialOverError, CredentialUseError, RequestDeniedError
from ringfence.messages.credential import Delivery
from ringfence.messages.registry import RequestRule
from ringfence.messages.topics import CREDENTIAL_REPLY, LEASE
from tests.backends import story
from tests.backends.insisting import MARK, InsistingApi
from tests.backends.story import Thing
from tests.backends.through import ThroughGateway
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support import secret_canary
from tests.support.servers.redis_target import ValkeyTarget, valkey_target, works
from tests.support.stack import WITHIN_S, RunningStack, Seen, first_pending

CACHE, SHOP, PARTNER = "cache", "shop", "partner"
STATIC = "canary-of-a-static-secret"
BROKER = "broker-secret"
TOKENS = Template(
    "jwt",
    story.TOKENS.verbs,
    (RequestRule(method="GET", path="/{order}", verb="read", resource="order/{order}"),),
)


@dataclass
class Office:
    """A running stack, and what was told to the agent."""

    realm: RunningStack
    cache: ValkeyTarget
    api: InsistingApi
    folder: Path
    secrets: list[str] = field(default_factory=lambda: [STATIC, BROKER])
    told: list[str] = field(default_factory=list)

    async def credential(
        self, agent: Agent, seen: Seen, target: str, resource: str, delivery: Delivery
    ) -> tuple[IssuedCredential, str]:
        """One that was approved, and its value, wherever it went. What is secret of it is looked for."""
        credential = await story.approved(self.realm, agent, target, resource, 250, delivery)
        if isinstance(credential, GatewayCredential):
            value = await story.at_the_gateway(self.realm, agent, seen, credential)
        else:
            value = credential.value
        self.told.append(repr(credential))
        # Of a URL the password; of a token, of which the claims stand in the lease as well, the signature.
        self.secrets.append(str(urlsplit(value).password) if target == CACHE else value.rpartition(".")[2])
        return credential, value

    async def through(self, handle: IssuedCredential, target: str, path: str, value: str) -> None:
        """A request by the gateway, which injects this value: the API has it, and sends back all that it has."""
        assert isinstance(handle, GatewayCredential)
        port = int(str(self.realm.stack.door).rpartition(":")[2])
        agent = ThroughGateway(self.realm.key("agent", self.realm.agent), port)
        self.api.wanted = {("Authorization", f"Bearer {value}")}
        async with asyncio.timeout(WITHIN_S):
            while True:
                answer = await agent.send(handle.handle, "GET", f"/{target}{path}", [(MARK, target)])
                self.told.append(f"{answer.headers} {answer.body.decode()}")
                if answer.status == 200:
                    break
                assert answer.json()["code"] in (
                    "handle_unknown",
                    "stale_view",
                )  # the lease is on its way there
        assert len(self.api.came(target)) == 1

    @contextlib.contextmanager
    def hearing(self, *kinds: type[Exception]) -> Iterator[None]:
        with pytest.raises(kinds) as raised:
            yield
        self.told.append("".join(traceback.format_exception(raised.value)))


@pytest.fixture
async def office(kafka: Kafka, redis_server: RedisServer, tmp_path: Path) -> AsyncIterator[Office]:
    static = tmp_path / "partner-key"
    static.write_text(f"{STATIC}\n")
    static.chmod(0o600)
    async with (
        valkey_target(CACHE, tmp_path) as cache,
        InsistingApi(set()).serving() as api,
        story.running(kafka, redis_server, "no-secret", cache.places() | {PARTNER: f"file:{static}"}) as (
            realm,
            folder,
        ),
    ):
        at = {"url": api.url}
        await story.staff(
            realm,
            Thing.of(CACHE, "redis", ("read", "write"), "jobs/**"),
            Thing(SHOP, TOKENS, ("read",), ("order/**",), at),
            Thing(PARTNER, TEMPLATES["http"], ("read",), ("path/**",), at),
        )
        yield Office(realm, cache, api, folder)


async def test_no_secret_is_anywhere_but_with_whom_it_is_for(office: Office, tmp_path: Path) -> None:
    realm = office.realm
    async with realm.as_agent() as agent, realm.seen(CREDENTIAL_REPLY, LEASE) as seen:
        made = [
            await office.credential(agent, seen, *what, delivery)
            for what in ((CACHE, "jobs/1"), (SHOP, "order/7"))
            for delivery in ("agent", "gateway")
        ]
        (mine, url), (_, injected), (token, _), (shown, value) = made
        assert [await works(one, "GET", "jobs/1") for one in (url, injected)] == [True, True]
        await _misused(office, mine, token)
        await office.through(shown, SHOP, "/7", value)
        partner = await story.approved(realm, agent, PARTNER, "path/orders", 250, "gateway")
        office.told.append(repr(partner))
        await office.through(partner, PARTNER, "/orders", STATIC)
        await _at_a_target_that_is_gone(office, agent)
        await _by_the_command_line(office, tmp_path)
        await agent.release(token)
        async with realm.as_operator() as olga:
            await olga.revoke(target_id=CACHE, reason="enough")
        for credential, _ in made[:2]:
            assert (await realm.end_of(agent, seen, credential.lease_id)).status == "revoked"
    assert len(set(office.secrets)) == len(office.secrets) == 7
    assert all(len(secret) > 8 for secret in office.secrets)
    await _looked_for(office)


async def _misused(office: Office, cache: IssuedCredential, token: IssuedCredential) -> None:
    """What the SDK says of a credential that is used in a way that it is not for, or after it was wiped."""
    with office.hearing(CredentialUseError):
        cache.headers()
    with office.hearing(CredentialUseError):
        cache.auth()
    token.wipe()
    with office.hearing(CredentialOverError):
        token.apply()
    with office.hearing(RequestDeniedError):
        async with office.realm.as_agent() as agent:
            await story.approved(office.realm, agent, CACHE, "jobs/*", 250)  # no ACL can say that


async def _at_a_target_that_is_gone(office: Office, agent: Agent) -> None:
    """What is logged of it, and told to the agent."""
    office.cache.write_secret("127.0.0.1:9")  # where nobody listens
    with office.hearing(RequestDeniedError):
        await story.approved(office.realm, agent, CACHE, "jobs/2", 250)
    office.cache.write_secret()


_PROGRAM = """
import os, redis
url = os.environ["REDIS_URL"]
redis.Redis.from_url(url).get("jobs/3")
print(url)
"""


async def _by_the_command_line(office: Office, tmp_path: Path) -> None:
    realm = office.realm
    argv = story.command(realm, tmp_path / "bot.json", f"{CACHE}:read:jobs/3", sys.executable, "-c", _PROGRAM)
    process = await asyncio.create_subprocess_exec(
        sys.executable, *argv, env=os.environ | realm.stack.environment() | {"TMPDIR": str(office.folder)},
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    async with realm.sponsor() as sam:
        await sam.approve(await first_pending(sam))
    said, told = await asyncio.wait_for(process.communicate(), 60)
    assert process.returncode == 0, told
    office.secrets.append(str(urlsplit(said.decode().strip()).password))
    office.told.append(told.decode())


async def _looked_for(office: Office) -> None:
    realm, secrets = office.realm, office.secrets
    assert await secret_canary.on_topics(realm.settings, secrets) == []
    assert await secret_canary.in_redis(realm.stack.redis_url, secrets) == []
    assert secret_canary.in_files([office.folder], secrets) == []
    assert secret_canary.in_texts(office.told, secrets) == []
    # Nor has the target's own server one in clear.
    async with office.cache.admin() as admin:
        listed = [line.decode() for line in await admin.execute_command("ACL", "LIST")]
    assert secret_canary.in_texts(listed, secrets) == []
    # A scan that finds nothing must be able to find something.
    assert "credential.decision" in await secret_canary.on_topics(realm.settings, [story.REASON])
    assert secret_canary.in_files([office.folder], ["is not made: "])
    assert secret_canary.in_files([realm.stack.options.state / "spool"], [PARTNER])
    assert secret_canary.in_texts(office.told, ["does not answer", "no HTTP header"])
    assert secret_canary.in_texts(office.told, ["*" * len(STATIC)])
