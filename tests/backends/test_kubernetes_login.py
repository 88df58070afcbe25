"""Workload federation with Kubernetes: a real API server, with the configuration of docs/targets/federation.md."""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest
import uvicorn
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from ringfence.dev.processes import free_port
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.registry import BackendSettings, VerbFloor
from tests.brokers import RedisServer
from tests.conftest import Kafka, needed
from tests.support.benches.issuer_bench import IssuerBench, another, opened_desks
from tests.support.servers.kubernetes import ApiServer, running_api_server
from tests.support.world import WITHIN_S, Party, World, scope

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "targets" / "federation.md"
AUDIENCE = "https://prod.k8s.example"
CLUSTER = "prod-cluster"


@dataclass
class Cluster:
    """An API server that trusts the issuer."""

    server: ApiServer
    desk: IssuerBench

    async def token(self, verb: str = "assume", audience: str = AUDIENCE) -> str:
        backend = BackendSettings(kind="jwt", audience=audience)
        world = self.desk.world
        await world.target(
            CLUSTER, (VerbFloor(verb="assume"), VerbFloor(verb="look")), backend=backend, keys=()
        )
        assert await world.runtimes["issuer"].tables_caught_up(30)
        _, content = await self.desk.issued(scope=scope(CLUSTER, (verb,), ("role",)))
        assert content.credential is not None
        return content.credential.value

    async def user(self, token: str) -> dict[str, Any]:
        """Who the API server takes the bearer for."""
        answer = await self._review(token)
        assert answer.status_code == 201, self.log()
        user: dict[str, Any] = answer.json()["status"]["userInfo"]
        return user

    async def refusal(self, token: str) -> str:
        """Why the API server takes the bearer for nobody, which it says in its log alone."""
        before = len(self.log())
        answer = await self._review(token)
        assert answer.status_code == 401, answer.text
        async with asyncio.timeout(WITHIN_S):
            while "Unable to authenticate" not in (said := self.log()[before:]):
                await asyncio.sleep(0.05)
        return said

    async def ready(self) -> None:
        """Once the server has the issuer's keys, which it fetches in the background."""
        token = await self.token()
        async with asyncio.timeout(WITHIN_S):
            while (await self._review(token)).status_code != 201:
                await asyncio.sleep(0.1)

    def log(self) -> str:
        return self.server.log.read_text()

    async def _review(self, token: str) -> httpx.Response:
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}
        path = "/apis/authentication.k8s.io/v1/selfsubjectreviews"
        return await asyncio.to_thread(self.server.call, "POST", path, review, token=token)


def certificate(folder: Path) -> tuple[Path, Path]:
    """A certificate for this machine, its own authority, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "issuer")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(minutes=5))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate_file, key_file = folder / "issuer.crt", folder / "issuer.key"
    certificate_file.write_bytes(made.public_bytes(serialization.Encoding.PEM))
    key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )
    return certificate_file, key_file


@asynccontextmanager
async def with_tls(port: int, certificate_file: Path, key_file: Path, behind: str) -> AsyncIterator[None]:
    """What stands before an issuer: HTTPS, and nothing but its documents."""

    async def forward(request: Request) -> Response:
        async with httpx.AsyncClient(timeout=WITHIN_S) as http:
            answer = await http.get(f"{behind}{request.url.path}")
        return Response(answer.content, answer.status_code, {"content-type": answer.headers["content-type"]})

    server = uvicorn.Server(
        uvicorn.Config(
            Starlette(routes=[Route("/.well-known/{name}", forward)]), host="127.0.0.1", port=port,
            ssl_certfile=str(certificate_file), ssl_keyfile=str(key_file), lifespan="off", log_level="warning",
        )
    )  # fmt: skip
    serving = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(WITHIN_S):
            while not server.started:
                await asyncio.sleep(0.01)
        yield
    finally:
        server.should_exit = True
        await serving


@pytest.fixture(scope="module")
async def cluster(
    request: pytest.FixtureRequest,
    kafka: Kafka,
    redis_server: RedisServer,
    tmp_path_factory: pytest.TempPathFactory,
) -> AsyncIterator[Cluster]:
    folder = tmp_path_factory.mktemp("cluster")
    authority, key_file = certificate(folder)
    port = free_port()
    issuer = f"https://127.0.0.1:{port}"
    (documented,) = re.findall(r"^```yaml\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    configuration = folder / "authentication.yaml"
    configuration.write_text(documented.replace("https://issuer.example", issuer))
    everything = scope(CLUSTER, ("assume", "look"), ("**",))
    async with (
        World.open(kafka.bootstrap, redis_server.url, paced=kafka.embedded) as world,
        opened_desks(world) as office,
        world.running("issuer", issuer_url=issuer),
        with_tls(port, authority, key_file, f"http://127.0.0.1:{world.ports['issuer']}"),
    ):
        office.maria = await world.user("mara", entitlements=everything)
        desk = await another(office, ceiling=everything, task_scope=everything)
        flags = ("--authentication-config", str(configuration))
        trusted = {"SSL_CERT_FILE": str(authority)}
        with needed(request), running_api_server(folder, *flags, environment=trusted) as server:
            made = Cluster(server, desk)
            await made.ready()
            yield made


async def test_an_agent_is_a_user_of_the_cluster(cluster: Cluster) -> None:
    token = await cluster.token()
    lease = jwt.decode(token, options={"verify_signature": False})["jti"]
    user = await cluster.user(token)
    assert user["username"] == f"ringfence:{cluster.desk.bot.id}"
    assert user["groups"] == ["ringfence:agents", "system:authenticated"]
    assert user["extra"]["ringfence.example/lease"] == [lease]
    assert user["extra"]["ringfence.example/on-behalf-of"] == [cluster.desk.maria.id]


async def test_token_beyond_its_scope_cannot_impersonate(cluster: Cluster) -> None:
    assert "does not allow to assume" in await cluster.refusal(await cluster.token("look"))


async def test_token_with_wrong_audience_or_signature_is_rejected_by_kubernetes(cluster: Cluster) -> None:
    assert "audience" in await cluster.refusal(await cluster.token(audience="https://other.k8s.example"))
    head, body, tail = (await cluster.token()).split(".")
    assert "signature" in await cluster.refusal(f"{head}.{body}.{tail[:-4]}AAAA")
    stranger: Party = cluster.desk.world.party("agent", "stranger")
    own = SigningKey.generate(stranger.id)
    forged = f"{head}.{body}"
    assert "signature" in await cluster.refusal(
        f"{forged}.{jwt.utils.base64url_encode(own.sign(forged.encode())).decode()}"
    )
