"""All services by TLS and as a user of few rights at Redis, with the commands of `docs/operators/kafka-and-redis.md`.

Needs `redis-cli`. The embedded Valkey speaks no TLS: a relay before it does.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from ringfence.dev.processes import LOOPBACK
from ringfence.dev.redis import EmbeddedRedis
from tests.brokers.secured import Authority
from tests.conftest import Kafka
from tests.site.page_commands import ROOT, run_page, section_of
from tests.support.installation import THIS_CLONE, Installation, lease, organise

PAGE = ROOT / "docs/operators/kafka-and-redis.md"
PASSWORD = "a-password-of-this-test"

pytestmark = [pytest.mark.tools, pytest.mark.timeout(400)]


@contextlib.asynccontextmanager
async def relay(certificate: Path, upstream: int) -> AsyncIterator[int]:
    """The port at which clients come by TLS to a server of this machine that speaks none."""

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there, back = await asyncio.open_connection(LOOPBACK, upstream)
        await asyncio.gather(pass_on(reader, back), pass_on(there, writer))

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = await asyncio.start_server(serve, LOOPBACK, 0, ssl=context)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def test_all_services_by_tls_as_a_user_with_few_rights(kafka: Kafka, tmp_path: Path) -> None:
    redis = EmbeddedRedis(tmp_path / "redis")
    redis.start()
    authority = Authority(tmp_path)
    folder = tmp_path / "installation"
    folder.mkdir()
    (folder / "redis-password").write_text(PASSWORD)
    here = Installation(
        THIS_CLONE, folder, kafka=kafka.bootstrap, embedded_broker=kafka.embedded, redis_url=redis.url
    )  # fmt: skip
    user, address = section_of(PAGE, "Redis or Valkey")
    try:
        async with relay(authority.issue("redis"), redis.port) as port:
            replaced = {
                "redis-cli ": f"redis-cli -u {redis.url} ",
                "~rf{": f"~{here.redis_prefix}{{",
                "/run/secrets/redis-password": str(folder / "redis-password"),
                "redis.acme.example:6380": f"{LOOPBACK}:{port}",
                "/etc/ringfence/redis-ca.pem": str(authority.file),
                "ringfence rebuild --check": 'echo "$RINGFENCE_REDIS_URL" > url',
            }
            await asyncio.to_thread(
                run_page, PAGE, folder, here.environment("olga"), replaced, blocks=[user, address]
            )
            here.change(redis_url=(folder / "url").read_text().strip())
            await asyncio.to_thread(here.make)
            await asyncio.to_thread(here.start)
            task = await asyncio.to_thread(organise, here)
            held = await asyncio.to_thread(lease, here, task, "10m")
            del replaced["ringfence rebuild --check"]
            said = await asyncio.to_thread(
                run_page, PAGE, folder, here.environment("olga"), replaced, blocks=[address]
            )
            assert "Redis holds what Kafka knows" in said
            doctor = await asyncio.to_thread(here.run, "doctor", who="olga")
            assert doctor.returncode == 0, doctor.stdout
            assert await asyncio.to_thread(here.leases) == {held}
            # The rebuild needs most of these rights.
            await asyncio.to_thread(here.say, "rebuild")
            assert await asyncio.to_thread(here.leases) == {held}
            await asyncio.to_thread(here.stop)
    finally:
        here.end()
        redis.stop()
