"""What one credential takes at a real Valkey, PostgreSQL and sshd: made, and taken back with a live session.

One by one, from this process to the server on loopback, with TLS where the server has it. PostgreSQL is asked among so
many live leases on the same table: all grants on one object are in one row. `first` is with a connection to be made.
Of a token there is nothing at a target. Of a static secret nothing is made: what is measured is what the gateway does
for each request, the reading of a file.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import asyncpg
from redis.asyncio import Redis

from bench.machine import percentile
from ringfence.backends import Backend, JwtBackend, StaticSecrets, TargetAccess, TokenKey, TokenKeys
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.base import Permission
from ringfence.messages.lease import Lease
from ringfence.messages.registry import BackendSettings, TargetRecord, TargetState
from tests.support.servers.postgres import PostgresServer, PostgresTarget, server_programs
from tests.support.servers.redis_target import valkey_target
from tests.support.servers.ssh import SshServer, SshTarget, client, lives
from tests.support.token_keys import rsa_key_file
from tools.schemas.examples import EXAMPLES

TARGET = "bench"
ROUNDS = 100
AMONG = (0, 100, 1000)
_SIDE_BY_SIDE = 8


def _lease(kind: str, resource: str) -> Lease:
    scope = (Permission(target=TARGET, verbs=("read",), resources=(resource,)),)
    given: dict[str, Any] = {
        "lease_id": str(uuid.uuid4()),
        "target_id": TARGET,
        "backend": kind,
        "scope": scope,
    }
    deadline = {"deadline": int(time.time()) + 3600}
    return cast(Lease, EXAMPLES[Lease]).model_copy(update=given | deadline)


def _state(kind: str, **settings: str) -> TargetState:
    backend = BackendSettings.model_validate({"kind": kind, **settings})
    example = cast(TargetRecord, EXAMPLES[TargetRecord]).state
    return example.model_copy(update={"target_id": TARGET, "backend": backend})


async def _measure(
    what: str,
    backend: Backend,
    resource: str,
    session: Callable[[str], Any],
    *,
    ended: str = "a session killed",
    **settings: str,
) -> None:
    state = _state(backend.kind, **settings)
    mints, undos = [], []
    for _ in range(ROUNDS):
        lease = _lease(backend.kind, resource)
        began = time.perf_counter()
        credential = await backend.mint(lease, state)
        mints.append((time.perf_counter() - began) * 1e3)
        async with session(credential.value):
            began = time.perf_counter()
            await backend.undo(lease.lease_id, target_id=TARGET)
            undos.append((time.perf_counter() - began) * 1e3)
    for name, taken in (("mint", mints[1:]), ("undo", undos[1:])):
        _print(what, name, taken, f"first {mints[0]:.1f}" if name == "mint" else ended)


def _print(what: str, name: str, taken: list[float], note: str) -> None:
    p50, p99 = percentile(taken, 0.5), percentile(taken, 0.99)
    print(f"{what:34} {name}: min {min(taken):6.2f} ms, p50 {p50:6.2f}, p99 {p99:6.2f}, {note}")


async def _fill(backend: Backend, resource: str, count: int) -> None:
    state = _state(backend.kind)
    for start in range(0, count, _SIDE_BY_SIDE):
        some = range(min(_SIDE_BY_SIDE, count - start))
        await asyncio.gather(*(backend.mint(_lease(backend.kind, resource), state) for _ in some))


async def _redis(folder: Path) -> None:
    @asynccontextmanager
    async def session(url: str) -> AsyncIterator[None]:
        client: Any = Redis.from_url(url, single_connection_client=True)
        await client.ping()
        yield
        await client.aclose()

    async with valkey_target(TARGET, folder) as target:
        backend = target.backend()
        await _measure("redis", backend, "jobs/1", session)
        await backend.close()


async def _postgres(folder: Path) -> None:
    @asynccontextmanager
    async def session(url: str) -> AsyncIterator[None]:
        connection = await asyncpg.connect(url)
        yield
        connection.terminate()

    server = PostgresServer(server_programs())
    server.start()
    try:
        target = PostgresTarget(TARGET, server, folder, "shop")
        await target.make(["CREATE SCHEMA shop", "CREATE TABLE shop.orders (id int)"])
        backend, there = target.backend(), 0
        for among in AMONG:
            await _fill(backend, "shop/shop/orders", among - there)
            there = among
            await _measure(f"postgres, among {among:,} leases", backend, "shop/shop/orders", session)
        await backend.close()
    finally:
        server.stop()


async def _ssh(folder: Path) -> None:
    @asynccontextmanager
    async def session(value: str) -> AsyncIterator[None]:
        async with client(value) as ssh, ssh.open() as process:
            assert await lives(process)
            yield

    server = SshServer({"deploy": {"read": {"say": ["/bin/cat"]}}})
    server.start()
    try:
        target = SshTarget(TARGET, server, folder)
        target.write_secret()
        backend, there = target.backend(), 0
        for among in AMONG:
            await _fill(backend, "deploy/say", among - there)
            there = among
            await _measure(f"ssh, among {among:,} leases", backend, "deploy/say", session)
        await backend.close()
    finally:
        server.stop()


async def _jwt(folder: Path) -> None:
    keys = TokenKeys([
        TokenKey(SigningKey.generate("spiffe://test.example/service/issuer")),
        TokenKey.load(rsa_key_file(folder)),
    ])  # fmt: skip
    backend = JwtBackend("test.example", "https://issuer.test.example", keys)
    for alg in ("ES256", "RS256"):
        nothing = cast(Callable[[str], Any], lambda value: nullcontext())
        await _measure(f"jwt, {alg}", backend, "order/7", nothing, ended="nothing is there", alg=alg)


async def _http(folder: Path) -> None:
    file = folder / "key"
    file.touch(mode=0o600)
    file.write_text("a-static-secret\n")
    secrets, state = (
        StaticSecrets(TargetAccess({TARGET: f"file:{file}"})),
        _state("http", url="https://api.example"),
    )
    taken = []
    for _ in range(ROUNDS):
        began = time.perf_counter()
        await secrets.headers(state)
        taken.append((time.perf_counter() - began) * 1e3)
    _print("http, at the gateway", "read", taken, "nothing is made or undone")


async def _all() -> None:
    with tempfile.TemporaryDirectory(prefix="ringfence-bench-") as folder:
        await _jwt(Path(folder))
        await _http(Path(folder))
        await _redis(Path(folder))
        await _postgres(Path(folder))
        await _ssh(Path(folder))


def run(kafka: str) -> None:
    """Print all of it. No broker takes part, whatever `kafka` says."""
    import uvloop

    uvloop.run(_all())
