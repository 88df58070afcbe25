"""SCIM and shared signals answer as their OpenAPI documents say: every answer of the documents is provoked.

A document may name an answer that its service never gives, and a service may give one that no document names. Both are
found here. `test_console_answers.py` does the same for the console, and `tests/integration/stack/test_http_apis.py` for
the services of the running stack.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.service.bearer_tokens import MAX_WRONG, WRONG_WINDOW_MS
from ringfence.messages.registry import UserDisable
from ringfence.scim import http as scim_http
from ringfence.signals import http as signals_http
from tests.conftest import Kafka
from tests.flows.test_signals import ended
from tests.support.benches.issuer_bench import IssuerBench, another
from tests.support.benches.scim_directory import (
    GROUP_SCHEMA,
    PATCH,
    USER_SCHEMA,
    Company,
    opened_company,
)
from tests.support.benches.signal_receivers import POLL, PUSH, Office
from tests.support.http_client import plain_client
from tests.support.openapi import Document, path_of
from tests.support.world import WITHIN_S, World

GROUP, USER = "Group", "User"


class SteppedClock(SystemClock):
    """The clock of this machine, so many milliseconds ahead: the limit of wrong tokens counts within a minute."""

    ahead_ms = 0

    def now_ms(self) -> int:
        return super().now_ms() + self.ahead_ms


class Caller:
    """Calls operations of one document, and compares every answer with it."""

    def __init__(self, name: str, base_url: str, token: str) -> None:
        self.document = Document(name)
        self.http = plain_client(base_url=base_url, timeout=60, trust_env=False)
        self.document.watch(self.http)
        self._token = token

    async def call(
        self,
        operation: str,
        status: int,
        body: Any = None,
        *,
        token: str | None = "",
        code: str = "",
        **values: str,
    ) -> Any:
        """The body of an answer, which must have this status, and this code where one is given.

        `body`: JSON, or bytes as they are. `token`: another than the caller's own; None for no credential at all.
        `values`: of the variables in the path; what is none of them goes into the query.
        """
        path = path_of(operation, values)
        query = {name: value for name, value in values.items() if f"{{{name}}}" not in operation}
        content = {"content": body} if isinstance(body, bytes) else {"json": body} if body is not None else {}
        method = operation.partition(" ")[0]
        headers = self.authorization(token)
        answer = await self.http.request(method, path, headers=headers, params=query, **content)
        assert answer.status_code == status, (operation, answer.text)
        found = answer.json() if answer.content else None
        assert code in ("", *(found.values() if isinstance(found, dict) else ())), (operation, answer.text)
        return found

    def authorization(self, token: str | None = "") -> dict[str, str]:
        """The header field of a call. `token` as in `call`."""
        sent = self._token if token == "" else token
        return {"Authorization": f"Bearer {sent}"} if sent is not None else {}

    async def wrong_tokens(self, clock: SteppedClock, values: dict[str, str]) -> None:
        """Call every operation without a credential, with a wrong one, and more often than anybody may."""
        guarded = [name for name, one in self.document.operations().items() if one["security"]]
        calls = [(operation, token) for operation in guarded for token in (None, "wrong")]
        for number, (operation, token) in enumerate(calls):
            if number % MAX_WRONG == 0:
                clock.ahead_ms += WRONG_WINDOW_MS + 1
            await self.call(operation, 401, token=token, **_of_path(operation, values))
        clock.ahead_ms += WRONG_WINDOW_MS + 1
        for _ in range(MAX_WRONG):
            await self.call(guarded[0], 401, token="wrong", **_of_path(guarded[0], values))
        for operation in guarded:
            await self.call(operation, 429, token="wrong", **_of_path(operation, values))

    async def wrong_methods(self, values: dict[str, str]) -> None:
        """Call every path by a method that it does not have: 405, and `Allow` names those that it has."""
        for path, methods in self.document.content["paths"].items():
            if path.startswith("/metrics"):
                continue
            for method in {"GET", "POST", "PUT", "PATCH", "DELETE"} - {one.upper() for one in methods}:
                found = path_of(f"{method} {path}", values)
                answer = await self.http.request(method, found, headers=self.authorization())
                assert answer.status_code == 405, (method, path, answer.text)
                allowed = {one.strip() for one in answer.headers["allow"].split(",")} - {"HEAD"}
                assert allowed == {one.upper() for one in methods}

    def unseen(self) -> set[str]:
        """The answers of the document that no call got."""
        return {f"{operation} {status}" for operation, status in self.document.answers() - self.document.seen}


def _of_path(operation: str, values: dict[str, str]) -> dict[str, str]:
    return {name: value for name, value in values.items() if f"{{{name}}}" in operation}


# --- SCIM -------------------------------------------------------------------------------------------------------------


@pytest.fixture
async def clock() -> SteppedClock:
    return SteppedClock()


@pytest.fixture
async def directory(kafka: Kafka, clock: SteppedClock) -> AsyncIterator[Company]:
    async with (
        World.open(kafka.bootstrap, paced=kafka.embedded) as world,
        opened_company(world, clock=clock) as company,
    ):
        yield company


def user(name: str, **more: Any) -> dict[str, Any]:
    return {"schemas": [USER_SCHEMA], "userName": f"{name}@acme.example", **more}


def group(name: str, *members: str) -> dict[str, Any]:
    return {"schemas": [GROUP_SCHEMA], "displayName": name, "members": [{"value": one} for one in members]}


def patch(op: str, path: str, value: Any) -> dict[str, Any]:
    return {"schemas": [PATCH], "Operations": [{"op": op, "path": path, "value": value}]}


SEARCH = {"schemas": ["urn:ietf:params:scim:api:messages:2.0:SearchRequest"]}
RACES = "only where an operator changes something between the check and the command"
TOO_LARGE = b" " * (scim_http.MAX_BODY_BYTES + 1)


async def test_scim_answers_as_described(directory: Company, clock: SteppedClock) -> None:
    caller = Caller("scim", f"http://127.0.0.1:{directory.world.ports['scim']}", directory.token)
    call = caller.call
    async with caller.http:
        await call("GET /scim/v2/ServiceProviderConfig", 200)
        for kind, id in (("ResourceTypes", "User"), ("Schemas", USER_SCHEMA)):
            await call(f"GET /scim/v2/{kind}", 200)
            await call(f"GET /scim/v2/{kind}", 403, filter='id eq "x"')
            await call(f"GET /scim/v2/{kind}/{{id}}", 200, id=id)
            await call(f"GET /scim/v2/{kind}/{{id}}", 404, id="none")
        made = await call("POST /scim/v2/Users", 201, user("maria"))
        other = await call("POST /scim/v2/Users", 201, user("anna"))
        team = await call("POST /scim/v2/Groups", 201, group("Developers", made["id"]))
        await call("POST /scim/v2/Groups", 403, group("Admins"))
        await call("POST /scim/v2/.search", 200, SEARCH)
        await call("POST /scim/v2/.search", 400, b"{", code="invalidSyntax")
        await call("POST /scim/v2/.search", 400, {**SEARCH, "filter": "userName eq"}, code="invalidFilter")
        await call("POST /scim/v2/.search", 413, TOO_LARGE)
        for name, one, taken, change in (
            ("Users", made["id"], user("maria"), patch("replace", "displayName", "Maria")),
            ("Groups", team["id"], group("Developers"), patch("remove", "members", None)),
        ):
            await call(f"GET /scim/v2/{name}", 200, count="1", startIndex="1", sortBy="id")
            await call(f"GET /scim/v2/{name}", 400, filter="id eq", code="invalidFilter")
            await call(f"POST /scim/v2/{name}", 400, b"{", code="invalidSyntax")
            await call(f"POST /scim/v2/{name}", 409, taken, code="uniqueness")
            await call(f"POST /scim/v2/{name}", 413, TOO_LARGE)
            await call(f"POST /scim/v2/{name}/.search", 200, SEARCH)
            await call(f"POST /scim/v2/{name}/.search", 400, b"[]", code="invalidSyntax")
            await call(f"POST /scim/v2/{name}/.search", 413, TOO_LARGE)
            path = f"/scim/v2/{name}/{{id}}"
            found = await call(f"GET {path}", 200, id=one)
            await call(f"GET {path}", 404, id="none")
            both = {"attributes": "id", "excludedAttributes": "id"}
            await call(f"GET {path}", 400, id=one, **both)
            await call(f"PUT {path}", 200, found, id=one)
            await call(f"PUT {path}", 400, b"{", id=one, code="invalidSyntax")
            await call(f"PUT {path}", 404, taken, id="none")
            await call(f"PUT {path}", 413, TOO_LARGE, id=one)
            await call(f"PATCH {path}", 200, change, id=one)
            await call(
                f"PATCH {path}", 400, patch("replace", "emails[type eq", "x"), id=one, code="invalidPath"
            )
            await call(f"PATCH {path}", 404, change, id="none")
            await call(f"PATCH {path}", 413, TOO_LARGE, id=one)
            await call(f"DELETE {path}", 404, id="none")
        rename = patch("replace", "userName", "anna@acme.example")
        await call("PATCH /scim/v2/Users/{id}", 409, rename, id=made["id"], code="uniqueness")
        await call("PUT /scim/v2/Users/{id}", 409, user("anna"), id=made["id"], code="uniqueness")
        await call("PUT /scim/v2/Groups/{id}", 400, group("Leads"), id=team["id"], code="mutability")
        await call("DELETE /scim/v2/Users/{id}", 204, id=made["id"])
        await call("DELETE /scim/v2/Groups/{id}", 204, id=team["id"])
        leads = await call("POST /scim/v2/Groups", 201, group("Leads"))
        await _refused_by_operators(caller, directory, other["id"], leads["id"])
        await caller.wrong_methods({"id": other["id"]})
        await caller.wrong_tokens(clock, {"id": "none"})
        answer = await caller.http.get("/scim/v2/Nothing", headers=directory.http.headers)
        assert (answer.status_code, answer.headers["content-type"]) == (404, "application/scim+json")
    races = {
        "POST /scim/v2/Users 403",
        *(f"DELETE /scim/v2/{kind}/{{id}} 403" for kind in ("Users", "Groups")),
    }
    assert caller.unseen() == races, RACES


async def _refused_by_operators(caller: Caller, directory: Company, disabled: str, team: str) -> None:
    """An operator disabled a user, whom the directory would let act again; then also the provisioner."""
    of_user, of_group = "/scim/v2/Users/{id}", "/scim/v2/Groups/{id}"
    await _disable(directory, disabled)
    for operation, body, id in (
        (f"PATCH {of_user}", patch("replace", "active", True), disabled),
        (f"PUT {of_user}", user("anna", active=True), disabled),
        (f"PATCH {of_group}", patch("add", "members", [{"value": disabled}]), team),
        (f"PUT {of_group}", group("Leads", disabled), team),
    ):
        await caller.call(operation, 403, body, id=id)
    await _disable(directory, directory.key.name)
    for operation, body, id in (
        ("POST /scim/v2/Users", user("new"), ""),
        ("POST /scim/v2/Groups", group("Developers"), ""),
        (f"PATCH {of_user}", patch("replace", "displayName", "x"), disabled),
        (f"PUT {of_user}", user("anna"), disabled),
        (f"PATCH {of_group}", patch("remove", "members", None), team),
        (f"PUT {of_group}", group("Leads"), team),
    ):
        await caller.call(operation, 503, body, **({"id": id} if id else {}))
    await caller.call(f"DELETE {of_user}", 503, id=disabled)
    await caller.call(f"DELETE {of_group}", 503, id=team)


async def _disable(directory: Company, user_id: str) -> None:
    world = directory.world
    claims = world.claims(UserDisable, world.operator, user_id=user_id, reason="x")
    await world.accepted(claims, world.operator)
    assert await world.runtimes["scim"].tables_caught_up(30)


# --- shared signals ---------------------------------------------------------------------------------------------------


@pytest.fixture
async def desk(company: IssuerBench) -> IssuerBench:
    return await another(company)


@pytest.fixture
def office(company: IssuerBench, tmp_path: Path) -> Office:
    return Office(company.world, tmp_path)


ANOTHER_REPLICA = {
    f"{method} {path} 503"
    for method, path in (
        ("POST", "/ssf/streams"), ("GET", "/ssf/streams"), ("PATCH", "/ssf/streams"), ("PUT", "/ssf/streams"),
        ("DELETE", "/ssf/streams"), ("GET", "/ssf/status"), ("POST", "/ssf/status"), ("POST", "/ssf/subjects/add"),
        ("POST", "/ssf/subjects/remove"), ("POST", "/ssf/verify"), ("POST", "/ssf/poll/{stream_id}"),
    )
}  # fmt: skip
"""Only while Kafka does not answer, or another replica has the stream: tests/flows/test_signals.py."""


async def test_signals_answer_as_described(desk: IssuerBench, office: Office, clock: SteppedClock) -> None:
    office.declare("acme")
    async with office.running(clock=clock, verification_interval_s=3600):
        caller = Caller("signals", office.url, office.token("acme"))
        office.declare("undeclared")
        office.settings(office.url)  # the tokens count at once, receivers when the service starts again
        call = caller.call
        async with caller.http:
            await call("GET /.well-known/ssf-configuration", 200)
            await call("GET /.well-known/jwks.json", 200)
            assert await call("GET /ssf/streams", 200) == []
            id = (await call("POST /ssf/streams", 201, {"delivery": {"method": POLL}}))["stream_id"]
            await call("POST /ssf/streams", 409, {}, code="invalid_request")
            await call("GET /ssf/streams", 200)
            await call("GET /ssf/streams", 200, stream_id=id)
            await call("GET /ssf/status", 200, stream_id=id)
            await call("PATCH /ssf/streams", 200, {"stream_id": id, "description": "the SIEM"})
            await call("PUT /ssf/streams", 200, {"stream_id": id, "delivery": {"method": POLL}})
            await ended(desk)
            async with asyncio.timeout(WITHIN_S):
                while not (await _poll(caller, id))["sets"]:
                    pass
            subject = {"stream_id": id, "subject": {"format": "opaque", "id": desk.bot.name}}
            await call("POST /ssf/subjects/remove", 204, subject)
            await call("POST /ssf/subjects/add", 200, subject)
            await call("POST /ssf/verify", 204, {"stream_id": id})
            await call("POST /ssf/verify", 429, {"stream_id": id}, code="invalid_request")
            await call("POST /ssf/status", 200, {"stream_id": id, "status": "paused"})
            push = {"stream_id": id, "delivery": {"method": PUSH, "endpoint_url": "https://acme.example"}}
            for operation in ("PATCH /ssf/streams", "PUT /ssf/streams"):
                await call(operation, 400, push, code="invalid_request")
            await _wrong_bodies(caller, id)
            await _nobody_has_it(caller, subject)
            undeclared = office.token("undeclared")
            for operation, one in caller.document.operations().items():
                if one["security"]:
                    await call(
                        operation,
                        403,
                        token=undeclared,
                        code="access_denied",
                        **_of_path(operation, {"stream_id": id}),
                    )
            await call("DELETE /ssf/streams", 204, stream_id=id)
            await caller.wrong_methods({"stream_id": id})
            await caller.wrong_tokens(clock, {"stream_id": id})
        assert caller.unseen() - ANOTHER_REPLICA == set()


async def _poll(caller: Caller, stream_id: str) -> Any:
    """One poll; while no replica has taken up the stream yet, no events."""
    answer = await caller.http.post(
        f"/ssf/poll/{stream_id}", json={"maxEvents": 1}, headers=caller.authorization()
    )
    assert answer.status_code in (200, 503), answer.text
    return answer.json() if answer.status_code == 200 else {"sets": {}}


async def _wrong_bodies(caller: Caller, stream_id: str) -> None:
    """Every operation with a body, with one that is no JSON object, and one that is too large."""
    too_large = b" " * (signals_http.MAX_BODY_BYTES + 1)
    for operation, one in caller.document.operations().items():
        if "requestBody" in one:
            values = _of_path(operation, {"stream_id": stream_id})
            await caller.call(operation, 400, b"[]", code="invalid_request", **values)
            await caller.call(operation, 413, too_large, code="invalid_request", **values)


async def _nobody_has_it(caller: Caller, subject: dict[str, Any]) -> None:
    """Every operation about a stream, for one that is not the receiver's."""
    for operation in (
        "GET /ssf/streams",
        "DELETE /ssf/streams",
        "GET /ssf/status",
        "POST /ssf/poll/{stream_id}",
    ):
        await caller.call(operation, 404, stream_id="none", code="not_found")
    for operation, body in (
        ("PATCH /ssf/streams", {}),
        ("PUT /ssf/streams", {}),
        ("POST /ssf/status", {"status": "paused"}),
        ("POST /ssf/subjects/add", subject),
        ("POST /ssf/subjects/remove", subject),
        ("POST /ssf/verify", {}),
    ):
        await caller.call(operation, 404, {**body, "stream_id": "none"}, code="not_found")
