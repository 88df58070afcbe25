"""Workload federation with a real OpenBao: an agent logs in with a token of the issuer, and reads one secret."""

from __future__ import annotations

import asyncio
import os
import re
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from ringfence.dev.processes import free_port
from ringfence.issuer.settings import IssuerSettings
from ringfence.messages.registry import BackendSettings, VerbFloor
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.servers.openbao import ROOT_TOKEN, Vault, bao_program
from tests.support.token_keys import rsa_key_file
from tests.support.world import World, scope

PAGE = Path(__file__).parents[2] / "docs" / "targets" / "federation.md"
AUDIENCE = "https://vault.test.example"
ROLE_LIFE_S = 300


@dataclass
class Federation:
    """An issuer that OpenBao trusts, and the desk of an agent that may log in."""

    vault: Vault
    desk: IssuerBench
    issuer: str

    async def call(self, method: str, path: str, body: Any = None, *, token: str = ROOT_TOKEN) -> Any:
        """Beside this thread: OpenBao asks the issuer, which runs in it."""
        return await asyncio.to_thread(self.vault.call, method, path, body, token=token)

    async def token(self, verb: str = "read", **backend: Any) -> str:
        """A token for the target as it is registered then."""
        settings = BackendSettings.model_validate({"kind": "jwt", "audience": AUDIENCE, **backend})
        verbs = (VerbFloor(verb="read"), VerbFloor(verb="assume"))
        await self.desk.world.target(self.desk.target.name, verbs, backend=settings, keys=())
        assert await self.desk.world.runtimes["issuer"].tables_caught_up(30)
        _, content = await self.desk.issued(verb)
        assert content.credential is not None
        return content.credential.value

    async def role(self, name: str, **changed: Any) -> None:
        """As docs/targets/federation.md has it, for this agent."""
        given = {
            "role_type": "jwt",
            "bound_audiences": [AUDIENCE],
            "user_claim": "sub",
            "bound_subject": self.desk.bot.id,
            "claim_mappings": {"jti": "lease", "task": "task", "on_behalf_of": "on_behalf_of"},
            "token_policies": ["one-secret"],
            "token_no_default_policy": True,
            "token_explicit_max_ttl": ROLE_LIFE_S,
        }
        await self.call("POST", f"auth/agents/role/{name}", {**given, **changed})

    async def login(self, role: str, token: str) -> dict[str, Any]:
        """What OpenBao says of who logged in. Raises HTTPStatusError where it refuses."""
        login = await self.call("POST", "auth/agents/login", {"role": role, "jwt": token}, token="")
        auth: dict[str, Any] = login["auth"]
        return auth

    async def refuses(self, role: str, token: str) -> str:
        """Why OpenBao refuses."""
        with pytest.raises(httpx.HTTPStatusError) as refused:
            await self.login(role, token)
        assert refused.value.response.status_code in (400, 403)
        return refused.value.response.text


@pytest.fixture(scope="module")
async def federation(
    kafka: Kafka, redis_server: RedisServer, vault: Vault, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Federation]:
    port = free_port()
    issuer = f"http://127.0.0.1:{port}"
    own = IssuerSettings(rs256_token_key_file=rsa_key_file(tmp_path_factory.mktemp("keys")))
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as office,
        world.running("revoker"),
        world.running("issuer", own={"issuer": own}, http=f"127.0.0.1:{port}", issuer_url=issuer),
    ):
        scope_there = scope(office.target.name, ("read", "assume"), ("**",))
        office.maria = await world.user("mara", entitlements=scope_there)
        there = Federation(vault, await another(office, ceiling=scope_there, task_scope=scope_there), issuer)
        vault.policy("one-secret", "secret/data/agents/one")
        await there.call("POST", "secret/data/agents/one", {"data": {"word": "swordfish"}})
        await there.call("POST", "sys/auth/agents", {"type": "jwt"})
        await there.call("POST", "auth/agents/config", {"oidc_discovery_url": issuer, "bound_issuer": issuer})
        yield there


@pytest.mark.parametrize("alg", ["ES256", "RS256"])
async def test_an_agent_logs_in_and_reads_its_one_secret(federation: Federation, alg: str) -> None:
    await federation.role("bot")
    auth = await federation.login("bot", await federation.token(alg=alg))
    assert auth["token_policies"] == ["one-secret"]
    assert auth["lease_duration"] <= ROLE_LIFE_S
    lease, task = auth["metadata"]["lease"], auth["metadata"]["task"]
    assert (await federation.desk.lease(lease, "active")).task_id == task == federation.desk.task
    assert auth["metadata"]["on_behalf_of"] == federation.desk.maria.id
    own = auth["client_token"]
    secret = await federation.call("GET", "secret/data/agents/one", token=own)
    assert secret["data"]["data"] == {"word": "swordfish"}
    with pytest.raises(httpx.HTTPStatusError):
        await federation.call("GET", "secret/data/agents/two", token=own)


async def test_the_scope_can_be_part_of_a_role(federation: Federation) -> None:
    said = "/authorization_details/0"
    allowed = {f"{said}/verbs/0": "read", f"{said}/resources/0": "env/staging/web"}
    token = await federation.token()
    await federation.role("reader", bound_claims=allowed)
    assert (await federation.login("reader", token))["client_token"]
    await federation.role("writer", bound_claims={**allowed, f"{said}/verbs/0": "write"})
    assert "does not match" in await federation.refuses("writer", token)


async def test_token_with_wrong_audience_or_subject_is_rejected_by_openbao(federation: Federation) -> None:
    token = await federation.token()
    for name, changed, says in (
        ("audience", {"bound_audiences": ["https://other.test.example"]}, "aud"),
        ("subject", {"bound_subject": "spiffe://test.example/agent/other"}, "sub"),
    ):
        await federation.role(name, **changed)
        assert says in await federation.refuses(name, token)
    await federation.role("bot")
    head, body, tail = token.split(".")
    assert "signature" in await federation.refuses("bot", f"{head}.{body}.{tail[:-4]}AAAA")
    other = await federation.token(audience="https://elsewhere.test.example")
    assert "aud" in await federation.refuses("bot", other)


async def test_a_token_that_was_given_back_still_logs_in_until_it_expires(federation: Federation) -> None:
    """Why such a target's tokens are `ttl`, and short: OpenBao asks nobody."""
    await federation.role("bot")
    token = await federation.token()
    lease_id = jwt.decode(token, options={"verify_signature": False})["jti"]
    claims, _ = await federation.desk.revoke(federation.desk.bot, "release", lease_id=lease_id)
    assert (await federation.desk.verdict(claims)).kind == "accepted"
    await federation.desk.lease(lease_id, "released")
    assert (await federation.login("bot", token))["client_token"]


async def test_the_commands_of_the_page_can_be_pasted(federation: Federation) -> None:
    (block,) = re.findall(r"^```console\n(\$ bao .*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    script = re.sub(r"^\$ ", "", block, flags=re.MULTILINE)
    for said, meant in (
        ("https://issuer.example", federation.issuer),
        ("spiffe://acme.example/agent/deploy-bot", federation.desk.bot.id),
        ("https://vault.example", AUDIENCE),
        ("shop-secrets", "one-secret"),
    ):
        assert said in script
        script = script.replace(said, meant)
    environment = {
        "PATH": f"{bao_program().parent}:{os.environ['PATH']}",
        "BAO_ADDR": federation.vault.url,
        "BAO_TOKEN": ROOT_TOKEN,
        "TOKEN": await federation.token("assume"),
    }

    async def run(command: str, **more: str) -> subprocess.CompletedProcess[str]:
        argv = ["bash", "-euo", "pipefail", "-c", command]
        return await asyncio.to_thread(
            subprocess.run,
            argv,
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )

    ended = await run(script)
    assert ended.returncode == 0, ended.stderr
    assert re.search(r'token_policies +\["one-secret"\]', ended.stdout)
    assert re.search(rf"token_meta_task +{federation.desk.task}", ended.stdout)
    login = 'bao write -field=token auth/jwt/login role=deploy-bot jwt="$TOKEN"'
    assert "does not match" in (await run(login, TOKEN=await federation.token("read"))).stderr

    own = (await run(login)).stdout
    read = "bao read secret/data/agents/one"
    assert "swordfish" in (await run(read, BAO_TOKEN=own)).stdout
    assert (await run("bao lease revoke -sync -prefix auth/jwt")).returncode == 0
    assert (await run(read, BAO_TOKEN=own)).returncode != 0
    assert (await run("bao auth disable jwt")).returncode == 0
    assert (await run(login)).returncode != 0
