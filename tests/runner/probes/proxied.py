"""What is no target, by the proxy of the environment: by CONNECT, by absolute form, or by another's TLS name."""

from __future__ import annotations

import os
import socket
import ssl
import threading
from urllib.parse import urlsplit

from tests.runner.probes.frame import Blocked, canary, given

Address = tuple[str, int]


def connected(address: Address | str) -> socket.socket:
    if isinstance(address, str):
        opened = socket.socket(socket.AF_UNIX)
        opened.settimeout(5)
        opened.connect(address)
        return opened
    return socket.create_connection(address, timeout=5)


def relay_to(address: Address) -> Address:
    """A second program's way: a relay on a port of its own to the proxy."""
    server = socket.create_server(("127.0.0.1", 0))

    def pump(source: socket.socket, sink: socket.socket) -> None:
        try:
            while some := source.recv(4096):
                sink.sendall(some)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def serve() -> None:
        while True:
            peer, _ = server.accept()
            onward = connected(address)
            for pair in ((peer, onward), (onward, peer)):
                threading.Thread(target=pump, args=pair, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    port: int = server.getsockname()[1]
    return "127.0.0.1", port


def head_of(connection: socket.socket) -> bytes:
    said = b""
    while b"\r\n\r\n" not in said and len(said) < 65536:
        some = connection.recv(1)
        if not some:
            break
        said += some
    return said


def reach() -> str:
    proxy = urlsplit(os.environ["HTTP_PROXY"])
    assert proxy.hostname
    assert proxy.port
    way: Address | str = given.get("socket") or (proxy.hostname, proxy.port)
    if given.get("relayed"):
        assert not isinstance(way, str)
        way = relay_to(way)
    wanted = bytes.fromhex(given["answer"]) if given.get("answer") else canary.encode()
    connection = connected(way)
    if given.get("connect"):
        place = given["connect"]
        host = given.get("connect_host", place)
        connection.sendall(f"CONNECT {place} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())
        head = head_of(connection)
        if b" 200 " not in head.split(b"\r\n")[0] + b" ":
            connection.settimeout(2)
            raise Blocked(f"{head.split(chr(13).encode())[0]!r} {connection.recv(600)!r}")
    if given.get("tls_name"):
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        connection = context.wrap_socket(connection, server_hostname=given["tls_name"])
    connection.sendall(bytes.fromhex(given["send"]))
    said = b""
    try:
        while wanted not in said and (some := connection.recv(4096)):
            said += some
    except TimeoutError:
        pass
    if wanted not in said:
        raise Blocked(f"something else answers: {said[-300:]!r}")
    return said.decode(errors="replace")[:40]
