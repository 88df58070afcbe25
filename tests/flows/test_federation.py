"""Workload federation: what clouds and clusters publish about whom they let in, held against what the issuer makes.

The targets are made by the very commands of docs/targets/federation.md.
"""

from __future__ import annotations

import asyncio
import os
import re
import shlex
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import jwt
import pytest

from ringfence.cli.main import main
from ringfence.client.agent.agent import Agent
from ringfence.client.approvals.sponsor import Sponsor
from ringfence.issuer.settings import IssuerSettings
from ringfence.messages.base import Permission, ServiceRole
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.support.benches.sdk_clients import client, first
from tests.support.token_keys import rsa_key_file
from tests.support.world import WITHIN_S, Party, World

PAGE = Path(__file__).parents[2] / "docs" / "targets" / "federation.md"
ISSUER = "https://issuer.example"
RSA = {"RS256", "RS384", "RS512"}
EC = {"ES256", "ES384", "ES512"}
REQUIRED = {
    "issuer", "jwks_uri", "response_types_supported", "subject_types_supported",
    "id_token_signing_alg_values_supported",
}  # fmt: skip
"""OpenID Connect Discovery 1.0, section 3, but for the endpoints of logins that nobody makes here."""


@dataclass(frozen=True)
class Platform:
    """What one says about the tokens that it takes."""

    target: str
    algorithms: set[str]
    document: set[str] = field(default_factory=lambda: REQUIRED)
    audience_chars: int = 1000
    subject_bytes: int = 1000
    life_s: int = 24 * 3600
    token_chars: int = 100_000


PLATFORMS = (
    # CreateOpenIDConnectProvider, AssumeRoleWithWebIdentity, and "Prerequisites" of the IAM user guide
    Platform("aws-deploy", RSA | EC, REQUIRED | {"claims_supported"}, audience_chars=255, token_chars=20_000),
    # google.identity.sts.v1 ExchangeTokenRequest.subject_token, WorkloadIdentityPoolProvider.Oidc
    Platform("gcp-deploy", {"RS256", "ES256"}, audience_chars=256, subject_bytes=127),
    # "Important considerations and restrictions for federated identity credentials"
    Platform("azure-deploy", {"RS256"}, audience_chars=600, subject_bytes=600),
    # AllValidSigningAlgorithms of the API server's authenticator
    Platform("prod-cluster", RSA | EC | {"PS256", "PS384", "PS512"}),
    # jwt_supported_algs of a role of type jwt: all that there are, where not told otherwise
    Platform("vault", RSA | EC | {"PS256", "PS384", "PS512", "EdDSA"}),
)


def documented(program: str) -> list[list[str]]:
    """The commands of the page that call a program."""
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[2:] for line in lines if line.startswith(f"$ {program} ")]


@dataclass
class Federation:
    """An issuer with keys of both algorithms, the targets of the page, and an agent that may assume all of them."""

    world: World
    sam: Party
    maria: Party
    bot: Party

    async def get(self, path: str) -> httpx.Response:
        """What the platforms fetch, as they find it behind the issuer's name."""
        return await self.world.get("issuer", path)

    async def token(self, target: str) -> str:
        """Asked for by the agent, approved by its sponsor."""
        scope = [Permission(target=target, verbs=("assume",), resources=("role",))]
        task = await self.world.task(self.bot, by=self.maria, scope=tuple(scope))
        settings = client(self.world)
        async with (
            Agent.connect(self.bot.key, settings) as agent,
            Sponsor.connect(self.sam.key, settings) as sam,
        ):
            asked = asyncio.create_task(
                agent.request_scope(task=task, scope=scope, reason="a test", timeout_s=WITHIN_S)
            )
            await sam.approve(await first(sam))
            return (await asked).value


@pytest.fixture(scope="module")
async def federation(
    kafka: Kafka, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Federation]:
    folder = tmp_path_factory.mktemp("federation")
    own: dict[ServiceRole, Any] = {"issuer": IssuerSettings(rs256_token_key_file=rsa_key_file(folder))}
    everything = tuple(
        Permission(target=platform.target, verbs=("assume",), resources=("**",)) for platform in PLATFORMS
    )
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        world.running("registry", "policy", "issuer", "revoker", own=own, issuer_url=ISSUER),
    ):
        world.operator.key.save(folder / "olga.json")
        with pytest.MonkeyPatch.context() as environment:
            for name in [name for name in os.environ if name.startswith("RINGFENCE_")]:
                environment.delenv(name)
            shared = world.settings("registry")
            for name in ("kafka", "topic_prefix", "trust_domain", "trust_root", "embedded_broker"):
                environment.setenv(f"RINGFENCE_{name.upper()}", str(getattr(shared, name)))
            for command in documented("ringfence"):
                argv = ["--identity", str(folder / "olga.json"), *command]
                assert await asyncio.to_thread(main, argv) == 0, command
        sam = await world.user("sam", ("sponsor",), everything)
        maria = await world.user("maria", (), everything)
        yield Federation(world, sam, maria, await world.agent("deploy-bot", sam, everything))


def test_the_page_has_a_target_for_each_platform() -> None:
    assert [command[:3] for command in documented("ringfence")] == [
        ["target", "add", platform.target] for platform in PLATFORMS
    ]


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda platform: platform.target)
async def test_a_token_is_what_the_platform_takes(federation: Federation, platform: Platform) -> None:
    token = await federation.token(platform.target)
    document = (await federation.get("/.well-known/openid-configuration")).json()
    jwks = (await federation.get(urlsplit(document["jwks_uri"]).path)).json()
    header = jwt.get_unverified_header(token)
    assert header["alg"] in platform.algorithms
    assert header["alg"] in document["id_token_signing_alg_values_supported"]
    (target,) = [command for command in documented("ringfence") if command[2] == platform.target]
    audience = target[target.index("--audience") + 1]
    claims = jwt.decode(
        token, jwt.PyJWKSet.from_dict(jwks)[header["kid"]], algorithms=[header["alg"]], audience=audience,
        issuer=ISSUER,
    )  # fmt: skip
    assert claims["aud"] == audience, "one, as text: some read a list as several clients"
    assert len(audience) <= platform.audience_chars
    assert "azp" not in claims, "AWS would take it for the audience"
    assert claims["sub"] == federation.bot.id
    assert len(claims["sub"].encode()) <= platform.subject_bytes
    assert all(type(claims[name]) is int for name in ("iat", "nbf", "exp"))
    assert claims["iat"] < claims["exp"] <= claims["iat"] + min(300, platform.life_s)
    assert claims.keys() <= set(document["claims_supported"])
    assert len(token) <= platform.token_chars


@pytest.mark.parametrize("platform", PLATFORMS, ids=lambda platform: platform.target)
async def test_the_discovery_document_is_what_the_platform_looks_for(
    federation: Federation, platform: Platform
) -> None:
    response = await federation.get("/.well-known/openid-configuration")
    document = response.json()
    assert response.headers["content-type"] == "application/json"
    assert platform.document <= document.keys()
    assert document["issuer"] == ISSUER
    parts = urlsplit(document["issuer"])
    assert (parts.scheme, parts.port, parts.query, parts.fragment) == ("https", None, "", "")
    assert document["jwks_uri"].startswith(f"{ISSUER}/")


async def test_no_document_has_an_empty_list(federation: Federation) -> None:
    """RFC 8414, 3.2, and OpenID Connect Discovery 1.0, 4.2: claims with zero elements are omitted."""
    for name in ("openid-configuration", "oauth-authorization-server"):
        document = (await federation.get(f"/.well-known/{name}")).json()
        assert {"issuer", "response_types_supported"} <= document.keys()
        assert [] not in document.values()


async def test_the_keys_are_published_as_everybody_reads_them(federation: Federation) -> None:
    response = await federation.get("/.well-known/jwks.json")
    assert response.headers["content-type"] == "application/json"
    keys = response.json()["keys"]
    assert {(key["kty"], key["alg"], key["use"]) for key in keys} == {
        ("EC", "ES256", "sig"),
        ("RSA", "RS256", "sig"),
    }
    for key in keys:
        members = {"EC": {"crv", "x", "y"}, "RSA": {"n", "e"}}[key["kty"]]
        assert key.keys() == {"kty", "kid", "alg", "use"} | members
    assert len({key["kid"] for key in keys}) == len(keys)
