"""Static secrets, against a server that insists on one: read by the gateway alone, replaced unnoticed."""

from __future__ import annotations

import base64
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from ringfence.backends import (
    AccessError,
    HttpBackend,
    StaticSecrets,
    TargetAccess,
    TargetRefusedError,
)
from ringfence.backends.target_settings import TargetSettingsError
from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.messages.registry import TargetState
from tests.backends.kinds import TARGET, allow, lease, state

FIRST, SECOND = "canary-the-first-key", "canary-the-second-key"


class Api:
    """An API that has heard of no leases: whoever has the key of the day may do everything."""

    def __init__(self) -> None:
        self.wanted: tuple[str, str] = ("Authorization", f"Bearer {FIRST}")
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                name, value = api.wanted
                self.send_response(200 if self.headers.get_all(name) == [value] else 401)
                self.end_headers()

            def log_message(self, format: str, *args: Any) -> None:
                """A server that writes down what it is told is no business of this test."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def api() -> Iterator[Api]:
    api = Api()
    yield api
    api.close()


class Source:
    """A file that only the gateway reads."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.write(FIRST)

    def write(self, secret: str) -> None:
        self.file.write_text(secret + "\n")
        self.file.chmod(0o600)

    def secrets(self) -> StaticSecrets:
        return StaticSecrets(TargetAccess({TARGET: f"file:{self.file}"}))


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path / "key")


def target(url: str = "https://api.example", **settings: Any) -> TargetState:
    return state("http", url=url, **settings).model_copy(update={"requests": TEMPLATES["http"].requests})


async def answers(url: str, headers: dict[str, str]) -> int:
    async with httpx.AsyncClient(timeout=30) as http:
        return (await http.get(url, headers=headers)).status_code


BASIC = base64.b64encode(f"ringfence:{FIRST}".encode()).decode()


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({}, ("Authorization", f"Bearer {FIRST}")),
        ({"auth": "bearer", "scheme": "token"}, ("Authorization", f"token {FIRST}")),
        ({"auth": "basic", "username": "ringfence"}, ("Authorization", f"Basic {BASIC}")),
        ({"auth": "header", "header": "X-Api-Key"}, ("X-Api-Key", FIRST)),
        ({"auth": "header", "header": "X-Auth", "scheme": "Key"}, ("X-Auth", f"Key {FIRST}")),
    ],
)
async def test_the_server_takes_what_the_gateway_injects(
    api: Api, source: Source, settings: dict[str, Any], wanted: tuple[str, str]
) -> None:
    api.wanted = wanted
    assert await answers(api.url, {}) == 401
    headers = await source.secrets().headers(target(api.url, **settings))
    assert len(headers) == 1
    assert await answers(api.url, headers) == 200


async def test_a_key_that_is_replaced_at_its_source_breaks_no_agent(api: Api, source: Source) -> None:
    """The lease lives on, and nobody starts anything again: the next request has the new key."""
    backend, secrets, at = HttpBackend(), source.secrets(), target(api.url)
    one = lease("http", allow("read", "path/**"), delivery="gateway")
    assert backend.problem(one, at) is None
    assert await answers(api.url, await secrets.headers(at)) == 200
    api.wanted = ("Authorization", f"Bearer {SECOND}")
    assert await answers(api.url, await secrets.headers(at)) == 401
    source.write(SECOND)
    assert await answers(api.url, await secrets.headers(at)) == 200
    assert backend.problem(one, at) is None


async def test_static_secret_is_never_made_and_never_handed_out(
    source: Source, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    backend, at = HttpBackend(), target()
    assert (backend.enforced_by, backend.revocability(at), backend.stateless) == (
        "gateway", "instant", True,
    )  # fmt: skip
    one = lease("http", allow("read", "path/**"))
    with pytest.raises(TargetRefusedError, match="never handed out"):
        await backend.mint(one, at)
    await backend.undo(one.lease_id, target_id=TARGET)
    assert await backend.existing(TARGET) == frozenset()
    assert not vars(backend), "it has nothing to tell"
    await source.secrets().headers(at)
    assert "canary" not in caplog.text


@pytest.mark.parametrize(
    "settings",
    [
        {"url": "http://api.example"},
        {"url": "https://user:secret@api.example"},
        {"url": "https://api.example/v1"},
        {"url": "https://api.example?x"},
        {"url": "ftp://api.example"},
        {"auth": "header"},
        {"header": "X-Api-Key"},
        {"auth": "basic"},
        {"username": "x"},
        {"auth": "basic", "username": "a:b"},
        {"auth": "basic", "username": "x", "scheme": "Basic"},
        {"auth": "header", "header": "X Api Key"},
        {"auth": "header", "header": "X-Api-Key:"},
        {"auth": "header", "header": "Host"},
        {"auth": "header", "header": "transfer-encoding"},
        {"auth": "query"},
        {"scheme": "a b"},
        {"secret": FIRST},
    ],
)
async def test_a_target_that_does_not_say_how_is_not_served(
    source: Source, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    at = target(**settings)
    assert "ask an operator" in (HttpBackend().problem(lease("http", allow("read", "path/**")), at) or "")
    with pytest.raises(TargetSettingsError):
        await source.secrets().headers(at)
    assert "canary" not in caplog.text


def test_a_target_without_a_map_lets_nothing_pass_and_says_so() -> None:
    bare = target().model_copy(update={"requests": ()})
    assert "which requests are which verb" in (
        HttpBackend().problem(lease("http", allow("read", "path/**")), bare) or ""
    )


@pytest.mark.parametrize(
    "secret", ["canary\r\nX-Admin: yes", "canary\x00", "canary\u2028x", "canarý", "canary\tx"]
)
async def test_a_secret_that_no_header_may_have_is_not_sent_and_not_told(source: Source, secret: str) -> None:
    source.write(secret)
    with pytest.raises(AccessError) as refused:
        await source.secrets().headers(target())
    assert "canar" not in str(refused.value)


async def test_a_source_that_has_nothing_is_said(source: Source) -> None:
    source.file.unlink()
    with pytest.raises(AccessError, match="cannot read"):
        await source.secrets().headers(target())
    with pytest.raises(AccessError, match="RINGFENCE_BACKENDS_ACCESS"):
        await StaticSecrets(TargetAccess({})).headers(target())
