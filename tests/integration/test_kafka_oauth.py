"""Sign-in by OAuth tokens (OAUTHBEARER) on an Apache Kafka, whose own validator decides about each token.

Needs `--kafka apache`: the embedded broker knows no SASL.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import tempfile
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from aiokafka import AIOKafkaConsumer, AIOKafkaProducer
from aiokafka.admin import AIOKafkaAdminClient, NewTopic

from ringfence.cli.main import main
from ringfence.client.settings import ClientSettings
from ringfence.faststream import RingfenceRouter
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.kafka.connection import connection
from ringfence.kernel.kafka.oauth import SessionConnection
from ringfence.kernel.kafka.producer import Publisher
from tests.brokers.secured import ADMIN, AUDIENCE, SecuredKafka
from tests.conftest import needed
from tests.support.oidc_tokens import TokenIssuer
from tests.support.token_endpoint import TokenEndpoint, private

pytestmark = [pytest.mark.apache, pytest.mark.timeout(180)]
ISSUER = TokenIssuer("https://issuer.test")
SECRET = "a-client-secret-of-this-test"


def signed(ends_in_s: float = 60, issuer: TokenIssuer = ISSUER, **more: Any) -> str:
    claims = issuer.claims(AUDIENCE, sub=ADMIN)
    # Each token is another one.
    return issuer.token({**claims, "exp": int(time.time() + ends_in_s), "jti": uuid.uuid4().hex, **more})


@pytest.fixture(scope="module")
def secured(request: pytest.FixtureRequest) -> Iterator[SecuredKafka]:
    with tempfile.TemporaryDirectory(prefix="ringfence-oauth-") as folder:
        kafka = SecuredKafka(Path(folder), [], {}, ISSUER)
        with needed(request):
            kafka.server.start()
        yield kafka
        kafka.server.stop()


@pytest.fixture
async def topic(secured: SecuredKafka) -> str:
    """A new topic, and the one with the groups' offsets, which the broker makes for its first group."""
    name = f"t-{uuid.uuid4().hex[:8]}"
    admin = AIOKafkaAdminClient(bootstrap_servers=secured.server.bootstrap)
    await admin.start()
    await admin.create_topics([NewTopic(name, 2, 1)])
    await admin.close()
    consumer = AIOKafkaConsumer(name, bootstrap_servers=secured.server.bootstrap, group_id="first")
    await consumer.start()
    await consumer.stop()
    return name


@pytest.fixture
async def endpoint(secured: SecuredKafka, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TokenEndpoint]:
    monkeypatch.setenv("CLIENT_SECRET", SECRET)
    made = TokenEndpoint(lambda: (200, {"access_token": signed(), "expires_in": 60}))
    async with made.serve(secured.authority):
        yield made


def credentials(secured: SecuredKafka, endpoint: TokenEndpoint) -> BusSettings:
    fields = secured.by_token(
        endpoint.url,
        kafka_sasl_username="ringfence-policy",
        kafka_sasl_password="env:CLIENT_SECRET",
        kafka_sasl_ca_file=secured.authority.file,
    )
    return BusSettings(**fields)


@pytest.fixture(autouse=True)
def lines_of_aiokafka(caplog: pytest.LogCaptureFixture) -> None:
    """Commands that ran in this process before have silenced them."""
    caplog.set_level(logging.DEBUG, logger="aiokafka")


async def test_tokens_of_seconds_are_renewed_without_a_gap(
    secured: SecuredKafka, endpoint: TokenEndpoint, topic: str, caplog: pytest.LogCaptureFixture
) -> None:
    given: list[str] = []

    def answer() -> tuple[int, dict[str, Any]]:
        given.append(signed(6))
        return 200, {"access_token": given[-1]}  # without expires_in: the token has its end

    endpoint.answer = answer
    settings = credentials(secured, endpoint)
    caplog.set_level(logging.DEBUG)
    read, sent = list[bytes](), list[bytes]()
    async with contextlib.AsyncExitStack() as stack:
        producer = AIOKafkaProducer(**connection(settings), enable_idempotence=True)
        consumer = AIOKafkaConsumer(
            topic, **connection(settings), group_id=topic, auto_offset_reset="earliest", heartbeat_interval_ms=500
        )  # fmt: skip
        for client in (producer, consumer):
            await client.start()
            stack.push_async_callback(client.stop)
        async with asyncio.timeout(60):
            while len(given) < 4:
                sent.append(str(len(sent)).encode())
                await producer.send_and_wait(topic, sent[-1])
                read += [record.value for some in (await consumer.getmany()).values() for record in some]
            while len(read) < len(sent):
                read.append((await consumer.getone()).value)
        connections = [
            one for client in (producer.client, consumer._client) for one in client._conns.values()
        ]
        assert connections
        assert all(isinstance(one, SessionConnection) for one in connections)
    assert sorted(read) == sorted(sent)
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING] == []
    assert any(
        record.levelno == logging.DEBUG and record.name == "aiokafka.conn" for record in caplog.records
    )
    for secret in (SECRET, *given):
        assert secret[:60] not in caplog.text, "aiokafka shortens what it logs"


async def test_token_that_ends_unrenewed_denies_until_the_file_has_another(
    secured: SecuredKafka, topic: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = private(tmp_path / "token", signed(8))
    settings = BusSettings(**secured.by_token(f"file:{file}"))
    producer = AIOKafkaProducer(**connection(settings), request_timeout_ms=60_000)
    await producer.start()
    await producer.send_and_wait(topic, b"1")
    async with asyncio.timeout(30):
        while "has expired; see what renews it" not in caplog.text:
            await asyncio.wait([asyncio.ensure_future(await producer.send(topic, b"2"))], timeout=0.5)
        waiting = asyncio.ensure_future(await producer.send(topic, b"3"))
    assert not waiting.done()
    assert "Unable connect to node with id 1: TokenError: the file" in caplog.text
    private(file, signed())
    async with asyncio.timeout(30):
        await waiting
    await producer.stop()


OTHER = TokenIssuer("https://issuer.test")
"""Signs with another key, and says that it is the same."""


@pytest.mark.parametrize(
    ("token", "says"),
    [
        (lambda: signed(aud="another"), "does not let us in: the broker refused the token (invalid_token)"),
        (lambda: signed(issuer=OTHER), "does not let us in: the broker refused the token (invalid_token)"),
        (lambda: signed(iss="https://other.test"), "does not let us in: the broker refused the token (invalid_token)"),
        (lambda: "opaque", "does not let us in: the broker refused the token"),
        (lambda: signed(-1), "gave a token that has expired; see what renews it"),
        (lambda: "", "is empty, where the token for Kafka should be"),
    ],
    ids=["audience", "signature", "issuer", "opaque", "expired", "empty"],
)  # fmt: skip
async def test_refused_sign_in_is_named_by_commands_and_services_without_the_token(
    secured: SecuredKafka, tmp_path: Path, token: Any, says: str,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    file = private(tmp_path / "token", token())
    fields = secured.by_token(f"file:{file}")
    with pytest.raises(UnavailableError) as refused:
        async with Publisher(BusSettings(**fields), "spiffe://test.example/test"):
            pass
    assert says in str(refused.value)
    assert "RINGFENCE_KAFKA_SASL_TOKEN_SOURCE" in str(refused.value) or str(file) in str(refused.value)
    for name, value in fields.items():
        monkeypatch.setenv(f"RINGFENCE_{name.upper()}", str(value))
    assert await asyncio.to_thread(main, ["doctor"]) == 1
    told = capsys.readouterr()
    assert says in " ".join(told.out.split())
    if token():
        for text in (str(refused.value), told.out, told.err, caplog.text):
            assert file.read_text() not in text


async def test_endpoint_that_refuses_the_client_is_named_by_doctor(
    secured: SecuredKafka, endpoint: TokenEndpoint
) -> None:
    endpoint.answer = lambda: (401, {"error": "invalid_client"})
    with pytest.raises(UnavailableError) as refused:
        async with Publisher(credentials(secured, endpoint), "spiffe://test.example/test"):
            pass
    assert f"there is no token to sign in to Kafka at {secured.by_token('')['kafka']}" in str(refused.value)
    assert "answered 401 (invalid_client)" in str(refused.value)
    assert SECRET not in str(refused.value)


async def test_broker_of_faststream_signs_in_with_tokens(
    secured: SecuredKafka, topic: str, tmp_path: Path
) -> None:
    file = private(tmp_path / "token", signed())
    broker = RingfenceRouter(ClientSettings(**secured.by_token(f"file:{file}"))).broker()
    await broker.start()
    try:
        assert (await broker.publish(b"x", topic=topic)) is not None
    finally:
        await broker.stop()
