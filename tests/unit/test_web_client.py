"""The HTTP client of the SDK and the services: whom it believes over TLS, and when it reads the authorities."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from ringfence.kernel.base import http_client
from ringfence.kernel.base.http_client import web_client
from tests.gateway.certificates import Certificates


@pytest.fixture(autouse=True)
def unread() -> Iterator[None]:
    """As in a process that has not read the authorities yet, also for the tests after these."""
    http_client._authorities.cache_clear()
    yield
    http_client._authorities.cache_clear()


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    await reader.readuntil(b"\r\n\r\n")
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nok")
    await writer.drain()
    writer.close()


async def get(context: ssl.SSLContext | None) -> httpx.Response:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    async with server, web_client(timeout_s=10) as http:
        return await http.get(f"http{'s' if context else ''}://127.0.0.1:{port}/")


async def test_a_certificate_of_an_unknown_authority_is_refused(tmp_path: Path) -> None:
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        await get(Certificates(tmp_path).server("127.0.0.1"))


async def test_a_certificate_of_a_believed_authority_is_accepted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates = Certificates(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.file))
    assert (await get(certificates.server("127.0.0.1"))).text == "ok"


async def test_a_certificate_for_another_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certificates = Certificates(tmp_path)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.file))
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        await get(certificates.server("127.0.0.2"))


async def test_authorities_are_not_read_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere/ca.pem")
    assert (await get(None)).text == "ok"
