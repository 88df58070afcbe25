"""Programs that nobody changed work with a proxy and a CA bundle alone, and each of their requests is decided."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.client.task_proxy.server import TaskProxy
from ringfence.gateway.dataplane.plane import DataPlane
from tests.gateway.agents import Sandbox, bridged, missing
from tests.gateway.certificates import Certificates
from tests.gateway.table_gate import SECRET, TASK, Entry, TableGate, data_plane, rule, with_entry
from tests.gateway.target import Received, Target

GIT_RULES = TEMPLATES["git"].requests
NPM_RULES = (
    rule("GET", "/{name}", "read", "package/{name}"),
    rule("GET", "/{name}/-/{file}", "read", "package/{name}"),
    rule("PUT", "/{name}", "publish", "package/{name}"),
)
PIP_RULES = (
    rule("GET", "/links", "read", "links"),
    rule("GET", "/files/{file}", "read", "file/{file}"),
)


@dataclass
class Shop:
    """Targets api.test, git.test, npm.test and pip.test, each with TLS, behind one task's socket."""

    gate: TableGate
    plane: DataPlane
    sandbox: Sandbox
    api: Target
    git: Target
    npm: Target
    pip: Target
    repositories: Path
    handle: str | None
    """What the gateway gets of the user in the proxy URL."""


@pytest_asyncio.fixture(loop_scope="package", params=["relay", "connect"])
async def shop(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Shop]:
    """Programs reach the socket through a plain relay, or through the proxy of `ringfence gateway connect`."""
    certificates = Certificates(tmp_path)
    api, git, npm, pip = Target(), Target(), Target(), Target()
    repositories = tmp_path / "repositories"
    git.respond = lambda received: git_backend(repositories, received)
    npm.respond = registry
    pip.respond = index
    async with contextlib.AsyncExitStack() as stack:
        tls = certificates.server("localhost")
        for target in (api, git, npm, pip):
            await stack.enter_async_context(target.serving(tls))
        gate = TableGate({
            "api": Entry(f"https://localhost:{api.port}", frozenset({"api.test"})),
            "git": Entry(
                f"https://localhost:{git.port}", frozenset({"git.test"}), GIT_RULES, frozenset({"fetch"})
            ),
            "npm": Entry(f"https://localhost:{npm.port}", frozenset({"npm.test"}), NPM_RULES),
            "pip": Entry(f"https://localhost:{pip.port}", frozenset({"pip.test"}), PIP_RULES),
        })  # fmt: skip
        plane = data_plane(gate, tls=certificates.trusting())
        await plane.start()
        stack.push_async_callback(plane.close)
        await plane.listen_for_task(tmp_path / "task.sock", TASK)
        url, handle = await proxy_url(stack, tmp_path / "task.sock", request.param)
        plane.authority.write(tmp_path / "bundle.pem")
        home = tmp_path / "home"
        home.mkdir()
        sandbox = Sandbox(home, url, tmp_path / "bundle.pem")
        yield Shop(gate, plane, sandbox, api, git, npm, pip, repositories, handle)


async def proxy_url(stack: contextlib.AsyncExitStack, socket: Path, way: str) -> tuple[str, str | None]:
    if way == "relay":
        port = await stack.enter_async_context(bridged(socket))
        return f"http://handle:@127.0.0.1:{port}", "handle"
    proxy = await stack.enter_async_context(TaskProxy(socket))
    await proxy.start()
    return proxy.url, None


@pytest.mark.tools
async def test_curl(shop: Shop) -> None:
    assert not missing("curl"), "install it: apt-get install curl"
    outcome = await shop.sandbox.run("curl", "-sS", "--fail-with-body", "https://api.test/files/a?x=1")
    assert (outcome.code, outcome.out) == (0, "ok"), outcome
    presented, attempt, _ = shop.gate.last
    assert (presented.task_id, presented.handle) == (TASK, shop.handle)
    assert (attempt.authority, attempt.scheme, attempt.target) == ("api.test", "https", "/files/a?x=1")
    assert shop.api.requests[0].values("authorization") == [f"Bearer {SECRET}"]

    outcome = await shop.sandbox.run(
        "curl", "-sS", "-X", "DELETE", "-H", "Authorization: Bearer mine", "https://api.test/files/a"
    )
    assert json.loads(outcome.out)["code"] == "out_of_scope"
    assert len(shop.api.requests) == 1


@pytest.mark.tools
async def test_curl_sends_and_expects(shop: Shop, tmp_path: Path) -> None:
    assert not missing("curl"), "install it: apt-get install curl"
    size = 3 * 1024 * 1024
    (tmp_path / "large").write_bytes(os.urandom(size))
    for more in ([], ["-H", "Transfer-Encoding: chunked"]):
        argv = [
            "curl",
            "-sS",
            "--fail-with-body",
            "-T",
            str(tmp_path / "large"),
            *more,
            "https://api.test/files/a",
        ]
        outcome = await shop.sandbox.run(*argv)
        assert outcome.code == 0, outcome
    assert [len(one.body) for one in shop.api.requests] == [size, size]
    assert shop.api.requests[0].body == (tmp_path / "large").read_bytes()


@pytest.mark.tools
async def test_a_host_that_is_no_target_is_denied_and_not_tunnelled(shop: Shop) -> None:
    assert not missing("curl"), "install it: apt-get install curl"
    outcome = await shop.sandbox.run("curl", "-sS", "https://elsewhere.test/")
    assert outcome.code != 0
    assert "403" in outcome.err
    presented, attempt, verdict = shop.gate.last
    assert (attempt.method, attempt.authority, verdict.allowed) == ("CONNECT", "elsewhere.test", False)
    assert presented.task_id == TASK


CLIENTS = {
    "requests": "import requests\nsession = requests.Session()\nask = session.request",
    "httpx": "import httpx\nsession = httpx.Client()\nask = session.request",
}


@pytest.mark.parametrize("name", CLIENTS)
async def test_python_clients(shop: Shop, name: str) -> None:
    program = (
        f"{CLIENTS[name]}\n"
        "print(ask('GET', 'https://api.test/files/a').text)\n"
        "print(ask('PUT', 'https://api.test/files/a', content=b'abc').text)\n"
        "print(ask('DELETE', 'https://api.test/files/a').json()['code'])\n"
        "print(ask('GET', 'https://api.test/files/b').text)\n"
    ).replace("content=", "data=" if name == "requests" else "content=")
    outcome = await shop.sandbox.run(sys.executable, "-c", program)
    assert outcome.out.split() == ["ok", "ok", "out_of_scope", "ok"], outcome
    assert [(one.method, one.body) for one in shop.api.requests] == [
        ("GET", b""),
        ("PUT", b"abc"),
        ("GET", b""),
    ]
    program = f"{CLIENTS[name]}\nask('GET', 'https://elsewhere.test/')"
    outcome = await shop.sandbox.run(sys.executable, "-c", program)
    assert outcome.code != 0
    assert "403" in outcome.err


@pytest.mark.tools
async def test_git(shop: Shop, tmp_path: Path) -> None:
    assert not missing("git"), "install it: apt-get install git"
    run, work = shop.sandbox.run, tmp_path / "work"
    _git(tmp_path, "init", "-q", "--bare", "-b", "main", str(shop.repositories / "one.git"))
    _git(shop.repositories / "one.git", "config", "http.receivepack", "true")
    _git(tmp_path, "init", "-q", "-b", "main", str(tmp_path / "seed"))
    _commit(tmp_path / "seed", "a", os.urandom(2 * 1024 * 1024))
    _git(tmp_path / "seed", "push", "-q", str(shop.repositories / "one.git"), "main")

    outcome = await run("git", "clone", "-q", "https://git.test/one.git", str(work))
    assert outcome.code == 0, outcome
    assert (work / "a").read_bytes() == (tmp_path / "seed" / "a").read_bytes()
    _commit(work, "b", os.urandom(2 * 1024 * 1024))
    outcome = await run("git", "push", "-q", cwd=work)
    assert outcome.code != 0
    assert "403" in outcome.err
    assert not any("receive-pack" in one.target for one in shop.git.requests)

    with_entry(shop.gate, "git", verbs=frozenset(TEMPLATES["git"].verbs))
    outcome = await run("git", "push", "-q", cwd=work)
    assert outcome.code == 0, outcome
    assert _git(shop.repositories / "one.git", "rev-parse", "main") == _git(work, "rev-parse", "HEAD")
    assert all(one.values("authorization") == [f"Bearer {SECRET}"] for one in shop.git.requests)


@pytest.mark.tools
async def test_npm(shop: Shop, tmp_path: Path) -> None:
    assert not missing("npm"), "install it: apt-get install npm"
    quiet = ["--registry=https://npm.test/", "--no-audit", "--no-fund", "--no-update-notifier"]
    outcome = await shop.sandbox.run("npm", "view", "small-thing", "version", *quiet)
    assert (outcome.code, outcome.out.strip()) == (0, "1.0.0"), outcome
    project = tmp_path / "project"
    project.mkdir()
    (project / "package.json").write_text('{"name": "project", "version": "1.0.0"}')
    outcome = await shop.sandbox.run("npm", "install", "small-thing", *quiet, cwd=project)
    assert outcome.code == 0, outcome
    assert (project / "node_modules/small-thing/index.js").read_text() == "module.exports = 1\n"
    assert all(one.values("authorization") == [f"Bearer {SECRET}"] for one in shop.npm.requests)


async def test_pip(shop: Shop, tmp_path: Path) -> None:
    argv = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--no-cache-dir", "--disable-pip-version-check",
        "--retries=0", "--no-index", "--find-links=https://pip.test/links", f"--dest={tmp_path / 'wheels'}",
        "small-thing",
    ]  # fmt: skip
    outcome = await shop.sandbox.run(*argv)
    assert outcome.code == 0, outcome
    assert (tmp_path / "wheels" / WHEEL).read_bytes() == WHEEL_CONTENT
    assert all(one.values("authorization") == [f"Bearer {SECRET}"] for one in shop.pip.requests)


def _git(folder: Path, *argv: str) -> str:
    environment = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
    return subprocess.run(
        ["git", *argv], cwd=folder, check=True, capture_output=True, text=True, env=environment
    ).stdout.strip()


def _commit(folder: Path, name: str, content: bytes) -> None:
    (folder / name).write_bytes(content)
    _git(folder, "add", name)
    _git(folder, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-q", "-m", name)


def git_backend(repositories: Path, received: Received) -> bytes:
    """What git's own server says, by CGI (RFC 3875)."""
    path, _, query = received.target.partition("?")
    environment = {
        "PATH": os.environ["PATH"], "GIT_PROJECT_ROOT": str(repositories), "GIT_HTTP_EXPORT_ALL": "1",
        "REQUEST_METHOD": received.method, "PATH_INFO": path, "QUERY_STRING": query, "REMOTE_USER": "agent",
        "CONTENT_TYPE": "".join(received.values("content-type")), "CONTENT_LENGTH": str(len(received.body)),
        "HTTP_CONTENT_ENCODING": "".join(received.values("content-encoding")),
        "GIT_PROTOCOL": "".join(received.values("git-protocol")), "GIT_CONFIG_GLOBAL": os.devnull,
    }  # fmt: skip
    done = subprocess.run(
        ["git", "http-backend"], input=received.body, env=environment, capture_output=True, check=True
    )
    head, _, body = done.stdout.partition(b"\r\n\r\n")
    lines = head.split(b"\r\n")
    status = next((line[8:] for line in lines if line.startswith(b"Status: ")), b"200 OK")
    kept = [line for line in lines if not line.startswith(b"Status: ")]
    return b"\r\n".join([b"HTTP/1.1 " + status, *kept, b"Content-Length: %d" % len(body), b"", body])


def _package() -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, text in (
            ("package.json", '{"name": "small-thing", "version": "1.0.0", "main": "index.js"}'),
            ("index.js", "module.exports = 1\n"),
        ):
            entry = tarfile.TarInfo(f"package/{name}")
            entry.size = len(text)
            archive.addfile(entry, io.BytesIO(text.encode()))
    return packed.getvalue()


PACKAGE = _package()


def registry(received: Received) -> bytes:
    """As much of a registry as one package needs."""
    if received.target.endswith(".tgz"):
        body, kind = PACKAGE, b"application/octet-stream"
    else:
        integrity = "sha512-" + base64.b64encode(hashlib.sha512(PACKAGE).digest()).decode()
        dist = {"tarball": "https://npm.test/small-thing/-/small-thing-1.0.0.tgz", "integrity": integrity}
        version = {"name": "small-thing", "version": "1.0.0", "main": "index.js", "dist": dist}
        document = {
            "name": "small-thing", "dist-tags": {"latest": "1.0.0"}, "versions": {"1.0.0": version},
        }  # fmt: skip
        body, kind = json.dumps(document).encode(), b"application/json"
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)


def _wheel() -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        archive.writestr("small_thing.py", "one = 1\n")
        archive.writestr(
            "small_thing-1.0.0.dist-info/METADATA",
            "Metadata-Version: 2.1\nName: small-thing\nVersion: 1.0.0\n",
        )
        archive.writestr(
            "small_thing-1.0.0.dist-info/WHEEL",
            "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        )
        archive.writestr("small_thing-1.0.0.dist-info/RECORD", "")
    return packed.getvalue()


WHEEL, WHEEL_CONTENT = "small_thing-1.0.0-py3-none-any.whl", _wheel()


def index(received: Received) -> bytes:
    """As much of a page of links as one package needs. An index has paths that end with a slash, which no map has."""
    if received.target.startswith("/files/"):
        body, kind = WHEEL_CONTENT, b"application/octet-stream"
    else:
        body, kind = f'<a href="/files/{WHEEL}">{WHEEL}</a>'.encode(), b"text/html"
    return b"HTTP/1.1 200 OK\r\nContent-Type: %b\r\nContent-Length: %d\r\n\r\n%b" % (kind, len(body), body)
