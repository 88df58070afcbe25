"""Tokens for Kafka: where they come from, when they are renewed, and what is said where there is none."""

from __future__ import annotations

import asyncio
import base64
import logging
import re
import shlex
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from ringfence.kernel.base.settings import BusSettings
from ringfence.kernel.kafka import oauth
from ringfence.kernel.kafka.oauth import TokenError, TokenProvider, provider_of
from ringfence.testing.clock import MovableClock
from tests.brokers.secured import Authority
from tests.support.oidc_tokens import TokenIssuer
from tests.support.token_endpoint import TokenEndpoint, private

SECRET = "s3cret+of/the client"
ISSUER = TokenIssuer("https://issuer.test", "ES256")


def signed(ends_in_s: float = 600, **more: Any) -> str:
    claims = ISSUER.claims("kafka", **more)
    return ISSUER.token({**claims, "exp": int(time.time() + ends_in_s)})


def settings(source: str, **fields: Any) -> BusSettings:
    return BusSettings(
        kafka_security_protocol="SASL_SSL",
        kafka_sasl_mechanism="OAUTHBEARER",
        kafka_sasl_token_source=source,
        **fields,
    )


def command(text: str) -> BusSettings:
    """Settings of a command that runs a line of Python."""
    return settings(f"exec:{shlex.join([sys.executable, '-c', text])}")


@pytest.fixture
async def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[TokenEndpoint]:
    monkeypatch.setenv("CLIENT_SECRET", SECRET)
    made = TokenEndpoint(lambda: (200, {"access_token": signed(), "token_type": "Bearer", "expires_in": 600}))
    async with made.serve(Authority(tmp_path)):
        yield made


def credentials(endpoint: TokenEndpoint, tmp_path: Path, **fields: Any) -> BusSettings:
    known: dict[str, Any] = {
        "kafka_sasl_username": "rf:policy",
        "kafka_sasl_password": "env:CLIENT_SECRET",
        "kafka_sasl_scope": "kafka.all",
        "kafka_sasl_ca_file": tmp_path / "authority.pem",
    }
    return settings(endpoint.url, **{**known, **fields})


async def refused(provider: TokenProvider) -> str:
    with pytest.raises(TokenError) as error:
        await provider.token()
    return str(error.value)


async def test_client_credentials_are_sent_once_for_all_clients(
    endpoint: TokenEndpoint, tmp_path: Path
) -> None:
    provider = provider_of(credentials(endpoint, tmp_path))
    assert provider is provider_of(credentials(endpoint, tmp_path))
    assert provider is not provider_of(credentials(endpoint, tmp_path, kafka_sasl_scope="other"))
    tokens = await asyncio.gather(*(provider.token() for _ in range(20)))
    assert len(set(tokens)) == 1
    (request,) = endpoint.requests
    # RFC 6749, 2.3.1: both are form-encoded before they are joined.
    basic = base64.b64encode(b"rf%3Apolicy:s3cret%2Bof%2Fthe+client").decode()
    assert f"authorization: basic {basic}".lower() in request.lower()
    assert request.endswith("grant_type=client_credentials&scope=kafka.all")


async def test_token_is_renewed_before_its_end_and_kept_while_that_fails(
    endpoint: TokenEndpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock = MovableClock()
    provider = TokenProvider(credentials(endpoint, tmp_path), clock)
    first = await provider.token()
    clock.advance(400)
    assert await provider.token() == first
    works, endpoint.answer = endpoint.answer, lambda: (500, {})
    clock.advance(50)
    for _ in range(5):
        assert await provider.token() == first, "it is good for 150 s more"
    assert len(endpoint.requests) == 2, "the source is not asked again at once"
    assert "not renewed yet, trying again" in caplog.text
    clock.advance(160)
    assert "answered 500" in await refused(provider)
    clock.advance(11)
    endpoint.answer = works
    assert await provider.token()
    assert len(endpoint.requests) == 4


@pytest.mark.parametrize(
    ("status", "answer", "says"),
    [
        (401, {"error": "invalid_client"}, r"answered 401 \(invalid_client\); see RINGFENCE_KAFKA_SASL_USERNAME"),
        (400, {"error": "invalid_scope", "error_description": SECRET}, r"400 \(invalid_scope\).*_SASL_SCOPE"),
        (400, {"error": SECRET}, "answered 400; see RINGFENCE_KAFKA_SASL_USERNAME"),
        (500, {}, "answered 500; see its own log"),
        (302, {}, "answered 302"),
        (200, {}, "without an access_token"),
        (200, {"access_token": "t0ken\x01auth=Bearer other"}, "no bearer token"),
        (200, {"access_token": "t0ken", "expires_in": 0}, "has expired"),
        (200, {"access_token": "t0ken" * 20_000}, "no bearer token"),
    ],
)  # fmt: skip
async def test_unusable_answer_of_the_endpoint_is_named_without_secrets(
    endpoint: TokenEndpoint, tmp_path: Path, status: int, answer: dict[str, Any], says: str,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    caplog.set_level(logging.DEBUG)
    endpoint.answer = lambda: (status, answer)
    provider = TokenProvider(credentials(endpoint, tmp_path))
    said = await refused(provider)
    assert re.search(says, said), said
    assert endpoint.url in said
    for text in (said, caplog.text, repr(provider), repr(vars(provider))):
        assert SECRET not in text
        assert "t0ken" not in text


async def test_endpoint_that_answers_late_or_not_at_all_is_named(
    endpoint: TokenEndpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth, "WITHIN_S", 0.3)
    endpoint.delay_s = 1
    assert "within 0.3 s" in await refused(TokenProvider(credentials(endpoint, tmp_path)))
    gone = settings(
        "https://127.0.0.1:1/token", kafka_sasl_username="a", kafka_sasl_password="env:CLIENT_SECRET"
    )
    assert "does not answer (ConnectError" in await refused(TokenProvider(gone))
    unknown = credentials(endpoint, tmp_path, kafka_sasl_ca_file=None)
    assert "CERTIFICATE_VERIFY_FAILED" in await refused(TokenProvider(unknown))
    missing = credentials(endpoint, tmp_path, kafka_sasl_ca_file=tmp_path / "none.pem")
    assert "none.pem holds no certificate" in await refused(TokenProvider(missing))
    no_secret = credentials(endpoint, tmp_path, kafka_sasl_password="env:NOT_SET")
    assert "NOT_SET is not set" in await refused(TokenProvider(no_secret))


async def test_file_is_read_again_for_each_sign_in(tmp_path: Path) -> None:
    file = private(tmp_path / "token", signed(jti="1"))
    provider = TokenProvider(settings(f"file:{file}"))
    assert await provider.token() == file.read_text()
    private(file, signed(jti="2"))
    assert await provider.token() == file.read_text()


@pytest.mark.parametrize("what", ["missing", "open", "empty", "expired"])
async def test_unusable_file_is_named_and_read_again_once_mended(tmp_path: Path, what: str) -> None:
    file, clock = tmp_path / "token", MovableClock()
    if what != "missing":
        private(file, "" if what == "empty" else signed(-1 if what == "expired" else 60))
    if what == "open":
        file.chmod(0o644)
    provider = TokenProvider(settings(f"file:{file}"), clock)
    said = await refused(provider)
    remedy = {"missing": "cannot read", "open": "chmod 600", "empty": "is empty"}
    assert remedy.get(what, "has expired; see what renews it") in said
    assert str(file) in said
    assert ISSUER.token({}).split(".")[0] not in said
    private(file, signed(60))
    clock.advance(1)
    assert await provider.token() == file.read_text()


async def test_command_gives_a_token_without_a_shell(tmp_path: Path) -> None:
    provider = TokenProvider(command("import sys; print('$HOME' and 'opaque.token-1')"))
    assert await provider.token() == "opaque.token-1"
    counted = command(
        f"import pathlib; p = pathlib.Path({str(tmp_path / 'n')!r}); n = p.exists() and p.read_text() or '0'; "
        "p.write_text(str(int(n) + 1)); print('opaque' + n)"
    )
    provider = TokenProvider(counted)
    assert [await provider.token(), await provider.token()] == ["opaque0", "opaque1"], (
        "their end is not known"
    )
    echo = tmp_path / "echo.sh"
    echo.write_text('#!/bin/sh\necho "$1" | tr -d "; "\n')
    echo.chmod(0o700)
    assert await TokenProvider(settings(f"exec:{echo} 'a; b'")).token() == "ab"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("import sys; print('t0ken'); sys.exit('t0ken')", "ended with status 1; run it by hand"),
        ("pass", "printed nothing; run it by hand"),
        ("print('t0ken is', 'this')", "no bearer token"),
        ("print('t0ken' * 100_000)", "no bearer token"),
    ],
)
async def test_unusable_command_is_named_without_what_it_printed(
    text: str, says: str, capfd: pytest.CaptureFixture[str]
) -> None:
    said = await refused(TokenProvider(command(text)))
    assert says in said
    assert f"the command {sys.executable} " in said
    assert "t0ken" not in said + "".join(capfd.readouterr())


async def test_command_that_prints_no_token_in_time_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oauth, "WITHIN_S", 2.0)
    line = f"import os, pathlib, time; pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))"
    said = await refused(TokenProvider(command(f"{line}; print('t0ken', flush=True); time.sleep(60)")))
    assert "no token within 2 s" in said
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


async def test_command_that_is_missing_is_named() -> None:
    assert "no-such-program is not there; give its absolute path" in await refused(
        TokenProvider(settings("exec:no-such-program --audience kafka"))
    )
    assert "is not there" in await refused(TokenProvider(settings("exec:./print-token")))
