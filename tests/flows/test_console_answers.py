"""The console answers as its OpenAPI document says: every answer of the document is provoked, without a browser."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest

from ringfence.client.settings import ClientSettings
from ringfence.console.app import ConsoleServer
from ringfence.console.assets import assets
from ringfence.console.http import MAX_FORM_BYTES
from ringfence.console.questions import MAX_ANSWER_BYTES
from ringfence.console.security import COOKIE
from ringfence.console.settings import ConsoleSettings
from ringfence.console.views.pages import PAGES
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.base.ids import lease_id
from ringfence.kernel.crypto.jws import sign
from ringfence.messages.base import ServiceRole
from ringfence.messages.registry import AgentSetCeiling, AgentSuspend, SessionStatement, UserDisable
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.policy_bench import DEPLOY, READ, PolicyBench
from tests.support.http_client import plain_client
from tests.support.openapi import Document, path_of
from tests.support.passkeys import SESSION_ORIGIN, SIGN_ORIGIN, SoftwarePasskey, add_passkey, first_touch
from tests.support.world import WITHIN_S, Party, World

SERVICES: tuple[ServiceRole, ...] = ("registry", "policy", "issuer", "revoker", "audit")
HOST = SESSION_ORIGIN.removeprefix("http://")
BY_ADDRESS = ("/healthz", "/readyz", "/metrics")


@dataclass
class Visitor:
    """Somebody at the console, with a passkey and no browser. Every answer is compared with the document."""

    http: httpx.AsyncClient
    document: Document
    world: World
    who: Party

    async def call(
        self, operation: str, status: int, *, values: dict[str, str] | None = None, cookie: str | None = None,
        origin: str | None = SESSION_ORIGIN, host: str = HOST, **options: Any,
    ) -> httpx.Response:  # fmt: skip
        """One call, whose answer must have this status."""
        headers = {"Host": host} if host else {}
        if origin is not None and (operation.startswith("POST") or "/questions/" in operation):
            headers["Origin"] = origin
        if cookie is not None:
            headers["Cookie"] = f"{COOKIE}={cookie}"
        path = path_of(operation, values or {})
        answer = await self.http.request(operation.partition(" ")[0], path, headers=headers, **options)
        assert answer.status_code == status, (operation, path, answer.text)
        return answer

    async def sign_in(self) -> str:
        """The cookie of a new session."""
        begun = await self.call("POST /sign-in/begin", 200, json={"user_id": self.who.name})
        secret = begun.cookies[COOKIE]
        passkey = self.who.key
        assert isinstance(passkey, SoftwarePasskey)
        claims = SessionStatement.model_validate(begun.json()["claims"])
        statement = sign(claims, passkey.but(origin=SESSION_ORIGIN))
        done = await self.call("POST /sign-in/finish", 200, json={"statement": statement}, cookie=secret)
        return done.cookies[COOKIE]

    async def ask(self, cookie: str, kind: str, **form: str) -> dict[str, str]:
        """The address of a question that a form composes."""
        values = {"kind": kind}
        answer = await self.call("POST /sign/{kind}", 303, values=values, cookie=cookie, data=form)
        found = re.search(r"/questions/([^&#]+)", unquote(answer.headers["location"]))
        assert found is not None
        return {"path": found[1]}


@asynccontextmanager
async def console(world: World, folder: Path) -> AsyncIterator[str]:
    """A console in this process. Yields its address."""
    settings = world.settings("gateway", key_file=folder / "console.json")
    folder.mkdir(exist_ok=True)
    world.key("console").save(folder / "console.json")
    urls: Any = {f"{role}_url": f"http://127.0.0.1:{world.ports[role]}" for role in SERVICES}
    clients = ClientSettings(
        kafka=world.bootstrap, topic_prefix=world.prefix, trust_domain=world.td, trust_root=world.fingerprint,
        **urls,
    )  # fmt: skip
    stop, own = asyncio.Event(), ConsoleSettings(origin=SESSION_ORIGIN, refresh_ms=200)
    running = asyncio.create_task(ConsoleServer(settings, own, clients, SystemClock()).run(stop))
    try:
        yield f"http://{settings.http}"
    finally:
        stop.set()
        await running


async def test_the_console_answers_as_described(
    kafka: Kafka, redis_server: RedisServer, tmp_path: Path
) -> None:
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        AsyncExitStack() as services,
    ):
        await services.enter_async_context(world.running(*SERVICES))
        bench = await PolicyBench.open(world)
        document = Document("console")
        async with console(world, tmp_path) as url, plain_client(base_url=url, timeout=WITHIN_S) as http:
            document.watch(http)
            visitor = Visitor(http, document, world, await add_passkey(world, bench.sam))
            await _probes_and_files(visitor)
            await _wrong_hosts_and_origins(visitor)
            await _sign_in(visitor, bench)
            cookie = await visitor.sign_in()
            values = await _pages(visitor, bench, cookie)
            question = await _questions(visitor, bench, cookie)
            await _live(visitor, bench, cookie)
            await services.aclose()
            await _unanswered(visitor, cookie, values, question)
            async with (
                console(world, tmp_path / "late") as untrusting,
                plain_client(base_url=untrusting, timeout=WITHIN_S) as late,
            ):
                document.watch(late)
                await _without_trust(replace(visitor, http=late))
        assert {f"{operation} {status}" for operation, status in document.answers() - document.seen} == set()


async def _probes_and_files(visitor: Visitor) -> None:
    for operation in ("GET /healthz", "GET /readyz"):
        async with asyncio.timeout(WITHIN_S):
            while (await visitor.http.get(operation.partition(" ")[2])).status_code != 200:
                await asyncio.sleep(0.05)
        await visitor.call(operation, 200, host="")
    await visitor.call("GET /metrics", 200, host="")
    await visitor.call("GET /metrics", 404)
    for asset in assets().values():
        name = {"name": asset.path.removeprefix("/static/")}
        await visitor.call("GET /static/{name}", 200, values=name)
    await visitor.call("GET /static/{name}", 404, values={"name": "none.js"})


async def _wrong_hosts_and_origins(visitor: Visitor) -> None:
    """A name of another site, and a form of another site."""
    values = dict.fromkeys(("name", "kind", "path", "id"), "x")
    for operation in visitor.document.operations():
        if not operation.endswith(BY_ADDRESS):
            await visitor.call(operation, 421, values=values, host="evil.example")
        if operation.startswith("POST") and "/questions/" not in operation:
            for origin in ("https://evil.example", SIGN_ORIGIN, None):
                await visitor.call(operation, 403, values=values, origin=origin)


async def _sign_in(visitor: Visitor, bench: PolicyBench) -> None:
    call, passkey = visitor.call, visitor.who.key
    assert isinstance(passkey, SoftwarePasskey)
    too_large = b" " * (MAX_FORM_BYTES + 1)
    await call("GET /sign-in", 200)
    touched = first_touch(passkey)
    found = await _once_known(visitor, touched)
    assert found.json()["user_id"] == visitor.who.name
    other_key = first_touch(SoftwarePasskey.make(visitor.who.id)) | {
        "credential_id": touched["credential_id"]
    }
    for unknown in (touched | {"credential_id": "a" * 24}, touched | {"nonce": "m" * 43}, other_key):
        await call("POST /sign-in/find", 404, json=unknown)
    for operation, wrong in (
        ("POST /sign-in/find", {"credential_id": touched["credential_id"]}),
        ("POST /sign-in/find", touched | {"nonce": "n" * 42}),
        ("POST /sign-in/begin", {"user_id": "../x"}),
    ):
        await call(operation, 400, json=wrong)
    for operation in ("POST /sign-in/find", "POST /sign-in/begin", "POST /sign-in/finish"):
        assert "JSON" in (await call(operation, 400, content=b"[]")).json()["message"]
        await call(operation, 413, content=too_large)
    await call("POST /sign-in/finish", 403, json={"statement": "x.y.z"})
    nobody = unknown_passkey(visitor)
    with pytest.raises(AssertionError, match="401"):
        await nobody.sign_in()
    cookie = await visitor.sign_in()
    await call("GET /sign-in", 303, cookie=cookie)
    await call("POST /sign-out", 303, cookie=cookie)


def unknown_passkey(visitor: Visitor) -> Visitor:
    """Somebody whose passkey is nobody's."""
    key = SoftwarePasskey.make(visitor.who.id)
    return replace(visitor, who=replace(visitor.who, key=key))


async def _once_known(visitor: Visitor, touched: dict[str, str]) -> httpx.Response:
    """Whose passkey it is, once the registry has heard of it."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            headers = {"Host": HOST, "Origin": SESSION_ORIGIN}
            answer = await visitor.http.post("/sign-in/find", json=touched, headers=headers)
            if answer.status_code == 200:
                return answer
            await asyncio.sleep(0.05)


async def _pages(visitor: Visitor, bench: PolicyBench, cookie: str) -> dict[str, str]:
    """Every page: with a session, without one, and for what is not there. Returns an id for each page."""
    asked = await bench.ask()
    await bench.final(asked)
    waiting = await bench.ask(DEPLOY)
    await bench.decision(waiting, "approval_required")
    offer = await visitor.call("POST /offer", 303, cookie=cookie, data={"id": bench.bot.name})
    await visitor.call("POST /offer", 303, data={"id": bench.bot.name})
    await visitor.call("POST /offer", 404, cookie=cookie, data={"id": "nobody"})
    await visitor.call("POST /offer", 413, cookie=cookie, content=b"x" * (MAX_FORM_BYTES + 1))
    ids = {
        "/approvals/{id}": waiting.id, "/agents/{id}": bench.bot.name, "/leases/{id}": lease_id(asked.id),
        "/tasks/{id}": bench.task, "/trace/{id}": asked.id,
        "/offers/{id}": offer.headers["location"].rpartition("/")[2],
    }  # fmt: skip
    for path in PAGES:
        await _once_there(visitor, f"GET {path}", {"id": ids.get(path, "")}, cookie)
        await visitor.call(f"GET {path}", 303, values={"id": "x"})
        if "{id}" in path:
            await visitor.call(f"GET {path}", 404, values={"id": "x"}, cookie=cookie)
    await visitor.call("GET /", 303)
    await visitor.call("GET /trace", 303, params={"id": asked.id})
    return ids


async def _once_there(visitor: Visitor, operation: str, values: dict[str, str], cookie: str) -> None:
    """The page, once the services have heard of what it shows."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            headers = {"Host": HOST, "Cookie": f"{COOKIE}={cookie}"}
            answer = await visitor.http.get(path_of(operation, values), headers=headers)
            if answer.status_code == 200:
                return
            assert answer.status_code in (404, 503), answer.text
            await asyncio.sleep(0.05)


async def _questions(visitor: Visitor, bench: PolicyBench, cookie: str) -> dict[str, str]:
    """Questions for the sign page, and its answers. Returns the address of one that waits."""
    form = {"id": bench.bot.name, "reason": "to try"}
    sign_it, answer_it = "POST /sign/{kind}", "POST /questions/{path}"
    await visitor.call(sign_it, 303, values={"kind": "suspend"}, data=form)
    await visitor.call(sign_it, 400, values={"kind": "nothing"}, cookie=cookie, data=form)
    await visitor.call(sign_it, 404, values={"kind": "suspend"}, cookie=cookie, data={**form, "id": "nobody"})
    await visitor.call(
        sign_it, 413, values={"kind": "suspend"}, cookie=cookie, content=b"x" * (MAX_FORM_BYTES + 1)
    )
    for operation in ("GET /questions/{path}", answer_it):
        await visitor.call(operation, 404, values={"path": "none"}, origin=SIGN_ORIGIN)
    refused = await visitor.ask(cookie, "suspend", **form)
    signed = await visitor.ask(cookie, "suspend", **form)
    on_sign_page: dict[str, Any] = {"origin": SIGN_ORIGIN}
    await visitor.call("GET /questions/{path}", 404, values=refused, origin=SESSION_ORIGIN)
    await visitor.call(answer_it, 200, values=refused, json={"refused": True}, **on_sign_page)
    for operation in ("GET /questions/{path}", answer_it):
        await visitor.call(operation, 410, values=refused, json={}, **on_sign_page)
    question = (await visitor.call("GET /questions/{path}", 200, values=signed, **on_sign_page)).json()
    await visitor.call(answer_it, 400, values=signed, content=b"[]", **on_sign_page)
    await visitor.call(answer_it, 413, values=signed, content=b" " * (MAX_ANSWER_BYTES + 1), **on_sign_page)
    await visitor.call(answer_it, 422, values=signed, json={"answer": "none"}, **on_sign_page)
    claims = visitor.world.claims(AgentSuspend, visitor.who, **question["message"]["claims"])
    compact = sign(claims, visitor.who.key)
    changed = await visitor.ask(cookie, "narrow", id=bench.bot.name)
    waits = await visitor.ask(cookie, "end-task", id=bench.task, reason="to try")
    await visitor.call(answer_it, 200, values=signed, json={"answer": compact}, **on_sign_page)
    narrow = visitor.world.claims(AgentSetCeiling, bench.sam, agent_id=bench.bot.name, ceiling=READ)
    await visitor.world.accepted(narrow, bench.sam)
    async with asyncio.timeout(WITHIN_S):
        while True:  # once the ceiling is narrow, the terms of the other question are others
            answer = await visitor.http.get(
                path_of("GET /questions/{path}", changed), headers={"Host": HOST, "Origin": SIGN_ORIGIN}
            )
            if answer.status_code == 422:
                return waits
            await asyncio.sleep(0.05)


async def _live(visitor: Visitor, bench: PolicyBench, cookie: str) -> None:
    """Live updates of a page, and reasons why there are none."""
    await visitor.call("GET /live", 204, params={"page": "/agents"})
    await visitor.call("GET /live", 404, params={"page": "/agents/nobody"}, cookie=cookie)
    headers = {"Host": HOST, "Cookie": f"{COOKIE}={cookie}"}
    async with visitor.http.stream("GET", "/live", params={"page": "/agents"}, headers=headers) as stream:
        assert await anext(stream.aiter_lines()) == ": begins"
    world, petra = visitor.world, await add_passkey(visitor.world, bench.petra)
    other = replace(visitor, who=petra)
    assert isinstance(petra.key, SoftwarePasskey)
    await _once_known(other, first_touch(petra.key))
    theirs = await other.sign_in()
    await world.accepted(
        world.claims(UserDisable, world.operator, user_id=petra.name, reason="left"), world.operator
    )
    async with asyncio.timeout(WITHIN_S):
        while True:
            headers = {"Host": HOST, "Cookie": f"{COOKIE}={theirs}"}
            async with visitor.http.stream(
                "GET", "/live", params={"page": "/tasks"}, headers=headers
            ) as stream:
                if stream.status_code == 401:
                    return


async def _unanswered(visitor: Visitor, cookie: str, ids: dict[str, str], question: dict[str, str]) -> None:
    """No service answers any more."""
    for path in PAGES:
        await visitor.call(f"GET {path}", 503, values={"id": ids.get(path, "")}, cookie=cookie)
    form = {"id": "deploy-bot", "reason": "to try"}
    await visitor.call("POST /offer", 503, cookie=cookie, data=form)
    await visitor.call("POST /sign/{kind}", 503, values={"kind": "suspend"}, cookie=cookie, data=form)
    touched = first_touch(SoftwarePasskey.make(visitor.who.id))
    await visitor.call("POST /sign-in/find", 503, json=touched)
    with pytest.raises(AssertionError, match="503"):
        await visitor.sign_in()
    await visitor.call("GET /questions/{path}", 503, values=question, origin=SIGN_ORIGIN)
    await visitor.call(
        "POST /questions/{path}", 503, values=question, origin=SIGN_ORIGIN, json={"answer": "x"}
    )


async def _without_trust(visitor: Visitor) -> None:
    """A console that began while the registry was away."""
    async with asyncio.timeout(WITHIN_S):
        while True:
            try:
                await visitor.call("GET /sign-in", 503)
            except httpx.ConnectError:
                await asyncio.sleep(0.05)
            else:
                return
