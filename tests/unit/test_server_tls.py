"""TLS of our HTTP servers: who gets in, and that changed files are used without a restart."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives import serialization

from ringfence.dev.processes import free_port
from ringfence.kernel.base.errors import SettingsError
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.service import server_tls
from ringfence.kernel.service.http import HttpServer, application
from ringfence.kernel.service.server_tls import ServerTls, http_tls
from tests.gateway.certificates import Certificates

WITHIN_S = 10.0


@dataclass
class Files:
    """The files that a server is started with, and who signed them."""

    certificates: Certificates
    cert: Path
    client_ca: Path

    def put(self, target: Path, source: Path | bytes) -> None:
        """Replace a file as programs that renew certificates do: by another one of its name."""
        draft = target.with_suffix(".new")
        draft.write_bytes(source if isinstance(source, bytes) else source.read_bytes())
        draft.rename(target)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    monkeypatch.setattr(server_tls, "_LOOK_EVERY_S", 0.0)
    certificates = authority(tmp_path / "servers")
    made = Files(certificates, tmp_path / "server.pem", tmp_path / "clients.pem")
    made.put(made.cert, certificates.server_file("localhost"))
    made.put(made.client_ca, certificates.file)
    return made


def authority(folder: Path) -> Certificates:
    folder.mkdir()
    return Certificates(folder)


async def serving(tls: ServerTls) -> AsyncIterator[str]:
    port = free_port()
    server = HttpServer(application([], []), "127.0.0.1", port, tls=tls)
    running = asyncio.create_task(server.run_until_stopped())
    async with asyncio.timeout(WITHIN_S):
        while not server.started:
            await asyncio.sleep(0.01)
    yield f"https://localhost:{port}/healthz"
    server.should_exit = True
    await running


@pytest.fixture
async def url(files: Files) -> AsyncIterator[str]:
    async for one in serving(ServerTls("RINGFENCE_HTTP_TLS", files.cert)):
        yield one


@pytest.fixture
async def mutual_url(files: Files) -> AsyncIterator[str]:
    async for one in serving(ServerTls("RINGFENCE_HTTP_TLS", files.cert, client_ca_file=files.client_ca)):
        yield one


async def status(url: str, by: Certificates, certificate: Path | None = None) -> int:
    """Each call is a connection, and a handshake, of its own."""
    context = by.trusting()
    if certificate is not None:
        context.load_cert_chain(certificate)
    async with httpx.AsyncClient(verify=context, trust_env=False) as http:
        return (await http.get(url)).status_code


async def serial(url: str, by: Certificates) -> object:
    """The serial number of the certificate that the server shows."""
    host, port = httpx.URL(url).host, httpx.URL(url).port
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=by.trusting(), server_hostname=host)
    shown = writer.get_extra_info("ssl_object").getpeercert()["serialNumber"]
    writer.close()
    return shown


async def test_server_with_a_certificate_takes_tls_alone(url: str, files: Files) -> None:
    assert await status(url, files.certificates) == 200
    async with httpx.AsyncClient(trust_env=False) as http:
        with pytest.raises(httpx.TransportError):
            await http.get(url.replace("https:", "http:"))
        with pytest.raises(httpx.ConnectError, match="certificate verify failed"):
            await http.get(url)


async def test_old_versions_of_tls_are_refused(url: str, files: Files) -> None:
    context = files.certificates.trusting()
    context.minimum_version, context.maximum_version = ssl.TLSVersion.TLSv1, ssl.TLSVersion.TLSv1_1
    async with httpx.AsyncClient(verify=context, trust_env=False) as http:
        with pytest.raises(httpx.ConnectError):
            await http.get(url)


async def test_renewed_certificate_is_shown_without_a_restart(url: str, files: Files) -> None:
    before = await serial(url, files.certificates)
    files.put(files.cert, files.certificates.server_file("localhost"))
    assert await serial(url, files.certificates) != before


async def test_half_of_a_renewal_keeps_the_former_certificate(
    url: str, files: Files, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    before = await serial(url, files.certificates)
    renewed = files.certificates.server_file("localhost").read_bytes()
    key, _, certificate = renewed.partition(b"-----BEGIN CERTIFICATE-----")
    for half in (b"-----BEGIN CERTIFICATE-----" + certificate, key, b"", b"no PEM"):
        files.put(files.cert, half)
        assert await serial(url, files.certificates) == before
    files.cert.unlink()
    assert await serial(url, files.certificates) == before
    assert "the former certificate stays in use" in caplog.text
    assert key.decode().splitlines()[1] not in caplog.text
    files.put(files.cert, renewed)
    assert await serial(url, files.certificates) != before


async def test_client_without_a_certificate_of_the_authority_is_refused(
    mutual_url: str, files: Files, tmp_path: Path
) -> None:
    own = files.certificates.client("spiffe://acme.example/user/olga")
    assert await status(mutual_url, files.certificates, own) == 200
    strangers = authority(tmp_path / "strangers").client("spiffe://acme.example/user/olga")
    for other in (None, strangers):
        with pytest.raises(httpx.TransportError):
            await status(mutual_url, files.certificates, other)


async def test_clients_of_a_replaced_authority_are_refused_without_a_restart(
    mutual_url: str, files: Files, tmp_path: Path
) -> None:
    former = files.certificates.client("spiffe://acme.example/user/olga")
    assert await status(mutual_url, files.certificates, former) == 200
    following = authority(tmp_path / "following")
    files.put(files.client_ca, following.file)
    assert await status(mutual_url, files.certificates, following.client("spiffe://a/user/b")) == 200
    with pytest.raises(httpx.TransportError):
        await status(mutual_url, files.certificates, former)


@pytest.mark.parametrize("name", ["http_tls_key_file", "http_tls_client_ca_file"])
def test_key_or_authority_without_a_certificate_is_refused(name: str, files: Files) -> None:
    with pytest.raises(SettingsError, match="RINGFENCE_HTTP_TLS_CERT_FILE: needed"):
        load(ServiceSettings, **{name: files.cert})


@pytest.mark.parametrize(
    ("setting", "content", "says"),
    [
        ("http_tls_cert_file", b"no PEM", "RINGFENCE_HTTP_TLS_CERT_FILE: no usable PEM"),
        ("http_tls_cert_file", None, "RINGFENCE_HTTP_TLS_CERT_FILE: cannot be read"),
        ("http_tls_client_ca_file", b"no PEM", "RINGFENCE_HTTP_TLS_CLIENT_CA_FILE: no usable PEM"),
        ("http_tls_client_ca_file", None, "RINGFENCE_HTTP_TLS_CLIENT_CA_FILE: cannot be read"),
    ],
)
def test_unusable_file_is_refused_at_start(
    setting: str, content: bytes | None, says: str, files: Files, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.pem"
    if content is not None:
        wrong.write_bytes(content)
    given = {"http_tls_cert_file": files.cert, setting: wrong}
    with pytest.raises(SettingsError, match=says):
        http_tls(load(ServiceSettings, **given))


def test_key_with_a_password_is_refused_without_a_question(files: Files, tmp_path: Path) -> None:
    key = files.cert.read_bytes().partition(b"-----BEGIN CERTIFICATE-----")[0]
    locked = serialization.load_pem_private_key(key, None).private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "key.pem").write_bytes(locked)
    with pytest.raises(SettingsError, match="RINGFENCE_HTTP_TLS_CERT_FILE"):
        http_tls(load(ServiceSettings, http_tls_cert_file=files.cert, http_tls_key_file=tmp_path / "key.pem"))
