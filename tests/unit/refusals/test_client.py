"""Why the SDK refuses a call or a file, and a resource server a request, a row for each code."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from ringfence.backends.http import FAILURES_TO_OPEN, CircuitBreaker
from ringfence.backends.jwt import TokenKey
from ringfence.backends.secret_sources import LocalSource
from ringfence.backends.target_settings import TargetError, TargetRefusedError
from ringfence.client.admin.trust_setup import TrustFolder, load_root_and_bundle
from ringfence.client.agent.credentials import PostgresCredential, Secret
from ringfence.client.arguments import texts
from ringfence.client.connection import subject
from ringfence.client.exports import resume
from ringfence.client.instance_enrolment import TokenFile
from ringfence.client.resource_server.challenges import read_presented_token
from ringfence.client.resource_server.verifier import TokenVerifier
from ringfence.client.settings import ClientSettings
from ringfence.client.task_proxy.server import TaskProxy
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.kernel.http1.head import parse_request
from ringfence.messages.codes import Code
from tests.support.verdicts import refusal_code

MISSING: Final = Path("/nonexistent/ringfence")
ISSUER_URL: Final = "https://issuer.acme.example"
USER_KEY: Final = SigningKey.generate("spiffe://acme.example/user/sam")
BEARER: Final = ("Authorization", "Bearer x")


def credential(*, left_s: int = 300) -> PostgresCredential:
    named: dict[str, Any] = dict.fromkeys(
        ("request_id", "target", "task_id", "agent_id", "sponsor", "on_behalf_of"), "x"
    )
    return PostgresCredential(
        lease_id="lease-1", kind="postgres", secret=Secret("x"), token_type=None, scope=(), delivery="agent",
        expires_at=2**40 if left_s > 0 else 0, **named,
    )  # fmt: skip


async def fails(calls: int, error: Exception) -> None:
    """Make the last of so many calls of a target, all of which fail. Raises what the circuit breaker raises."""

    async def work() -> None:
        raise error

    breaker = CircuitBreaker(concurrency=1, deadline_s=1, longest_shut_s=60)
    for _ in range(calls - 1):
        with contextlib.suppress(TargetError):
            await breaker.call("staging", work)
    await breaker.call("staging", work)


REFUSALS: Final[dict[Code, Callable[[], object]]] = {
    Code.CALL_INVALID: lambda: texts("verbs", "read"),
    Code.IDENTITY_WRONG: lambda: subject(USER_KEY, "agent", ClientSettings(trust_domain="acme.example")),
    Code.CREDENTIAL_OVER: lambda: credential(left_s=0).usable(),
    Code.CREDENTIAL_USE: lambda: credential().auth(),
    Code.CEREMONY_FAILED: lambda: load_root_and_bundle(TrustFolder(MISSING)),
    Code.EXPORT_FILES: lambda: resume(MISSING),
    Code.NO_PLATFORM_TOKEN: lambda: asyncio.run(TokenFile(MISSING).token("here")),
    # Resource servers
    Code.TOKEN_MISSING: lambda: read_presented_token([]),
    Code.INVALID_REQUEST: lambda: read_presented_token([BEARER, BEARER]),
    Code.INVALID_TOKEN: lambda: asyncio.run(TokenVerifier(ISSUER_URL, "acme.example").verify_header(None)),
    Code.PROXY_AUTHORIZATION_MISSING: lambda: TaskProxy(MISSING)._authenticate(
        parse_request(b"GET / HTTP/1.1\r\nHost: x\r\n")
    ),
    # Backends
    Code.TARGET_UNAVAILABLE: lambda: asyncio.run(fails(1, TimeoutError())),
    Code.TARGET_REFUSED: lambda: asyncio.run(fails(1, TargetRefusedError("no such role"))),
    Code.TARGET_SHUT: lambda: asyncio.run(fails(FAILURES_TO_OPEN + 1, TimeoutError())),
    Code.ACCESS_MISSING: lambda: LocalSource("env").at_hand("RINGFENCE_TEST_NOT_SET", "the password"),
    Code.TOKEN_KEY_INVALID: lambda: TokenKey(
        SigningKey.generate("spiffe://acme.example/service/issuer", "EdDSA")
    ),
}


@pytest.mark.parametrize(("code", "ask"), REFUSALS.items(), ids=REFUSALS)
def test_call_is_refused(code: Code, ask: Callable[[], object]) -> None:
    assert refusal_code(ask) == code


def test_the_call_without_the_change_is_accepted() -> None:
    assert texts("verbs", ["read"]) == ("read",)
    assert credential().value
    assert read_presented_token([BEARER]).token == "x"
