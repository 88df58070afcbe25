"""An API token is for one service and counts once: at every service of a running stack, over HTTP."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from ringfence.client.reports.read_api import ReadApi
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.api import api_audience
from ringfence.messages.base import ServiceRole
from ringfence.model.identity.api_tokens import api_token
from tests.support.http_client import plain_client
from tests.support.stack import WITHIN_S, RunningStack

PATHS: dict[ServiceRole, str] = {
    "registry": "/v1/users",
    "policy": "/v1/approvals",
    "revoker": "/v1/leases",
    "audit": "/v1/events",
    "gateway": "/v1/leases/00000000-0000-4000-8000-000000000000",
}
"""What users ask of each service."""
EXAMPLE = Path(__file__).parents[3] / "docs/examples/api_token.py"
INTROSPECTION = "/oauth2/introspect"
EVALUATION = "/access/v1/evaluation"


def signed(key: SigningKey, service: ServiceRole) -> dict[str, str]:
    token = api_token(key, service, now_ms=int(time.time() * 1000))
    return {"Authorization": f"Bearer {token}"}


def client(realm: RunningStack, service: ServiceRole) -> httpx.AsyncClient:
    return plain_client(base_url=realm.stack.url(service), timeout=WITHIN_S, trust_env=False)


async def known(realm: RunningStack, key: SigningKey, service: ServiceRole) -> None:
    """Once a service has heard of this realm's people."""
    async with asyncio.timeout(WITHIN_S), client(realm, service) as http:
        while (await http.get(PATHS[service], headers=signed(key, service))).status_code == 401:
            await asyncio.sleep(0.05)


@pytest.mark.parametrize("service", PATHS)
async def test_a_users_token_is_for_one_service_and_counts_once(
    realm: RunningStack, service: ServiceRole
) -> None:
    key, path = realm.key("user", realm.name("sam")), PATHS[service]
    await known(realm, key, service)
    async with client(realm, service) as http:
        others: list[ServiceRole] = [
            *(role for role in PATHS if role != service),
            "issuer",
            "scim",
            "signals",
        ]
        for other in others:
            answer = await http.get(path, headers=signed(key, other))
            assert answer.status_code == 401, other
            right = api_audience(realm.settings.trust_domain, service)
            assert f"is not this service; sign one for '{right}'" in answer.json()["message"]
        own = signed(key, service)
        assert (await http.get(path, headers=own)).status_code in (200, 404)
        again = await http.get(path, headers=own)
        assert again.status_code == 401
        assert again.json()["error"] == "unauthenticated"
        assert "it was used before, and counts once" in again.json()["message"]
        assert (await http.get(path, headers=signed(key, service))).status_code in (200, 404)


async def test_of_two_calls_at_once_with_one_token_one_is_answered(realm: RunningStack) -> None:
    key = realm.key("user", realm.name("sam"))
    await known(realm, key, "policy")
    async with client(realm, "policy") as http:
        for _ in range(10):
            one = signed(key, "policy")
            answers = await asyncio.gather(*(http.get("/v1/approvals", headers=one) for _ in range(8)))
            assert sorted(answer.status_code for answer in answers) == [200] + 7 * [401]


async def test_a_resource_servers_token_is_for_one_service_and_counts_once(realm: RunningStack) -> None:
    key = realm.key("target", realm.target)
    async with (
        client(realm, "issuer") as issuer,
        client(realm, "policy") as policy,
        asyncio.timeout(WITHIN_S),
    ):

        async def introspect(headers: dict[str, str]) -> httpx.Response:
            return await issuer.post(INTROSPECTION, data={"token": "none"}, headers=headers)

        async def evaluate(headers: dict[str, str]) -> httpx.Response:
            return await policy.post(EVALUATION, json={}, headers=headers)

        while (await introspect(signed(key, "issuer"))).status_code == 401:
            await asyncio.sleep(0.05)
        while (await evaluate(signed(key, "policy"))).status_code == 401:
            await asyncio.sleep(0.05)
        assert (await introspect(signed(key, "policy"))).status_code == 401
        wrong = await evaluate(signed(key, "issuer"))
        assert (wrong.status_code, "is not this service" in wrong.text) == (401, True)
        own = signed(key, "issuer")
        assert [(await introspect(own)).status_code for _ in range(2)] == [200, 401]
        own = signed(key, "policy")
        assert [(await evaluate(own)).status_code for _ in range(2)] == [400, 401]


async def test_the_documented_way_to_sign_one_by_hand_works(realm: RunningStack, tmp_path: Path) -> None:
    key = realm.key("user", realm.name("sam"))
    key.save(tmp_path / "sam.json")
    await known(realm, key, "registry")
    made = subprocess.run(
        [sys.executable, EXAMPLE, tmp_path / "sam.json", "registry"],
        capture_output=True,
        text=True,
        check=True,
    )
    async with client(realm, "registry") as http:
        headers = {"Authorization": f"Bearer {made.stdout.strip()}"}
        assert [(await http.get("/v1/targets", headers=headers)).status_code for _ in range(2)] == [200, 401]


async def test_the_command_line_signs_one_for_each_call(realm: RunningStack) -> None:
    """One client calls one service many times, page by page, and each of its calls is answered."""
    key = realm.key("user", realm.name("sam"))
    await known(realm, key, "policy")
    await known(realm, key, "audit")
    async with ReadApi(key, realm.settings) as api:
        page = await api.inventory()
        for _ in range(3):
            await api.inventory_changes(page["cursor"])
            await api.events(limit=1)
