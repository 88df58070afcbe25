"""The gateway's TLS for agents: a listener that limits handshakes, and a private CA that signs certificates.

Each handshake is registered before it begins, and has a deadline. The event loop's own TLS server would begin any
number of handshakes, and not report those that fail. The CA is kept in memory. Its certificate has name constraints
(RFC 5280, 4.2.1.10) for the hosts of targets: agents that trust it trust it for nothing else. When a host is added,
the same key signs a new certificate. The old one stays valid for the old hosts.
"""

from __future__ import annotations

import asyncio
import datetime
import ipaddress
import logging
import os
import socket
import ssl
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from ringfence.gateway.contract import BlockedRequest, ReportBlocked
from ringfence.gateway.dataplane.limits import SenderLimits, sender_at
from ringfence.gateway.dataplane.stream import Stream, WriteBatcher
from ringfence.kernel.base.clock import Clock, utc_datetime
from ringfence.kernel.base.private_files import write_private
from ringfence.kernel.http1.head import RequestRefusedError
from ringfence.messages.codes import Code

CA_LIFE: Final = datetime.timedelta(days=90)
LEAF_LIFE: Final = datetime.timedelta(days=2)
_RENEW_AFTER_MS: Final = 24 * 3600 * 1000
_CLOCK_TOLERANCE: Final = datetime.timedelta(hours=1)
"""Clocks differ."""
_EVERYWHERE: Final = (ipaddress.ip_network("0.0.0.0/0"), ipaddress.ip_network("::/0"))


class CertificateAuthority:
    """The CA, with a cached TLS context for each host."""

    def __init__(self, name: str, hosts: Iterable[str], clock: Clock) -> None:
        """Args:
            name: of the gateway, for people who look at the certificate.
            hosts: names and addresses, without brackets and ports, that it may certify.
            clock: the time in certificates.
        """  # fmt: skip
        self._clock = clock
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        # A new name for each start: clients take two CAs of the same name for one.
        self._subject = x509.Name(
            [
                x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Ringfence"),
                x509.NameAttribute(NameOID.COMMON_NAME, f"{name[:32]} {os.urandom(6).hex()}"),
            ]
        )
        self._hosts: frozenset[str] = frozenset()
        self._contexts: dict[str, tuple[ssl.SSLContext, int]] = {}
        self._certificate = self._sign_own(frozenset(hosts))

    @property
    def certificate_pem(self) -> str:
        """The CA certificate that agents must trust."""
        return self._certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")

    def set_hosts(self, hosts: Iterable[str]) -> bool:
        """Certify exactly these hosts from now on. Returns whether agents that trust an older certificate lack one of
        them.
        """
        new_hosts = frozenset(hosts)
        added = new_hosts - self._hosts
        if new_hosts != self._hosts:
            self._certificate = self._sign_own(new_hosts)
            self._contexts = {host: context for host, context in self._contexts.items() if host in new_hosts}
        return bool(added)

    def write(self, path: Path) -> None:
        """Write the certificate to a file atomically. Agents of other users read it, and must not replace it.

        Raises OSError, NotPrivateError.
        """
        fresh = path.with_name(f".{path.name}.{os.getpid()}")
        write_private(fresh, self.certificate_pem)
        fresh.chmod(0o644)
        fresh.replace(path)

    def context(self, host: str) -> ssl.SSLContext:
        """The TLS context for this host. Raises RequestRefusedError for a host that is not certified."""
        if host not in self._hosts:
            raise RequestRefusedError(Code.HOST_UNKNOWN, "this host is no target", status=403)
        cached = self._contexts.get(host)
        now_ms = self._clock.now_ms()
        if cached is None or now_ms - cached[1] > _RENEW_AFTER_MS:
            cached = (self._make_context(host), now_ms)
            self._contexts[host] = cached
        return cached[0]

    def _make_context(self, host: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.set_alpn_protocols(["http/1.1"])
        context.sni_callback = _require_server_name(host)
        _load_key_and_certificate(context, self._leaf(host), self._leaf_key)
        return context

    def _leaf(self, host: str) -> x509.Certificate:
        return (
            self._builder(self._leaf_key.public_key(), LEAF_LIFE)
            .subject_name(x509.Name([]))
            .add_extension(x509.SubjectAlternativeName([_general_name(host)]), critical=True)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False
            )
            .sign(self._key, hashes.SHA256())
        )

    def _sign_own(self, hosts: frozenset[str]) -> x509.Certificate:
        self._hosts = hosts
        return (
            self._builder(self._key.public_key(), CA_LIFE)
            .subject_name(self._subject)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_name_constraints(hosts), critical=True)
            .add_extension(_SIGNS_CERTIFICATES, critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )

    def _builder(self, key: ec.EllipticCurvePublicKey, life: datetime.timedelta) -> x509.CertificateBuilder:
        now = utc_datetime(self._clock.now_ms() / 1000)
        return (
            x509.CertificateBuilder()
            .issuer_name(self._subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _CLOCK_TOLERANCE)
            .not_valid_after(now + life)
        )


_SIGNS_CERTIFICATES: Final = x509.KeyUsage(
    digital_signature=False, content_commitment=False, key_encipherment=False, data_encipherment=False,
    key_agreement=False, key_cert_sign=True, crl_sign=False, encipher_only=False, decipher_only=False,
)  # fmt: skip


def _name_constraints(hosts: frozenset[str]) -> x509.NameConstraints:
    """Permit these hosts and exclude all others: a type of name that is not mentioned would be unconstrained."""
    permitted: list[x509.GeneralName] = []
    for host in sorted(hosts):
        address = _ip_address(host)
        permitted.append(
            x509.DNSName(host) if address is None else x509.IPAddress(ipaddress.ip_network(address))
        )
    excluded: list[x509.GeneralName] = [
        x509.IPAddress(everywhere)
        for everywhere in _EVERYWHERE
        if not any(_is_network_of(name, everywhere.version) for name in permitted)
    ]
    if not any(isinstance(name, x509.DNSName) for name in permitted):
        excluded.append(x509.DNSName(""))
    return x509.NameConstraints(permitted or None, excluded or None)


def _is_network_of(name: x509.GeneralName, version: int) -> bool:
    return isinstance(name, x509.IPAddress) and name.value.version == version


def _general_name(host: str) -> x509.GeneralName:
    address = _ip_address(host)
    return x509.DNSName(host) if address is None else x509.IPAddress(address)


def _ip_address(host: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(host)
    except ValueError:
        return None


def _load_key_and_certificate(
    context: ssl.SSLContext, leaf: x509.Certificate, key: ec.EllipticCurvePrivateKey
) -> None:
    """Load them from a memory file, since `ssl` reads keys from files only. The key never reaches a disk."""
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ) + leaf.public_bytes(serialization.Encoding.PEM)
    file = os.memfd_create("ringfence-leaf", os.MFD_CLOEXEC)
    try:
        os.write(file, pem)
        context.load_cert_chain(f"/proc/self/fd/{file}")
    finally:
        os.close(file)


def _require_server_name(host: str) -> Callable[[ssl.SSLObject, str | None, ssl.SSLContext], int | None]:
    """An SNI callback that refuses a handshake for another host than the CONNECT named."""

    def check(_: ssl.SSLObject, server_name: str | None, __: ssl.SSLContext) -> int | None:
        if server_name is not None and server_name.lower() != host:
            return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME
        return None

    return check


log = logging.getLogger(__name__)

_RETRY_DELAY_S: Final = 0.1
"""The delay before the next accept when the process is out of files."""

StreamCallback = Callable[[Stream], None]


@dataclass(slots=True, eq=False)
class TlsListener:
    tls: ssl.SSLContext
    limits: SenderLimits
    blocked: ReportBlocked
    write_batcher: WriteBatcher
    _: KW_ONLY
    handshake_s: float
    _listening: list[socket.socket] = field(init=False, default_factory=list)
    _work: set[asyncio.Task[None]] = field(init=False, default_factory=set)

    async def open(
        self, host: str, port: int, backlog: int, on_open: StreamCallback, on_lost: StreamCallback
    ) -> int:
        """Listen. Returns the port. `on_open` is called once the TLS of a connection is open, `on_lost` when it is
        gone.

        Raises OSError.
        """
        loop = asyncio.get_running_loop()
        addresses = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        try:
            for family, address in dict.fromkeys((info[0], info[4]) for info in addresses):
                self._listening.append(socket.create_server(address, family=family, backlog=backlog))
        except OSError:
            await self.close()
            raise
        for listening in self._listening:
            listening.setblocking(False)
            self._start(self._accept(listening, on_open, on_lost))
        bound_port: int = self._listening[0].getsockname()[1]
        return bound_port

    async def close(self) -> None:
        """Stop listening, and abort handshakes in progress."""
        for task in list(self._work):
            task.cancel()
        await asyncio.gather(*self._work, return_exceptions=True)
        for listening in self._listening:
            listening.close()

    def _start(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._work.add(task)
        task.add_done_callback(self._work.discard)

    async def _accept(
        self, listening: socket.socket, on_open: StreamCallback, on_lost: StreamCallback
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                connection, peer = await loop.sock_accept(listening)
            except OSError as error:
                log.warning("a connection is not accepted: %s", error.strerror)
                await asyncio.sleep(_RETRY_DELAY_S)
                continue
            address = sender_at(peer[0])
            if self.limits.begin_handshake(address):
                self._start(self._handshake(connection, address, on_open, on_lost))
            else:
                connection.close()
                self.blocked(
                    BlockedRequest(Code.TOO_MANY_CONNECTIONS, "too many connections of this address")
                )

    async def _handshake(
        self, connection: socket.socket, address: str, on_open: StreamCallback, on_lost: StreamCallback
    ) -> None:
        pending = True

        def end_handshake() -> None:
            nonlocal pending
            if pending:
                pending = False
                self.limits.end_handshake(address)

        def opened(stream: Stream) -> None:
            end_handshake()
            on_open(stream)

        try:
            await asyncio.get_running_loop().connect_accepted_socket(
                lambda: Stream(opened, on_lost, self.write_batcher),
                connection,
                ssl=self.tls,
                ssl_handshake_timeout=self.handshake_s,
            )
        except OSError:
            self.blocked(BlockedRequest(Code.TLS_FAILED, "the client did not agree to TLS, or not in time"))
        finally:
            end_handshake()
