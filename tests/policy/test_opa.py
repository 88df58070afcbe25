"""OPA over HTTP: whatever it does instead of answering, by the very bundle that is known here, denies."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from ringfence.dev.processes import free_port
from ringfence.kernel.base.settings import load
from ringfence.rego.bundle import OWN_BUNDLE, Bundle, BundleError
from ringfence.rego.embedded import EmbeddedEngine
from ringfence.rego.engine import (
    PolicyFailedError,
    PolicyTimeoutError,
    PolicyUnavailableError,
)
from ringfence.rego.opa import MAX_ANSWER_BYTES, OpaEngine
from ringfence.rego.settings import OpaSettings
from tests.policy.bundles import ALLOWS, made
from tests.policy.cases import GOOD
from tests.policy.conftest import TIMEOUT_MS
from tests.policy.opa_server import running_opa

RESULT = {"allow": True, "deny": [], "approvals": [], "max_ttl_s": 60}
INPUT = orjson.dumps(GOOD)

Answering = Callable[[asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def misbehaving(answer: Answering) -> AsyncIterator[str]:
    """A server at which every request comes to `answer`: what no real OPA can be made to do."""
    serving: set[asyncio.Task[None]] = set()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        serving.add(task)
        try:
            await reader.readuntil(b"\r\n\r\n")
            await answer(writer)
        except (asyncio.IncompleteReadError, asyncio.CancelledError, ConnectionError):
            pass
        finally:
            serving.discard(task)
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            for task in serving:
                task.cancel()
            await asyncio.gather(*serving)


def saying(body: bytes, status: int = 200, more: str = "") -> Answering:
    async def answer(writer: asyncio.StreamWriter) -> None:
        head = f"HTTP/1.1 {status} x\r\n{more}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()

    return answer


def answered(revision: Any, result: Any = RESULT, **more: Any) -> bytes:
    bundles = {"policy": {"revision": revision}}
    return orjson.dumps({"provenance": {"version": "1", "bundles": bundles}, "result": result, **more})


async def failure(url: str, bundle: Bundle, timeout_ms: int = TIMEOUT_MS) -> PolicyFailedError:
    engine = OpaEngine(url, bundle, timeout_ms=timeout_ms)
    try:
        with pytest.raises(PolicyFailedError) as caught:
            await engine.evaluate(INPUT)
    finally:
        await engine.close()
    return caught.value


async def test_an_honest_answer_counts(bundle: Bundle):
    async with misbehaving(saying(answered(bundle.revision))) as url:
        engine = OpaEngine(url, bundle, timeout_ms=TIMEOUT_MS)
        answer = await engine.evaluate(INPUT)
        await engine.close()
    assert (answer.revision, answer.result.allow, answer.result.max_ttl_s) == (bundle.revision, True, 60)


@pytest.mark.parametrize(
    ("document", "code"),
    [
        (b"", "policy_invalid"),
        (b"<html>", "policy_invalid"),
        (b"[]", "policy_invalid"),
        (b"{}", "policy_unavailable"),
        (orjson.dumps({"result": RESULT}), "policy_unavailable"),
        (orjson.dumps({"result": RESULT, "provenance": {"bundles": []}}), "policy_unavailable"),
        (orjson.dumps({"result": RESULT, "provenance": {"bundles": {}}}), "policy_unavailable"),
        (answered("another"), "policy_unavailable"),
        (answered(""), "policy_unavailable"),
        (answered(None), "policy_unavailable"),
        (answered(["OURS"]), "policy_unavailable"),
        (
            orjson.dumps(
                {
                    "result": RESULT,
                    "provenance": {"bundles": {"a": {"revision": "OURS"}, "b": {"revision": "OURS"}}},
                }
            ),
            "policy_unavailable",
        ),
        (answered("OURS", None), "policy_invalid"),
        (answered("OURS", True), "policy_invalid"),
        (answered("OURS", {**RESULT, "allow": "true"}), "policy_invalid"),
        (answered("OURS", {**RESULT, "approvals": ["boss"]}), "policy_invalid"),
        (answered("OURS", {**RESULT, "only_once": True}), "policy_invalid"),
        (answered("OURS", more="x" * MAX_ANSWER_BYTES), "policy_unavailable"),
    ],
    ids=lambda value: str(value)[:50],
)
async def test_invalid_opa_response_denies(bundle: Bundle, document: bytes, code: str):
    body = document.replace(b"OURS", bundle.revision.encode())
    async with misbehaving(saying(body)) as url:
        assert (await failure(url, bundle)).code == code


@pytest.mark.parametrize(
    ("status", "body", "code"),
    [
        (500, b'{"code": "internal_error", "message": "eval_conflict_error"}', "policy_invalid"),
        (500, b"", "policy_unavailable"),
        (400, b'{"message": "no"}', "policy_unavailable"),
        (401, b"", "policy_unavailable"),
        (404, b"", "policy_unavailable"),
        (503, b'{"message": "later"}', "policy_unavailable"),
        (302, b"", "policy_unavailable"),
    ],
)
async def test_another_status_denies(bundle: Bundle, status: int, body: bytes, code: str):
    async with (
        misbehaving(saying(answered(bundle.revision))) as honest,
        misbehaving(saying(body, status, f"Location: {honest}/\r\n")) as url,
    ):
        assert (await failure(url, bundle)).code == code


async def test_unreachable_opa_denies(bundle: Bundle):
    error = await failure(f"http://127.0.0.1:{free_port()}", bundle)
    assert isinstance(error, PolicyUnavailableError)


async def test_hanging_opa_denies(bundle: Bundle):
    async def hang(_: asyncio.StreamWriter) -> None:
        await asyncio.Event().wait()

    async with misbehaving(hang) as url:
        assert isinstance(await failure(url, bundle, 100), PolicyTimeoutError)


async def test_dripping_opa_response_denies(bundle: Bundle):
    """Each byte comes in time, and the whole does not."""

    async def drip(writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while True:
            writer.write(b" ")
            await writer.drain()
            await asyncio.sleep(0.01)

    async with misbehaving(drip) as url:
        assert isinstance(await failure(url, bundle, 200), PolicyTimeoutError)


async def test_closed_opa_connection_denies(bundle: Bundle):
    async def hang_up(writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with misbehaving(hang_up) as url:
        assert isinstance(await failure(url, bundle), PolicyUnavailableError)


async def test_a_proxy_of_the_environment_is_not_asked(bundle: Bundle, monkeypatch: pytest.MonkeyPatch):
    async with misbehaving(saying(answered(bundle.revision))) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy)
        monkeypatch.setenv("ALL_PROXY", proxy)
        error = await failure(f"http://127.0.0.1:{free_port()}", bundle)
    assert isinstance(error, PolicyUnavailableError)


@pytest.mark.parametrize("url", ["127.0.0.1:8181", "ftp://x", "http://", "http://x?y=1"])
def test_invalid_opa_url_is_refused_at_start(monkeypatch: pytest.MonkeyPatch, url: str):
    monkeypatch.setenv("RINGFENCE_OPA_URL", url)
    with pytest.raises(Exception, match="RINGFENCE_OPA_URL"):
        load(OpaSettings)


async def test_a_connection_that_the_server_closed_meanwhile_is_opened_again(bundle: Bundle):
    body = answered(bundle.revision)
    served: list[int] = []

    async def twice_then_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        served.append(0)
        for _ in range(2):
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                break
            length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
            await reader.readexactly(length)
            served[-1] += 1
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(twice_then_close, "127.0.0.1", 0)
    async with server:
        engine = OpaEngine(
            f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", bundle, timeout_ms=TIMEOUT_MS
        )
        for _ in range(5):
            assert (await engine.evaluate(INPUT)).result.allow
        await engine.close()
    assert served == [2, 2, 1]


async def test_after_a_time_out_the_server_is_told_and_the_next_is_answered(bundle: Bundle):
    """The connection is closed, by which OPA ends the evaluation; the next request has one of its own."""
    hung_up = asyncio.Event()
    body = answered(bundle.revision)
    connections = 0

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await reader.readuntil(b"\r\n\r\n")
        if connections > 1:
            writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)
        try:
            while await reader.read(2**16):
                pass
        except ConnectionError:
            pass
        hung_up.set()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        engine = OpaEngine(url, bundle, timeout_ms=2000, connections=1)
        with pytest.raises(PolicyTimeoutError):
            await engine.evaluate(INPUT)
        async with asyncio.timeout(60):
            await hung_up.wait()
        assert (await engine.evaluate(INPUT)).result.allow
        await engine.close()


@pytest.fixture
def loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that exists once any process that starts here has loaded the module of the embedded engine."""
    loaded = tmp_path / "loaded"
    (tmp_path / "regorus.py").write_text(f"open({str(loaded)!r}, 'w').close()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return loaded


async def test_embedded_engine_is_not_loaded_with_opa(bundle: Bundle, loads: Path):
    services = "import ringfence.policy.app, ringfence.gateway.app"
    done = await asyncio.to_thread(subprocess.run, [sys.executable, "-c", services], check=False)
    assert done.returncode == 0
    async with misbehaving(saying(answered(bundle.revision))) as url:
        engine = OpaEngine(url, bundle, timeout_ms=TIMEOUT_MS)
        await engine.start()
        await engine.use(bundle)
        assert (await engine.evaluate(INPUT)).result.allow
        await engine.close()
    assert not loads.exists()


async def test_the_embedded_engine_loads_the_wheel_in_its_worker(bundle: Bundle, loads: Path):
    with pytest.raises(BundleError):
        await EmbeddedEngine(bundle, timeout_ms=TIMEOUT_MS).start()
    assert loads.exists()


# --- with a real OPA ---


@pytest.mark.opa
async def test_opa_with_another_bundle_denies(opa: Path, opa_url: str, bundle: Bundle, tmp_path: Path):
    other = made(tmp_path / "other", ALLOWS)
    engine = OpaEngine(opa_url, bundle, timeout_ms=TIMEOUT_MS)
    try:
        assert (await engine.evaluate(INPUT)).revision == bundle.revision
        await engine.use(other)  # here it came into force, and OPA has not heard of it
        with pytest.raises(PolicyUnavailableError, match=other.revision):
            await engine.evaluate(INPUT)
    finally:
        await engine.close()
    with running_opa(opa, tmp_path, other) as url:
        engine = OpaEngine(url, other, timeout_ms=TIMEOUT_MS)
        assert (await engine.evaluate(INPUT)).result.max_ttl_s == 60
        await engine.close()


@pytest.mark.opa
async def test_opa_without_a_bundle_denies(opa: Path, bundle: Bundle, tmp_path: Path):
    with running_opa(opa, tmp_path) as url:
        async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
            for name, text in bundle.modules:
                assert (await http.put(f"{url}/v1/policies/{name}", content=text)).is_success
        error = await failure(url, bundle)
    assert isinstance(error, PolicyUnavailableError)
    assert "of no revision" in str(error)


@pytest.mark.opa
async def test_rules_cannot_be_added_to_the_bundle_of_opa(opa_url: str, bundle: Bundle):
    more = "package ringfence.identity\n\nagent_active if true\n"
    async with httpx.AsyncClient(timeout=30, trust_env=False) as http:
        refused = await http.put(f"{opa_url}/v1/policies/more", content=more)
    assert refused.status_code == 400
    assert "bundle" in refused.text


@pytest.mark.opa
async def test_an_evaluation_that_fails_in_opa_denies(opa: Path, tmp_path: Path):
    conflict = made(tmp_path / "conflict", "decision := input.a\n\ndecision := input.b\n")
    with running_opa(opa, tmp_path, conflict) as url:
        engine = OpaEngine(url, conflict, timeout_ms=TIMEOUT_MS)
        with pytest.raises(PolicyFailedError, match="500") as caught:
            await engine.evaluate(b'{"a": 1, "b": 2}')
        await engine.close()
    assert caught.value.code == "policy_invalid"


@pytest.mark.opa
@pytest.mark.parametrize(
    "command",
    [("check", "--strict"), ("test",), ("fmt", "--list", "--fail")],
    ids=lambda command: command[0],
)
def test_opa_check_test_and_format_pass(opa: Path, command: tuple[str, ...]):
    done = subprocess.run([opa, *command, OWN_BUNDLE.resolve()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
