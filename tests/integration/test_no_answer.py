"""What a person is told where no Kafka answers as it should: where it was looked for, what is there, what to set."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from ringfence.cli.main import main
from ringfence.kernel.base.errors import UnavailableError
from ringfence.kernel.base.settings import BusSettings, ServiceSettings
from ringfence.kernel.kafka import probe
from ringfence.kernel.kafka.probe import Listener, Silence, look
from ringfence.kernel.kafka.producer import Publisher
from ringfence.kernel.kafka.topics_admin import TopicsAdmin
from tests.brokers.secured import Authority
from tests.conftest import Kafka

pytestmark = pytest.mark.broker

Door = Callable[[BusSettings], Awaitable[str]]


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65_536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path)


@pytest.fixture
async def behind_tls(authority: Authority, kafka: Kafka) -> AsyncIterator[str]:
    """The broker of this run behind TLS: the address."""
    host, port = kafka.bootstrap.split(",")[0].split(":")

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        from_broker, to_broker = await asyncio.open_connection(host, int(port))
        await asyncio.gather(_copy(reader, to_broker), _copy(from_broker, writer))

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(authority.issue("broker"))
    server = await asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=context)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()


async def told(settings: BusSettings) -> str:
    with pytest.raises(UnavailableError) as refused:
        async with asyncio.timeout(60), Publisher(settings, "test"):
            pass
    return str(refused.value)


async def test_a_client_in_clear_at_a_listener_of_tls(behind_tls: str):
    says = await told(BusSettings(kafka=behind_tls))
    assert f"Kafka at {behind_tls} takes TLS alone" in says
    assert "RINGFENCE_KAFKA_SECURITY_PROTOCOL" in says


async def test_a_client_of_tls_at_a_listener_in_clear(kafka: Kafka):
    says = await told(BusSettings(kafka=kafka.bootstrap, kafka_security_protocol="SSL"))
    assert f"Kafka at {kafka.bootstrap} speaks no TLS" in says


async def test_a_certificate_that_is_not_believed(behind_tls: str, authority: Authority, tmp_path: Path):
    says = await told(BusSettings(kafka=behind_tls, kafka_security_protocol="SSL"))
    assert "is not believed" in says
    assert "RINGFENCE_KAFKA_SSL_CA_FILE" in says
    other = Authority(tmp_path, "another")
    settings = BusSettings(kafka=behind_tls, kafka_security_protocol="SSL", kafka_ssl_ca_file=other.file)
    assert "is not believed" in await told(settings)
    believed = {"kafka_security_protocol": "SSL", "kafka_ssl_ca_file": authority.file}
    by_name = behind_tls.replace("127.0.0.1", "localhost")
    assert "RINGFENCE_KAFKA to a name that it is for" in await told(BusSettings(kafka=by_name, **believed))  # type: ignore[arg-type]
    context = ssl.create_default_context(cafile=authority.file)
    found = await look(BusSettings(kafka=behind_tls, **believed), context)  # type: ignore[arg-type]
    assert [(one.tls, one.disbelieved) for one in found.values() if isinstance(one, Listener)] == [(True, "")]


async def test_a_program_that_is_no_kafka(monkeypatch: pytest.MonkeyPatch):
    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(10)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
        writer.close()

    server = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    at = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    found = await look(BusSettings(kafka=at), None)
    assert found == {at: Silence("something listens there that is no Kafka, or does not answer")}
    server.close()


async def test_a_host_that_keeps_silent(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(probe, "WITHIN_S", 0.2)
    server = await asyncio.start_server(lambda reader, writer: asyncio.sleep(60), "127.0.0.1", 0)
    at = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    assert await look(BusSettings(kafka=at), None) == {
        at: Silence("something listens there that is no Kafka, or does not answer")
    }
    server.close()


def test_a_command_without_a_broker_says_where_it_looked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and does not listen
        at = f"127.0.0.1:{nobody.getsockname()[1]}"
        monkeypatch.setenv("RINGFENCE_KAFKA", at)
        assert main(["topics", "check"]) == 1
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err == (
        f"error: Kafka at {at} does not answer: nothing listens there; see that the broker runs, or set "
        "RINGFENCE_KAFKA to where it does\n"
    )


async def test_plain_text_listener_is_recognised(settings: ServiceSettings):
    (found,) = (await look(settings, None)).values()
    assert isinstance(found, Listener)
    assert (found.protocol, found.disbelieved) == ("PLAINTEXT", "")
    async with TopicsAdmin(settings):
        pass
