"""Access tokens, from the agent's request to the resource server: proofs of the agent's key, keys that follow one
another, and what nobody can take back."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import uvicorn

from ringfence.client.agent.agent import Agent
from ringfence.client.agent.credentials import IssuedCredential
from ringfence.client.agent.httpx_auth import BearerAuth, DpopAuth
from ringfence.client.errors import InvalidCallError, RequestDeniedError, TokenRejectedError
from ringfence.client.resource_server.asgi import TOKEN, TokenGuard
from ringfence.client.resource_server.dpop_proofs import Nonces
from ringfence.client.resource_server.verifier import KEYS_LIFE_S, TokenVerifier, VerifiedToken
from ringfence.dev.processes import free_port
from ringfence.issuer.settings import IssuerSettings
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import ServiceRole
from ringfence.messages.registry import BackendSettings, VerbFloor
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.benches.sdk_clients import READ, Elsewhere, client
from tests.support.http_client import plain_client
from tests.support.token_keys import rsa_key_file
from tests.support.world import WITHIN_S, Party, World

FREE = (VerbFloor(verb="read"),)


@dataclass(frozen=True)
class Organisation:
    """maria, an agent that may read staging, and an issuer that is reached by its name."""

    maria: Party
    bot: Party
    issuer: str
    http: httpx.AsyncClient
    """As a resource server reaches the issuer."""

    def verifier(self, target: Party, **options: Any) -> TokenVerifier:
        """A resource server that asks introspection, unless told otherwise."""
        return TokenVerifier(
            self.issuer, target.id, **{"introspection_key": target.key, "http": self.http, **options}
        )


@asynccontextmanager
async def organisation(world: World, **issuer: Any) -> AsyncIterator[Organisation]:
    url = "http://issuer.test.example"
    own: dict[ServiceRole, Any] = {"issuer": IssuerSettings(**issuer)}
    async with world.running("registry", "policy", "issuer", "revoker", own=own, issuer_url=url):
        there = f"http://127.0.0.1:{world.ports['issuer']}"
        sam = await world.user("sam", ("sponsor",), READ)
        maria = await world.user("maria", (), READ)
        bot = await world.agent("bot", sam, READ)
        async with httpx.AsyncClient(transport=Elsewhere(url, there), timeout=WITHIN_S) as http:
            yield Organisation(maria, bot, url, http)


async def asked(world: World, there: Organisation, ttl_s: int = 300) -> IssuedCredential:
    task = await world.task(there.bot, by=there.maria, scope=READ)
    async with Agent.connect(there.bot.key, client(world)) as agent:
        return await agent.request(
            task=task, target="staging", verbs=["read"], resources=["env/staging/web"], reason="a test",
            ttl_s=ttl_s, timeout_s=WITHIN_S,
        )  # fmt: skip


@asynccontextmanager
async def resource_server(verifier: TokenVerifier) -> AsyncIterator[str]:
    """A server of its own behind the guard, over real HTTP: it answers with the lease that it was shown."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"

    async def application(scope: Any, receive: Any, send: Any) -> None:
        token: VerifiedToken = scope[TOKEN]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": token.lease_id.encode()})

    guard = TokenGuard(application, verifier, base_url=url, needs=lambda scope: ("read", scope["path"][1:]))
    config = uvicorn.Config(guard, host="127.0.0.1", port=port, lifespan="off", log_level="warning")
    server = uvicorn.Server(config)
    serving = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(WITHIN_S):
            while not server.started:
                await asyncio.sleep(0.01)
        yield url
    finally:
        server.should_exit = True
        await serving


# --- proofs -----------------------------------------------------------------------------------------------------------


async def test_a_token_that_was_found_opens_nothing_where_a_proof_is_demanded(world: World) -> None:
    async with organisation(world) as there:
        backend = BackendSettings.model_validate({"kind": "jwt", "dpop": "required"})
        staging = await world.target("staging", FREE, backend=backend)
        credential = await asked(world, there)
        assert credential.token_type == "DPoP"
        async with (
            there.verifier(staging, nonces=Nonces()) as verifier,
            resource_server(verifier) as server,
            plain_client(base_url=server, timeout=WITHIN_S) as http,
        ):

            async def read(auth: httpx.Auth, path: str = "/env/staging/web?full=1") -> int:
                return (await http.get(path, auth=auth)).status_code

            own = credential.auth()
            answer = await http.get("/env/staging/web", auth=own)
            assert (answer.status_code, answer.text) == (200, credential.lease_id)
            assert await read(own) == 200
            assert await read(own, "/env/production/web") == 403
            assert await read(BearerAuth(credential.value)) == 401
            assert await read(DpopAuth(credential.value, SigningKey.generate(there.bot.id))) == 401
            with pytest.raises(InvalidCallError, match=r"headers\('GET', url\)"):
                credential.headers()
            headers = credential.headers("GET", f"{server}/env/staging/web")
            refused = await http.get("/env/staging/web", headers=headers)
            assert 'error="use_dpop_nonce"' in refused.headers["www-authenticate"]

            async with Agent.connect(there.bot.key, client(world)) as agent:
                await agent.release(credential, timeout_s=WITHIN_S)
            assert await read(own) == 401

        async with (
            there.verifier(staging, introspection_key=None) as unasking,
            resource_server(unasking) as server,
        ):
            headers = credential.headers("GET", f"{server}/env/staging/web")
            async with plain_client(base_url=server, timeout=WITHIN_S) as http:
                statuses = [(await http.get("/env/staging/web", headers=headers)).status_code for _ in "12"]
            assert statuses == [200, 401], "a proof counts once, wherever nonces are not demanded"


async def test_introspection_says_how_a_token_is_to_be_presented(world: World) -> None:
    async with organisation(world) as there:
        for dpop, kind in (("required", "DPoP"), ("off", "Bearer")):
            backend = BackendSettings.model_validate({"kind": "jwt", "dpop": dpop})
            staging = await world.target("staging", FREE, backend=backend)
            credential = await asked(world, there)
            response = await there.http.post(
                f"{there.issuer}/oauth2/introspect",
                data={"token": credential.value},
                headers=world.bearer(staging, "issuer"),
            )
            assert (credential.token_type, response.json()["token_type"]) == (kind, kind)
            assert response.json()["cnf"] == {"jkt" if dpop == "required" else "kid": there.bot.key.kid}


# --- what can be recalled ---------------------------------------------------------------------------------------------


async def test_irrevocable_token_lives_300_seconds_at_most(world: World) -> None:
    async with organisation(world) as there:
        deaf = await world.target("staging", FREE, keys=())
        with pytest.raises(RequestDeniedError, match="300 s at most") as denied:
            await asked(world, there, ttl_s=301)
        assert [reason.code for reason in denied.value.reasons] == ["not_recallable"]
        credential = await asked(world, there, ttl_s=300)
        async with there.verifier(deaf, introspection_key=None) as verifier:
            await verifier.verify(credential.value)

        await world.target("staging", FREE)  # with a key, to ask introspection with
        assert (await asked(world, there, ttl_s=301)).kind == "jwt"


# --- keys -------------------------------------------------------------------------------------------------------------


async def test_a_target_that_verifies_nothing_but_rs256_gets_it(world: World, tmp_path: Path) -> None:
    async with organisation(world, rs256_token_key_file=rsa_key_file(tmp_path)) as there:
        backend = BackendSettings.model_validate({"kind": "jwt", "alg": "RS256"})
        staging = await world.target("staging", FREE, backend=backend)
        credential = await asked(world, there)
        assert jwt.get_unverified_header(credential.value)["alg"] == "RS256"
        async with (
            there.verifier(staging) as verifier,
            resource_server(verifier) as server,
            plain_client(base_url=server, auth=credential.auth(), timeout=WITHIN_S) as http,
        ):
            assert (await http.get("/env/staging/web")).status_code == 200


async def test_without_a_key_for_what_a_target_wants_nothing_is_issued(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Today's registry refuses the second; there may be records from before.
    monkeypatch.setattr("ringfence.registry.domain.problems", lambda backend: [])
    async with organisation(world) as there:
        for wrong in ({"alg": "RS256"}, {"dpop": "sometimes"}):
            backend = BackendSettings.model_validate({"kind": "jwt", **wrong})
            await world.target("staging", FREE, backend=backend)
            with pytest.raises(RequestDeniedError, match="ask an operator") as denied:
                await asked(world, there)
            assert (denied.value.by, denied.value.reasons[0].code) == ("issuer", "backend_cannot")
        await world.target("staging", FREE)
        assert (await asked(world, there)).kind == "jwt"


class Balancer(httpx.AsyncHTTPTransport):
    """Sends one request after the other to another replica of the issuer; counts who asks for its keys."""

    def __init__(self, ports: list[int]) -> None:
        super().__init__()
        self.ports, self._turns, self.key_fetches = ports, itertools.count(), 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.key_fetches += request.url.path == "/.well-known/jwks.json"
        port = self.ports[next(self._turns) % len(self.ports)]
        request.url = request.url.copy_with(host="127.0.0.1", port=port)
        return await super().handle_async_request(request)


class Ahead:
    """A clock that a test puts forward."""

    def __init__(self) -> None:
        self.by_s = 0

    def now_ms(self) -> int:
        return time.time_ns() // 1_000_000 + self.by_s * 1000


class Replicas:
    """Two issuers of one name. They are replaced one after the other, and one is there at any time."""

    URL = "http://issuer.test.example"

    def __init__(self, desk: IssuerBench) -> None:
        self.desk = desk
        self.ports: list[int] = []
        self._stacks: list[AsyncExitStack] = []

    async def roll(self, **own: Any) -> None:
        """Replace all replicas by such with these settings; a credential is issued and believed at every moment."""
        for stack in [*self._stacks] or (None, None):
            fresh, port = AsyncExitStack(), free_port()
            settings = {"http": f"127.0.0.1:{port}", "issuer_url": self.URL}
            world = self.desk.world
            running = world.running("issuer", own={"issuer": IssuerSettings(**own)}, **settings)
            await fresh.enter_async_context(running)
            self.ports.append(port)
            if stack is not None:
                self.ports.pop(0)
                await stack.aclose()
            self._stacks = [*self._stacks[stack is not None :], fresh]

    async def close(self) -> None:
        for stack in self._stacks:
            await stack.aclose()


async def test_one_key_follows_another_and_nobody_is_refused_meanwhile(
    kafka: Kafka, redis_server: RedisServer
) -> None:
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as office,
    ):
        first = world.folder / "keys" / "issuer-token.json"
        second = world.folder / "keys" / "issuer-token-2.json"
        SigningKey.generate(f"spiffe://{world.td}/service/issuer").save(second)
        replicas = Replicas(await another(office))
        desk = replicas.desk
        balancer = Balancer(replicas.ports)
        done = asyncio.Event()

        async def issued() -> str:
            _, content = await desk.issued("read")
            assert content.credential is not None
            return content.credential.value

        try:
            await replicas.roll(token_key_file=first)
            async with httpx.AsyncClient(transport=balancer, timeout=WITHIN_S) as http:
                clock = Ahead()
                verifier = TokenVerifier(replicas.URL, desk.target.id, http=http, clock=clock)
                old = await issued()
                await verifier.verify(old)

                async def all_the_time() -> int:
                    """Issue and verify, also what was issued first, until told to stop."""
                    for n in itertools.count():
                        await verifier.verify(await issued())
                        await verifier.verify(old)
                        if done.is_set():
                            return n
                    raise AssertionError

                working = asyncio.create_task(all_the_time())
                await replicas.roll(token_key_file=first, published_token_key_files=(second,))
                # Published long before it signs: by then whoever keeps keys has fetched them once more.
                clock.by_s = KEYS_LIFE_S + 1
                await verifier.verify(old)
                asking = TokenVerifier(replicas.URL, desk.target.id, desk.target.key, http=http)
                for _ in range(4):
                    await asking.verify(await issued())
                fetches = balancer.key_fetches
                await replicas.roll(token_key_file=second, published_token_key_files=(first,))
                new = await issued()
                assert [jwt.get_unverified_header(token)["kid"] for token in (old, new)] == [
                    SigningKey.load(file).kid for file in (first, second)
                ]
                for token in (old, new, old, new):  # whichever replica is asked
                    await asking.verify(token)
                done.set()
                assert await working > 0
                assert balancer.key_fetches == fetches, "everybody knew the second key already"

                # The last token of the first key has expired: it is published no more, and verifies nothing.
                await replicas.roll(token_key_file=second)
                later = TokenVerifier(replicas.URL, desk.target.id, http=http)
                await later.verify(new)
                with pytest.raises(TokenRejectedError, match="publishes no key"):
                    await later.verify(old)
        finally:
            await replicas.close()
