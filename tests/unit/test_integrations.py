"""Sources of credentials, and the adapters of httpx and requests, against a guarded server on loopback."""

from __future__ import annotations

import asyncio
import io
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest
import requests
import uvicorn
from requests.adapters import HTTPAdapter

from ringfence import (
    Agent,
    CredentialOverError,
    CredentialUseError,
    InvalidCallError,
    Nonces,
    Permission,
    RequestDeniedError,
    TokenGuard,
)
from ringfence.integrations import BlockingAgent, BlockingCredentialSource, CredentialSource
from ringfence.integrations import httpx as for_httpx
from ringfence.integrations import requests as for_requests
from ringfence.testing import InMemoryRingfence

ALL = [Permission(target="shop", verbs=("read", "write"), resources=("**",))]


@dataclass
class Shop:
    """A resource server behind a guard, and an agent that has a task there."""

    broker: InMemoryRingfence
    agent: Agent
    task: str
    url: str = ""
    seen: list[tuple[str, bytes]] = field(default_factory=list)
    """Method and body of what reached the application."""

    def wants(self, **options: Any) -> dict[str, Any]:
        given = {
            "task": self.task,
            "target": "shop",
            "verbs": ["read", "write"],
            "resources": ["orders/*"],
            "reason": "to count",
        }
        return {**given, **options}

    def source(self, **options: Any) -> CredentialSource:
        return CredentialSource(self.agent, **self.wants(**options))

    def statuses(self) -> list[str]:
        return [lease.status for lease in self.broker.leases()]

    async def application(self, scope: Any, receive: Any, send: Any) -> None:
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.seen.append((scope["method"], body))
        elsewhere = scope["path"] == "/orders/moved"
        headers = [(b"location", b"/orders/1")] if elsewhere else []
        await send({"type": "http.response.start", "status": 307 if elsewhere else 200, "headers": headers})
        await send({"type": "http.response.body", "body": b"an order"})


def made(*, dpop: bool) -> Shop:
    broker = InMemoryRingfence()
    broker.target("shop", verbs=["read", "write"], dpop=dpop)
    broker.answer_all("approved")  # the bundle asks about whoever reads and writes
    return Shop(broker, broker.agent("bot"), broker.task("bot", ALL))


@pytest.fixture(params=["bearer", "DPoP", "DPoP with nonces"])
async def shop(request: pytest.FixtureRequest) -> AsyncIterator[Shop]:
    """On loopback, by HTTP."""
    made_shop = made(dpop=request.param != "bearer")
    listening = socket.create_server(("127.0.0.1", 0))
    made_shop.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    guarded = TokenGuard(
        made_shop.application,
        made_shop.broker.verifier(
            "shop",
            require_proof=request.param != "bearer",
            nonces=Nonces(b"n" * 32) if request.param.endswith("nonces") else None,
        ),
        base_url=made_shop.url,
        needs=lambda scope: ("read" if scope["method"] == "GET" else "write", scope["path"][1:]),
    )
    server = uvicorn.Server(uvicorn.Config(guarded, log_level="error", lifespan="off"))
    serving = asyncio.create_task(server.serve([listening]))
    yield made_shop
    server.should_exit = True
    await serving
    listening.close()


# --- sources ---


async def test_a_source_asks_when_it_is_first_needed_and_releases_at_its_end() -> None:
    shop = made(dpop=False)
    async with shop.source() as source:
        assert shop.statuses() == []
        credential = await source.current()
        assert await source.current() is credential
        assert shop.statuses() == ["active"]
    assert shop.statuses() == ["released"]
    with pytest.raises(CredentialOverError):
        _ = credential.value


async def test_a_source_that_many_ask_at_once_asks_once() -> None:
    shop = made(dpop=False)
    async with shop.source() as source:
        found = await asyncio.gather(*(source.current() for _ in range(10)))
    assert len({one.lease_id for one in found}) == 1
    assert shop.statuses() == ["released"]


async def test_a_source_asks_anew_before_the_end() -> None:
    shop = made(dpop=False)
    async with shop.source(ttl_s=100) as source:
        first = await source.current()
        await shop.broker.advance(50)  # the clock goes on by itself as well
        assert await source.current() is first
        await shop.broker.advance(21)
        second = await source.current()
        assert second.lease_id != first.lease_id
        assert first.usable(), "a call may still use it"
        assert source.is_fresh(second.lease_id)
        assert not source.is_fresh(first.lease_id)
        assert shop.statuses() == ["active", "active"]
    assert shop.statuses() == ["released", "released"]


async def test_a_short_life_is_used_up_to_its_half() -> None:
    shop = made(dpop=False)
    async with shop.source(ttl_s=20) as source:
        first = await source.current()
        await shop.broker.advance(9)
        assert await source.current() is first
        await shop.broker.advance(2)
        assert await source.current() is not first


async def test_denied_credential_is_requested_again_and_not_cached() -> None:
    shop = made(dpop=False)
    async with shop.source(verbs=["destroy"]) as source:
        for _ in range(2):
            with pytest.raises(RequestDeniedError):
                await source.current()
    assert shop.statuses() == []


async def test_after_a_revocation_a_new_credential_is_asked_for_by_name() -> None:
    shop = made(dpop=False)
    async with shop.source() as source:
        revoked = await source.current()
        await shop.broker.revoke(agent="bot")
        assert await source.current() is revoked
        assert (await source.renew()).lease_id != revoked.lease_id
    assert shop.statuses() == ["revoked", "released"]


async def test_a_failed_release_hides_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = made(dpop=False)
    source = shop.source()
    await source.current()

    async def fail(*_: Any, **__: Any) -> None:
        raise InvalidCallError("no")

    monkeypatch.setattr(shop.agent, "release", fail)
    await source.close()
    await source.close()
    assert shop.statuses() == ["active"]


def test_a_source_takes_no_string_for_a_list() -> None:
    shop = made(dpop=False)
    with pytest.raises(InvalidCallError, match=r"write verbs=\['read'\]"):
        shop.source(verbs="read")


# --- httpx ---


async def test_httpx_presents_what_is_leased(shop: Shop) -> None:
    async with shop.source() as source, httpx.AsyncClient(auth=for_httpx.LeaseAuth(source)) as http:
        for _ in range(2):
            answer = await http.get(f"{shop.url}/orders/1")
            assert (answer.status_code, answer.text) == (200, "an order")
        assert (await http.post(f"{shop.url}/orders/1", content=b"new")).status_code == 200
        assert (await http.get(f"{shop.url}/invoices/1")).status_code == 403
    assert shop.seen == [("GET", b""), ("GET", b""), ("POST", b"new")]
    assert shop.statuses() == ["released"]


async def test_httpx_goes_on_past_the_end_of_a_lease(shop: Shop) -> None:
    async with shop.source(ttl_s=100) as source, httpx.AsyncClient(auth=for_httpx.LeaseAuth(source)) as http:
        for _ in range(3):
            assert (await http.get(f"{shop.url}/orders/1")).status_code == 200
            await shop.broker.advance(71)
    assert len(shop.statuses()) == 3


async def test_httpx_without_asyncio_presents_what_is_leased(shop: Shop) -> None:
    def use() -> list[int]:
        with (
            BlockingAgent(shop.agent) as agent,
            BlockingCredentialSource(agent, **shop.wants()) as source,
            httpx.Client(auth=for_httpx.LeaseAuth(source)) as http,
        ):
            return [http.get(f"{shop.url}/orders/{number}").status_code for number in range(3)]

    assert await asyncio.to_thread(use) == [200, 200, 200]
    assert shop.statuses() == ["released"]


async def test_a_denial_reaches_the_caller_of_httpx(shop: Shop) -> None:
    async with (
        shop.source(verbs=["destroy"]) as source,
        httpx.AsyncClient(auth=for_httpx.LeaseAuth(source)) as http,
    ):
        with pytest.raises(RequestDeniedError):
            await http.get(f"{shop.url}/orders/1")
    assert shop.seen == []


async def test_credentials_go_to_one_origin_alone() -> None:
    shop = made(dpop=False)
    async with shop.source() as source:
        auth = for_httpx.LeaseAuth(source, origin="https://shop.example/")
        transport = httpx.MockTransport(lambda request: httpx.Response(200, headers=request.headers))
        async with httpx.AsyncClient(transport=transport, auth=auth) as http:
            answer = await http.get("https://SHOP.example:443/orders/1")
            assert answer.headers["authorization"].startswith("Bearer ")
            for elsewhere in ("http://shop.example/", "https://shop.example:8443/", "https://evil.example/"):
                with pytest.raises(CredentialUseError, match="goes elsewhere"):
                    await http.get(elsewhere)
        for wrong in ("shop.example", "ftp://shop.example", "https://"):
            with pytest.raises(InvalidCallError, match="origin"):
                for_httpx.LeaseAuth(source, origin=wrong)


async def test_each_client_of_httpx_takes_its_own_kind_of_source() -> None:
    shop = made(dpop=False)
    transport = httpx.MockTransport(lambda request: httpx.Response(200))
    blocking = BlockingCredentialSource(BlockingAgent(shop.agent), **shop.wants())
    async with httpx.AsyncClient(transport=transport, auth=for_httpx.LeaseAuth(blocking)) as http:
        with pytest.raises(InvalidCallError, match="takes a CredentialSource"):
            await http.get("https://shop.example")
    with (
        httpx.Client(transport=transport, auth=for_httpx.LeaseAuth(shop.source())) as client,
        pytest.raises(InvalidCallError, match="takes a BlockingCredentialSource"),
    ):
        client.get("https://shop.example")


# --- requests ---


def with_requests(shop: Shop, use: Any, **options: Any) -> Any:
    """What `use` returns of a session, in a thread that may wait."""

    def work() -> Any:
        with (
            BlockingAgent(shop.agent) as agent,
            BlockingCredentialSource(agent, **shop.wants()) as source,
            requests.Session() as session,
        ):
            session.trust_env = False
            session.auth = for_requests.LeaseAuth(source, **options)
            return use(session)

    return asyncio.to_thread(work)


async def test_requests_presents_what_is_leased(shop: Shop) -> None:
    def use(session: requests.Session) -> list[Any]:
        found = [session.get(f"{shop.url}/orders/{number}") for number in range(2)]
        found.append(session.post(f"{shop.url}/orders/1", data=b"new"))
        found.append(session.post(f"{shop.url}/orders/1", data=io.BytesIO(b"a file")))
        found.append(session.get(f"{shop.url}/invoices/1"))
        assert found[0].text == "an order"
        return [answer.status_code for answer in found]

    assert await with_requests(shop, use, origin=shop.url) == [200, 200, 200, 200, 403]
    assert shop.seen == [("GET", b""), ("GET", b""), ("POST", b"new"), ("POST", b"a file")]
    assert shop.statuses() == ["released"]


async def test_a_body_of_requests_that_is_read_once_is_sent_once(shop: Shop) -> None:
    def use(session: requests.Session) -> int:
        return session.post(f"{shop.url}/orders/1", data=iter([b"a ", b"stream"])).status_code

    status = await with_requests(shop, use)
    # Where the server demands a nonce, its answer is what the caller gets.
    assert status == (200 if shop.seen else 401)
    assert shop.seen in ([("POST", b"a stream")], [])


async def test_requests_sends_nothing_elsewhere(shop: Shop) -> None:
    def use(session: requests.Session) -> None:
        with pytest.raises(CredentialUseError):
            session.get(f"{shop.url}/orders/1")

    await with_requests(shop, use, origin="https://shop.example")
    assert shop.seen == []
    assert shop.statuses() == []


async def test_a_redirect_of_requests_is_not_answered_twice(shop: Shop) -> None:
    def use(session: requests.Session) -> tuple[int, int]:
        answer = session.get(f"{shop.url}/orders/moved")
        return answer.status_code, len(shop.seen)

    # A proof is for one URL: a token that is bound to a key is refused where a redirect leads.
    assert await with_requests(shop, use) in ((200, 2), (401, 1))


async def test_threads_share_a_source(shop: Shop) -> None:
    def use(session: requests.Session) -> list[int]:
        session.mount("http://", HTTPAdapter(pool_maxsize=8))
        statuses: list[int] = []

        def work() -> None:
            statuses.append(session.get(f"{shop.url}/orders/1").status_code)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return statuses

    assert await with_requests(shop, use) == [200] * 8
    assert shop.statuses() == ["released"]


# --- the agent that blocks ---


@pytest.fixture
def blocking() -> Iterator[tuple[Shop, BlockingAgent]]:
    shop = made(dpop=False)
    with BlockingAgent(shop.agent) as agent:
        yield shop, agent


def test_an_agent_that_blocks_requests_and_releases(blocking: tuple[Shop, BlockingAgent]) -> None:
    shop, agent = blocking
    credential = agent.request(**shop.wants())
    assert credential.value
    agent.release(credential, timeout_s=5.0)
    assert shop.statuses() == ["released"]
    with pytest.raises(RequestDeniedError):
        agent.request(**shop.wants(verbs=["destroy"]))
    agent.start()  # once more is the same
    agent.close()
    agent.close()
    with pytest.raises(InvalidCallError, match="not connected"):
        agent.request(**shop.wants())


def test_an_agent_that_blocks_does_not_wait_for_itself(blocking: tuple[Shop, BlockingAgent]) -> None:
    shop, agent = blocking

    async def inside() -> None:
        agent.request(**shop.wants())

    with pytest.raises(InvalidCallError, match="own thread"):
        agent.run(inside())


def test_an_agent_that_cannot_connect_leaves_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    shop = made(dpop=False)

    async def fail() -> None:
        raise InvalidCallError("cannot")

    monkeypatch.setattr(shop.agent, "start", fail)
    with pytest.raises(InvalidCallError, match="cannot"):
        BlockingAgent(shop.agent).start()
    assert not [one for one in threading.enumerate() if one.name == "ringfence-agent"]


# --- without what they need ---


@pytest.mark.parametrize("package", ["requests", "sqlalchemy", "asyncpg"])
def test_without_its_extra_an_adapter_says_what_to_install(package: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; import ringfence.integrations.{package}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert f"pip install 'ringfence[{package}]'" in done.stderr.strip().splitlines()[-1]


def test_httpx_needs_no_extra() -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('requests', 'sqlalchemy', 'asyncpg', 'starlette')));"
        "import ringfence.integrations.httpx"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
