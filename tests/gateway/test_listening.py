"""How agents come in (TCP, TLS, client certificates, a task's own socket, CONNECT), and whom the gateway trusts."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import socket
import ssl
import stat
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import h11
import pytest
import pytest_asyncio
from cryptography import x509

from ringfence.gateway.contract import PresentedIdentity
from ringfence.gateway.dataplane.forwarder import UpstreamPool
from ringfence.gateway.dataplane.plane import DataPlane, ListenError
from ringfence.gateway.dataplane.stream import DeadlineTimer
from ringfence.gateway.dataplane.tls_listener import CertificateAuthority
from ringfence.kernel.base.clock import SystemClock
from ringfence.kernel.http1.head import RequestRefusedError
from tests.gateway.certificates import Certificates
from tests.gateway.conftest import Place
from tests.gateway.raw import Raw, connected, connected_unix
from tests.gateway.table_gate import TASK, Entry, TableGate, data_plane, with_entry
from tests.gateway.target import Target

GET = b"GET /api/files/a HTTP/1.1\r\nHost: gateway.test\r\n\r\n"
INSIDE = b"GET /files/a HTTP/1.1\r\nHost: api.test\r\n\r\n"
CONNECT = b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n"


@dataclass
class Secure:
    """A target with TLS, and what it is verified by."""

    target: Target
    gate: TableGate
    plane: DataPlane
    port: int
    certificates: Certificates

    def trusting_gateway(self) -> ssl.SSLContext:
        return ssl.create_default_context(cadata=self.plane.authority.certificate_pem)

    @contextlib.asynccontextmanager
    async def inside(self, name: str = "api.test") -> AsyncIterator[Raw]:
        """Through a CONNECT for api.test, with `name` for TLS."""
        async with connected(self.port) as raw:
            await raw.send(CONNECT)
            assert (await raw.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
            await raw.writer.start_tls(self.trusting_gateway(), server_hostname=name)
            yield raw


@pytest_asyncio.fixture(loop_scope="package")
async def secure(tmp_path: Path) -> AsyncIterator[Secure]:
    certificates = Certificates(tmp_path)
    async with Target().serving(certificates.server("localhost")) as target:
        gate = TableGate({"api": Entry(f"https://localhost:{target.port}", frozenset({"api.test"}))})
        plane = data_plane(gate, tls=certificates.trusting())
        await plane.start()
        port = await plane.listen("127.0.0.1", 0, names=["gateway.test"])
        yield Secure(target, gate, plane, port, certificates)
        await plane.close()


# --- the gateway's own trust ------------------------------------------------------------------------------------------


async def test_the_gate_is_told_where_a_connection_comes_from(place: Place) -> None:
    for address in ("127.0.0.1", "127.0.0.2"):
        reader, writer = await asyncio.open_connection("127.0.0.1", place.port, local_addr=(address, 0))
        raw = Raw(reader, writer)
        await raw.send(GET)
        assert (await raw.response()).status == 200
        writer.close()
        presented, *_ = place.gate.records[-1]
        assert presented.address == address
        assert presented == PresentedIdentity(header_names=presented.header_names, htu=presented.htu), (
            "it is nothing that tells who sends"
        )


@pytest.mark.parametrize("url", ["https://127.0.0.1", "https://LOCALHOST.localdomain", "https://[::1]"])
async def test_the_name_in_the_targets_certificate_decides(secure: Secure, url: str) -> None:
    async with connected(secure.port) as raw:
        assert (await raw.ask(GET)).status == 200
        with_entry(secure.gate, "api", url=f"{url}:{secure.target.port}")
        response = await raw.ask(GET)
        assert response.status == 502
    assert len(secure.target.requests) == 1


async def test_a_certificate_of_a_stranger_gets_no_secret(secure: Secure, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    async with Target().serving(Certificates(other).server("localhost")) as stranger:
        with_entry(secure.gate, "api", url=f"https://localhost:{stranger.port}")
        async with connected(secure.port) as raw:
            assert (await raw.ask(GET)).status == 502
        assert stranger.requests == []
        assert not any(stranger.raw)


def test_a_context_that_verifies_nothing_is_refused() -> None:
    lax = ssl.create_default_context()
    lax.check_hostname = False
    with pytest.raises(ValueError, match="verifies"):
        UpstreamPool(lax, DeadlineTimer(), connect_s=1)


# --- CONNECT ----------------------------------------------------------------------------------------------------------


async def test_each_request_inside_a_connect_is_decided(secure: Secure) -> None:
    async with secure.inside() as raw:
        assert (await raw.ask(INSIDE)).status == 200
        assert (await raw.ask(INSIDE.replace(b"GET", b"DELETE"))).status == 403
        assert (await raw.ask(INSIDE.replace(b"api.test", b"API.test:443"))).status == 200
    assert [one.method for one in secure.target.requests] == ["GET", "GET"]
    presented, attempt, _ = secure.gate.records[0]
    assert (attempt.authority, attempt.scheme, attempt.target_id) == ("api.test", "https", None)
    assert presented.htu == "https://api.test/files/a"


@pytest.mark.parametrize(
    "data",
    [
        INSIDE.replace(b"api.test", b"elsewhere.test"),
        INSIDE.replace(b"api.test", b"api.test:8443"),
        INSIDE.replace(b"/files/a", b"https://elsewhere.test/files/a"),
        INSIDE.replace(b"/files/a", b"http://api.test/files/a"),
        CONNECT,
    ],
)
async def test_inside_a_connect_nothing_else_can_be_reached(secure: Secure, data: bytes) -> None:
    async with secure.inside() as raw:
        response = await raw.ask(data)
        assert response.status in (400, 403)
    assert secure.target.requests == []


async def test_another_name_in_tls_than_in_the_connect_is_refused(secure: Secure) -> None:
    with pytest.raises((ssl.SSLError, ConnectionError)):
        async with secure.inside("elsewhere.test"):
            pass


async def test_plain_text_inside_connect_is_dropped(secure: Secure) -> None:
    async with connected(secure.port) as raw:
        await raw.send(CONNECT)
        await raw.reader.readuntil(b"\r\n\r\n")
        await raw.send(INSIDE)
        while await raw.reader.read(1000):
            pass
    assert secure.target.raw == []
    assert secure.gate.records == []


async def test_connect_to_an_unknown_port_is_denied_and_recorded(secure: Secure) -> None:
    async with connected(secure.port) as raw:
        data = CONNECT.replace(b":443", b":22").replace(
            b"\r\n\r\n", b"\r\nProxy-Authorization: Basic aGFuZGxlOng=\r\n\r\n"
        )
        assert (await raw.ask(data)).status == 403
    presented, attempt, _ = secure.gate.last
    assert (presented.handle, attempt.method, attempt.authority) == ("handle", "CONNECT", "api.test:22")


async def test_connect_without_credentials_is_challenged(secure: Secure) -> None:
    port = await secure.plane.listen("127.0.0.1", 0, challenge=True)
    async with connected(port) as raw:
        response = await raw.ask(CONNECT)
        assert (response.status, response.value("proxy-authenticate")) == (407, 'Basic realm="ringfence"')


async def test_a_proxy_that_speaks_tls_opens_the_tls_inside_as_well(secure: Secure) -> None:
    tls = secure.certificates.server("localhost")
    port = await secure.plane.listen("127.0.0.1", 0, tls=tls)
    trust = secure.certificates.trusting()
    trust.load_verify_locations(cadata=secure.plane.authority.certificate_pem)
    async with connected(port, trust) as raw:
        await raw.send(CONNECT)
        await raw.reader.readuntil(b"\r\n\r\n")
        incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        inner = trust.wrap_bio(incoming, outgoing, server_hostname="api.test")

        async def step() -> None:
            await raw.send(outgoing.read())
            incoming.write(await raw.reader.read(65536))

        while True:
            try:
                inner.do_handshake()
                break
            except ssl.SSLWantReadError:
                await step()
        inner.write(INSIDE)
        while True:
            try:
                assert inner.read(65536).startswith(b"HTTP/1.1 200")
                break
            except ssl.SSLWantReadError:
                await step()


# --- the CA -----------------------------------------------------------------------------------------------------------


def test_the_authority_can_stand_for_its_hosts_alone() -> None:
    authority = CertificateAuthority("gateway", ["api.test", "10.0.0.1"], SystemClock())
    constraints = (
        x509.load_pem_x509_certificate(authority.certificate_pem.encode())
        .extensions.get_extension_for_class(x509.NameConstraints)
    )  # fmt: skip
    assert constraints.critical
    assert [str(name.value) for name in constraints.value.permitted_subtrees or ()] == [
        "10.0.0.1/32",
        "api.test",
    ]
    assert [str(name.value) for name in constraints.value.excluded_subtrees or ()] == ["::/0"]
    with pytest.raises(RequestRefusedError):
        authority.context("elsewhere.test")
    assert authority.context("api.test") is authority.context("api.test")


def test_an_authority_without_hosts_can_stand_for_nobody() -> None:
    authority = CertificateAuthority("gateway", [], SystemClock())
    constraints = (
        x509.load_pem_x509_certificate(authority.certificate_pem.encode())
        .extensions.get_extension_for_class(x509.NameConstraints)
    )  # fmt: skip
    excluded = constraints.value.excluded_subtrees or ()
    assert [str(name.value) for name in excluded] == ["0.0.0.0/0", "::/0", ""]


async def test_older_authority_still_verifies_hosts_it_covered(secure: Secure) -> None:
    older = secure.trusting_gateway()
    assert secure.plane.authority.set_hosts(["api.test", "new.test"])
    assert not secure.plane.authority.set_hosts(["api.test", "new.test"])
    async with connected(secure.port) as raw:
        await raw.send(CONNECT)
        await raw.reader.readuntil(b"\r\n\r\n")
        await raw.writer.start_tls(older, server_hostname="api.test")
        assert (await raw.ask(INSIDE)).status == 200


@pytest.mark.parametrize("host", ["new.test", "127.0.0.1"])
async def test_constraints_hold_with_those_who_trust_it(secure: Secure, host: str) -> None:
    older = secure.trusting_gateway()
    secure.plane.authority.set_hosts(["api.test", host])
    with_entry(secure.gate, "api", authorities=frozenset({host}))
    async with connected(secure.port) as raw:
        await raw.send(CONNECT.replace(b"api.test", host.encode()))
        assert (await raw.reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        with pytest.raises(ssl.SSLCertVerificationError, match="subtree"):
            await raw.writer.start_tls(older, server_hostname=host)


# --- listeners --------------------------------------------------------------------------------------------------------


async def test_a_client_certificate_is_shown_to_the_core(secure: Secure) -> None:
    tls = secure.certificates.server("localhost")
    tls.verify_mode = ssl.CERT_REQUIRED
    tls.load_verify_locations(secure.certificates.file)
    port = await secure.plane.listen("127.0.0.1", 0, names=["gateway.test"], tls=tls)
    client = secure.certificates.trusting()
    client.load_cert_chain(secure.certificates.client("spiffe://test.example/agent/helper"))
    async with connected(port, client) as raw:
        assert (await raw.ask(GET)).status == 200
    presented, attempt, _ = secure.gate.last
    assert presented.certificate == "spiffe://test.example/agent/helper"
    assert (presented.htu, attempt.scheme) == ("https://gateway.test/api/files/a", "https")
    with pytest.raises((ssl.SSLError, ConnectionError, h11.RemoteProtocolError)):
        async with connected(port, secure.certificates.trusting()) as raw:
            await raw.ask(GET)


async def test_a_tasks_socket_is_its_own(place: Place, tmp_path: Path) -> None:
    path = tmp_path / "task.sock"
    await place.plane.listen_for_task(path, TASK)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    async with connected_unix(str(path)) as raw:
        assert (await raw.ask(GET.replace(b"gateway.test", b"anything.at.all"))).status == 200
        presented, _, _ = place.gate.last
        assert presented.task_id == TASK
        await place.plane.close_for_task(path)
        assert await raw.ended()
    assert not path.exists()


async def test_a_tasks_socket_may_lie_deep(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deeper than an address of a socket can say: agents reach it from a folder near by."""
    folder = tmp_path.joinpath(*["a-folder-of-a-project"] * 8)
    folder.mkdir(parents=True)
    path = folder / f"{TASK}.sock"
    await place.plane.listen_for_task(path, TASK)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    monkeypatch.chdir(folder)
    async with connected_unix(path.name) as raw:
        assert (await raw.ask(GET)).status == 200
    assert place.gate.last[0].task_id == TASK
    await place.plane.close_for_task(path)
    assert list(folder.iterdir()) == []


async def test_a_socket_that_was_left_behind_is_replaced_and_nothing_else(
    place: Place, tmp_path: Path
) -> None:
    path = tmp_path / "task.sock"
    for task in (TASK, "another"):
        await place.plane.listen_for_task(path, task)
    async with connected_unix(str(path)) as raw:
        assert (await raw.ask(GET)).status == 200
    assert place.gate.last[0].task_id == "another"
    await place.plane.close_for_task(path)
    leftover = socket.socket(socket.AF_UNIX)
    leftover.bind(str(path))
    leftover.close()
    await place.plane.listen_for_task(path, TASK)
    other = tmp_path / "file"
    other.write_text("mine")
    with pytest.raises(ListenError, match="no socket"):
        await place.plane.listen_for_task(other, TASK)
    with pytest.raises(ListenError, match="cannot listen"):
        await place.plane.listen_for_task(tmp_path / "nowhere" / "task.sock", TASK)
    with pytest.raises(ListenError, match="in use"):
        await place.plane.listen("127.0.0.1", place.port)


async def test_a_handle_is_what_the_proxy_url_says(place: Place) -> None:
    basic = base64.b64encode(b"the-handle:").decode()
    async with place.connected() as raw:
        data = GET.replace(b"\r\n\r\n", f"\r\nProxy-Authorization: Basic {basic}\r\n\r\n".encode())
        assert (await raw.ask(data)).status == 200
        for wrong in ("Basic !", "Bearer x", "Basic"):
            data = GET.replace(b"\r\n\r\n", f"\r\nProxy-Authorization: {wrong}\r\n\r\n".encode())
            async with place.connected() as other:
                assert (await other.ask(data)).status == 400
    assert [presented.handle for presented, _, _ in place.gate.records] == ["the-handle"]
