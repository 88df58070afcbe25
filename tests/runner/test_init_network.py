"""The network inside: unchanged programs reach targets through init's proxy and relays, and nothing else."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from ringfence.dev.processes import StackError
from ringfence.kernel.crypto.keys import thumbprint
from ringfence.runner.control.messages import (
    RelayError,
    addresses_of,
    hosts_of,
    needs_low_ports,
    relays_of,
)
from ringfence.runner.lifecycle.gateway_relay import GatewayRelay
from ringfence.runner.sandbox.backend import Mount
from tests.gateway.certificates import Certificates
from tests.gateway.table_gate import SECRET, TASK, Entry, TableGate, data_plane
from tests.gateway.target import Target
from tests.gateway.test_programs import (
    GIT_RULES,
    NPM_RULES,
    PIP_RULES,
    WHEEL,
    WHEEL_CONTENT,
    git_backend,
    index,
    registry,
)
from tests.runner.run_host import AGENT, TRUST_DOMAIN, Finished, RunHost, run_host
from tests.support.instance_enrolments import enrolment_of
from tests.support.servers.postgres import PostgresServer, server_programs

PYTHON = "/usr/bin/python3"
PACKAGES = "/opt/ringfence/packages-0"


@dataclass
class Inside:
    """A host of runs, and the gateway with the targets api.test, git.test, npm.test and pip.test that they reach."""

    host: RunHost
    gate: TableGate
    socket: Path
    ca_pem: str
    api: Target
    targets: dict[str, Target]
    repositories: Path

    async def run(self, *argv: str, **fields: Any) -> Finished:
        return await self.host.run(*argv, socket=self.socket, ca_pem=self.ca_pem, **fields)

    async def python(self, program: str, **fields: Any) -> Finished:
        """Run the machine's Python with the packages of this installation, which are there for init."""
        return await self.run(PYTHON, "-c", program, environment={"PYTHONPATH": packages()}, **fields)


def packages() -> str:
    import httpx

    folder = Path(os.path.realpath(httpx.__file__)).parents[1]
    return str(folder) if folder.is_relative_to("/usr") else PACKAGES


@pytest.fixture
async def inside(tmp_path: Path) -> AsyncIterator[Inside]:
    certificates = Certificates(tmp_path)
    targets = {name: Target() for name in ("api", "git", "npm", "pip")}
    repositories = tmp_path / "repositories"
    targets["git"].respond = lambda received: git_backend(repositories, received)
    targets["npm"].respond = registry
    targets["pip"].respond = index
    async with contextlib.AsyncExitStack() as stack:
        tls = certificates.server("localhost")
        for target in targets.values():
            await stack.enter_async_context(target.serving(tls))
        hosts = {
            name: (f"https://localhost:{one.port}", frozenset({f"{name}.test"}))
            for name, one in targets.items()
        }
        gate = TableGate({
            "api": Entry(*hosts["api"]),
            "git": Entry(*hosts["git"], GIT_RULES, frozenset({"fetch"})),
            "npm": Entry(*hosts["npm"], NPM_RULES),
            "pip": Entry(*hosts["pip"], PIP_RULES),
        })  # fmt: skip
        plane = data_plane(gate, tls=certificates.trusting())
        await plane.start()
        stack.push_async_callback(plane.close)
        host = await stack.enter_async_context(run_host())
        socket = host.folder / "task.sock"
        await plane.listen_for_task(socket, TASK)
        plane.authority.write(tmp_path / "bundle.pem")
        ca_pem = (tmp_path / "bundle.pem").read_text()
        yield Inside(host, gate, socket, ca_pem, targets["api"], targets, repositories)


def needs(program: str) -> str:
    found = shutil.which(program)
    assert found is not None, f"install {program}"
    return found


async def test_curl_and_the_report_of_what_passed(inside: Inside) -> None:
    needs("curl")
    ended = await inside.run(
        "sh",
        "-c",
        "curl -sS --fail-with-body 'https://api.test/files/a?x=1' && curl -sS http://api.test/files/b",
    )
    assert ended.text == "okok", ended
    assert inside.api.requests[0].values("authorization") == [f"Bearer {SECRET}"]
    assert inside.gate.last[0].task_id == TASK
    assert ended.report is not None
    assert (ended.report.proxy_connections, ended.report.relay_connections) == (2, 0)
    assert ended.report.sent_bytes > 0
    assert ended.report.received_bytes > 500


async def test_a_host_that_is_no_target_is_denied(inside: Inside) -> None:
    needs("curl")
    ended = await inside.run("curl", "-sS", "https://elsewhere.test/")
    assert ended.code != 0
    assert b"403" in ended.stderr


SIZES = (1, 1_000, 20_000, 65_536, 150_000, 262_145, 400_000, 700_000, 1_000_000, 1_048_576)
"""Bytes of a body: below and above the buffers of each hop."""
CURL_POSTS = """
for size in "$@"; do
  head -c $size /dev/zero >body
  curl -s -o /dev/null -w '%{http_code} ' -H Expect: --data-binary @body http://api.test/nothing
  curl -s -o /dev/null -w '%{http_code} ' -H Expect: --data-binary @body https://api.test/nothing
done
"""
PYTHON_POSTS = """
import sys, urllib.error, urllib.request
for size in map(int, sys.argv[1:]):
    for scheme in ("http", "https"):
        try:
            urllib.request.urlopen(f"{scheme}://api.test/nothing", b"x" * size)
        except urllib.error.HTTPError as error:
            print(error.code)
        except OSError as error:
            print(error)
"""
NODE_POSTS = """
const http = require('http'), proxy = new URL(process.env.HTTP_PROXY);
const post = size => new Promise(done => {
  const where = {host: proxy.hostname, port: proxy.port, method: 'POST', path: 'http://api.test/nothing'};
  const request = http.request({...where, headers: {host: 'api.test', 'content-length': size}}, answer => {
    console.log(answer.statusCode); answer.resume(); done();
  });
  request.on('error', error => { console.log(error.code); done(); });
  request.end(Buffer.alloc(size));
});
(async () => { for (const size of process.argv.slice(1)) await post(Number(size)); })();
"""


async def test_refused_request_with_a_body_gets_its_403(inside: Inside) -> None:
    """The way of a run: init's proxy inside, the runner's relay, and the gateway, which reads no body of these."""
    needs("curl")
    relay = GatewayRelay(inside.host.folder / "run.sock", inside.socket)
    await relay.listen()
    inside.socket = relay.path
    sizes = [str(size) for size in SIZES]
    try:
        for count, argv in (
            (80, ("sh", "-c", CURL_POSTS, "sh", *sizes * 4)),
            (60, (PYTHON, "-c", PYTHON_POSTS, *sizes * 3)),
            (60, (needs("node"), "-e", NODE_POSTS, *sizes * 6)),
        ):
            ended = await inside.run(*argv, working_directory="/tmp")
            assert ended.text.split() == ["403"] * count, ended
    finally:
        await relay.close()
    assert inside.api.requests == []


async def test_listener_inside_is_reached_without_the_proxy(inside: Inside) -> None:
    program = """
import http.server, threading, urllib.request
server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
threading.Thread(target=server.serve_forever, daemon=True).start()
for name in ("127.0.0.1", "localhost"):
    print(urllib.request.urlopen(f"http://{name}:{server.server_port}/").status)
"""
    assert (await inside.python(program, working_directory="/tmp")).text == "200\n200\n"


@pytest.mark.parametrize("name", ["requests", "httpx"])
async def test_python_clients(inside: Inside, name: str) -> None:
    program = (
        f"import {name} as client\n"
        "print(client.get('https://api.test/files/a').text)\n"
        "print(client.delete('https://api.test/files/a').json()['code'])\n"
    )
    ended = await inside.python(program)
    assert ended.text.split() == ["ok", "out_of_scope"], ended


async def test_git(inside: Inside, tmp_path: Path) -> None:
    needs("git")
    inside.repositories.mkdir()
    content = os.urandom(1 << 20)
    seed = tmp_path / "seed"
    for argv in (
        ["init", "-q", "--bare", "-b", "main", str(inside.repositories / "one.git")],
        ["init", "-q", "-b", "main", str(seed)],
    ):
        await _outside("git", *argv)
    (seed / "a").write_bytes(content)
    await _outside("git", "-C", str(seed), "add", "a")
    await _outside(
        *("git", "-C", str(seed), "-c", "user.name=a", "-c", "user.email=a@b.c", "commit", "-q", "-m", "a")
    )
    await _outside("git", "-C", str(seed), "push", "-q", str(inside.repositories / "one.git"), "main")
    ended = await inside.run("sh", "-c", "git clone -q https://git.test/one.git one && sha256sum one/a")
    assert ended.code == 0, ended
    assert ended.text.split()[0] == hashlib.sha256(content).hexdigest()


async def _outside(*argv: str) -> None:
    environment = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    process = await asyncio.create_subprocess_exec(*argv, env=environment)
    assert await process.wait() == 0


async def test_pip(inside: Inside) -> None:
    ended = await inside.run(
        "sh", "-c",
        f'{PYTHON} -m pip download -q --no-deps --no-cache-dir --disable-pip-version-check --retries=0 --no-index '
        f"--find-links=https://pip.test/links --dest=w small-thing && sha256sum w/{WHEEL}",
        environment={"PYTHONPATH": packages()},
    )  # fmt: skip
    assert ended.code == 0, ended
    assert ended.text.split()[0] == hashlib.sha256(WHEEL_CONTENT).hexdigest()


async def test_npm(inside: Inside) -> None:
    needs("npm")
    ended = await inside.run(
        "sh", "-c",
        "mkdir p && cd p && echo '{}' >package.json && npm install --registry=https://npm.test/ --no-audit --no-fund "
        "--no-update-notifier --fetch-retries=0 small-thing >&2 && cat node_modules/small-thing/index.js",
    )  # fmt: skip
    assert ended.text == "module.exports = 1\n", ended


async def test_node(inside: Inside) -> None:
    """Node.js before 24 has no proxy of its own: a program that speaks CONNECT trusts the CA."""
    node = needs("node")
    program = """
const http = require('http'), https = require('https'), tls = require('tls');
const proxy = new URL(process.env.HTTPS_PROXY);
http.request({host: proxy.hostname, port: proxy.port, method: 'CONNECT', path: 'api.test:443',
  headers: {host: 'api.test:443'}})
  .on('connect', (answer, socket) => {
    const secure = tls.connect({socket, servername: 'api.test'}, () => {
      https.get({path: '/files/a', headers: {host: 'api.test'}, createConnection: () => secure},
        reply => reply.on('data', data => process.stdout.write(data)));
    });
  }).end();
"""
    ended = await inside.run(node, "-e", program)
    assert ended.text == "ok", ended


JAVA = """
import java.net.*;
import java.nio.charset.StandardCharsets;
public class Get {
    public static void main(String[] names) throws Exception {
        var connection = (HttpURLConnection) new URL("https://api.test/files/a").openConnection();
        System.out.println(new String(connection.getInputStream().readAllBytes(), StandardCharsets.UTF_8));
        var client = java.net.http.HttpClient.newBuilder().proxy(ProxySelector.getDefault()).build();
        var request = java.net.http.HttpRequest.newBuilder(URI.create("https://api.test/files/b")).build();
        System.out.println(client.send(request, java.net.http.HttpResponse.BodyHandlers.ofString()).body());
    }
}
"""


async def test_java(inside: Inside, tmp_path: Path) -> None:
    java = needs("java")
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "Get.java").write_text(JAVA)
    ended = await inside.run(
        java, "/opt/source/Get.java", mounts=[Mount((tmp_path / "source").resolve(), "/opt/source")]
    )
    assert ended.text == "ok\nok\n", ended


GO = """
package main

import ("fmt"; "io"; "net/http")

func main() {
    answer, err := http.Get("https://api.test/files/a")
    if err != nil { panic(err) }
    body, _ := io.ReadAll(answer.Body)
    fmt.Println(string(body))
}
"""


async def test_go(inside: Inside, tmp_path: Path) -> None:
    go = needs("go")
    (tmp_path / "program").mkdir()
    (tmp_path / "program" / "get.go").write_text(GO)
    environment = {
        **os.environ,
        "GOCACHE": str(tmp_path / "cache"),
        "GOFLAGS": "-mod=mod",
        "CGO_ENABLED": "0",
    }
    process = await asyncio.create_subprocess_exec(
        *(go, "build", "-o", "get", "get.go"), cwd=tmp_path / "program", env=environment
    )
    assert await process.wait() == 0
    ended = await inside.run(
        "/opt/program/get", mounts=[Mount((tmp_path / "program").resolve(), "/opt/program")]
    )
    assert ended.text == "ok\n", ended


SDK = """
import asyncio
from ringfence import Agent
from ringfence.kernel.base.errors import RingfenceError
async def main():
    agent = Agent.connect()
    try:
        await agent.start()
    except RingfenceError as error:
        print(error)
    print(agent.id, agent.connection.key.kid)
asyncio.run(main())
"""


async def test_the_sdk_acts_as_the_instance_by_the_gateway_of_the_run(inside: Inside) -> None:
    """With what init sets alone. This gateway has no trust bundle, so it gets no further."""
    gateway = RawGateway(inside.host.folder / "g.sock", {})
    now_s, agent = int(time.time()), f"spiffe://{TRUST_DOMAIN}/agent/{AGENT}"
    async with gateway.serving():
        run = await inside.host.start(
            *(PYTHON, "-c", SDK),
            socket=gateway.path,
            environment={"PYTHONPATH": f"/opt/ringfence/lib:{packages()}"},
            enrol=lambda jwk: enrolment_of(jwk, agent, now_s - 60, now_s + 600),
        )
        ended = await run.finish()
    error, _, identity = ended.text.strip().rpartition("\n")
    assert identity == f"{AGENT} {thumbprint(run.key)}", ended
    assert "trust" in error
    assert gateway.asked[0].startswith(b"GET /v1/trust HTTP/1.1\r\nHost: ringfence\r\n")


# --- relays ---


@dataclass
class RawGateway:
    """Answers CONNECT, as a gateway does for raw targets: 200 and the bytes of a local port, or 403."""

    path: Path
    ports: dict[str, int]
    """By authority."""
    asked: list[bytes] = field(default_factory=list)
    """The heads of all requests."""

    @contextlib.asynccontextmanager
    async def serving(self) -> AsyncIterator[RawGateway]:
        server = await asyncio.start_unix_server(self._serve, str(self.path))
        try:
            yield self
        finally:
            server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.asked.append(head)
        port = self.ports.get(head.split(b" ")[1].decode())
        if port is None:
            writer.write(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")
            writer.close()
            return
        target_reader, target = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        await asyncio.gather(_pump(reader, target), _pump(target_reader, writer))
        target.close()
        writer.close()


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


@contextlib.asynccontextmanager
async def target(
    serve: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Any],
) -> AsyncIterator[int]:
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def _checksum(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Reads to the end, then answers: a client that half-closes has to get it."""
    data = await reader.read(-1)
    writer.write(hashlib.sha256(data).hexdigest().encode())
    writer.close()


SEND = """
import socket, sys
peer = socket.create_connection((sys.argv[1], int(sys.argv[2])))
peer.sendall(sys.stdin.buffer.read())
peer.shutdown(socket.SHUT_WR)
print(peer.recv(100).decode())
"""


@pytest.fixture
async def host() -> AsyncIterator[RunHost]:
    async with run_host() as host:
        yield host


async def test_a_relay_leads_to_its_target_in_both_directions(host: RunHost) -> None:
    data = os.urandom(3_000_000)
    relays = relays_of([("Db.Internal", 5432), ("db.internal", 22), ("cache.internal", 5432)])
    async with target(_checksum) as port:
        gateway = RawGateway(host.folder / "g.sock", {"db.internal:22": port})
        async with gateway.serving():
            ended = await host.run(
                *("/usr/bin/python3", "-c", SEND, "db.internal", "22"),
                stdin=data, relays=relays, socket=gateway.path,
            )  # fmt: skip
    assert ended.text.strip() == hashlib.sha256(data).hexdigest(), ended
    assert ended.report is not None
    assert (ended.report.relay_connections, ended.report.proxy_connections) == (1, 0)
    connect = b"CONNECT db.internal:22 HTTP/1.1\r\nHost: db.internal:22\r\n\r\n"
    assert gateway.asked == [connect]
    assert ended.report.sent_bytes == len(connect) + len(data)
    assert ended.report.received_bytes == len(b"HTTP/1.1 200 OK\r\n\r\n") + 64


async def test_a_relay_that_the_gateway_refuses_is_closed(host: RunHost) -> None:
    gateway = RawGateway(host.folder / "g.sock", {})
    async with gateway.serving():
        ended = await host.run(
            *("/usr/bin/python3", "-c", SEND, "db.internal", "5432"),
            relays=relays_of([("db.internal", 5432)]), socket=gateway.path,
        )  # fmt: skip
    assert len(gateway.asked) == 1
    assert ended.text.strip() == ""
    assert ended.report is not None
    assert ended.report.relay_connections == 0


async def test_a_run_whose_gateway_does_not_listen_has_no_way_out(host: RunHost) -> None:
    ended = await host.run(
        *("/usr/bin/python3", "-c", SEND, "db.internal", "5432"), relays=relays_of([("db.internal", 5432)])
    )
    assert ended.text.strip() == ""


async def test_psql_reaches_a_real_postgresql(host: RunHost) -> None:
    psql = needs("psql")
    try:
        server = PostgresServer(server_programs())
        server.start()
    except StackError as error:
        pytest.fail(str(error))
    try:
        gateway = RawGateway(host.folder / "g.sock", {"db.internal:5432": server.port})
        async with gateway.serving():
            ended = await host.run(
                *(psql, "-w", "host=db.internal user=nobody dbname=postgres connect_timeout=20"),
                relays=relays_of([("db.internal", 5432)]), socket=gateway.path,
            )  # fmt: skip
        # The server's own words: a role without a password cannot log in.
        assert b"fe_sendauth: no password supplied" in ended.stderr, ended
    finally:
        server.stop()


async def test_ssh_reaches_a_server_at_port_22(host: RunHost) -> None:
    import asyncssh

    ssh = needs("ssh")
    key = asyncssh.generate_private_key("ssh-ed25519")
    server = await asyncssh.listen("127.0.0.1", 0, server_host_keys=[key])
    try:
        gateway = RawGateway(host.folder / "g.sock", {"build.internal:22": server.get_port()})
        async with gateway.serving():
            ended = await host.run(
                ssh, "-o", "BatchMode=yes", "-o", "StrictHostKeyChecking=accept-new", "-v", "build.internal", "true",
                relays=relays_of([("build.internal", 22)]), socket=gateway.path,
            )  # fmt: skip
        assert b"Permanently added 'build.internal'" in ended.stderr, ended.stderr
    finally:
        server.close()


@pytest.mark.parametrize("address", ["203.0.113.7", "2001:db8::7", "localhost", "127.0.0.1", "::1"])
async def test_a_relay_leads_to_a_target_whose_record_has_an_address(host: RunHost, address: str) -> None:
    """What the record names is reached under that very address, also below port 1024, and is inside alone."""
    port, authority = 80, f"[{address}]:80" if ":" in address else f"{address}:80"
    relays = relays_of([(address, port)])
    async with target(_checksum) as served:
        gateway = RawGateway(host.folder / "g.sock", {authority: served})
        async with gateway.serving():
            ended = await host.run(
                *("/usr/bin/python3", "-c", SEND, address, str(port)),
                stdin=b"data",
                relays=relays,
                socket=gateway.path,
            )
    assert ended.text.strip() == hashlib.sha256(b"data").hexdigest(), ended
    assert gateway.asked == [f"CONNECT {authority} HTTP/1.1\r\nHost: {authority}\r\n\r\n".encode()]


def test_an_address_is_the_sandboxs_own_and_in_no_hosts_file() -> None:
    relays = relays_of([("10.0.0.1", 22), ("db.test", 5432), ("localhost", 5432), ("2001:DB8::1", 22)])
    assert [one.address for one in relays] == ["10.0.0.1", "127.0.1.2", "127.0.0.1", "2001:db8::1"]
    assert hosts_of(relays) == {"db.test": "127.0.1.2"}
    assert addresses_of(relays) == ("10.0.0.1", "2001:db8::1")
    with pytest.raises(RelayError, match="one place"):
        relays_of([("localhost", 5432), ("127.0.0.1", 5432)])
    relays_of([("localhost", 5432), ("127.0.0.1", 5433)])


def test_each_host_has_a_loopback_address_of_its_own() -> None:
    relays = relays_of([("a.test", 22), ("b.test", 5432), ("A.test", 5432), ("a.test", 22)])
    assert [(one.host, one.port) for one in relays] == [("a.test", 22), ("b.test", 5432), ("a.test", 5432)]
    assert hosts_of(relays) == {"a.test": "127.0.1.1", "b.test": "127.0.1.2"}
    assert needs_low_ports(relays)
    assert not needs_low_ports(relays[1:])


@pytest.mark.parametrize(
    ("host_name", "port"),
    [
        ("0.0.0.0", 22),
        ("::", 22),
        ("224.0.0.1", 22),
        ("fe80::1", 22),
        ("fe80::1%eth0", 22),
        ("::ffff:10.0.0.1", 22),
        ("127.0.1.1", 22),
        ("010.0.0.1", 22),
        ("a b", 22),
        ("a\nb", 22),
        ("", 22),
        ("a.test", 0),
        ("a.test", 70000),
    ],
)
def test_relay_for_an_impossible_address_is_refused(host_name: str, port: int) -> None:
    with pytest.raises(RelayError):
        relays_of([(host_name, port)])
