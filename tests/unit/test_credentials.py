"""What an agent holds: typed by its kind, used by the usual libraries, wiped at the end, never renewed by itself."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jwt
import pytest

from ringfence.client.agent.credentials import (
    GatewayCredential,
    IssuedCredential,
    MysqlCredential,
    PostgresCredential,
    RedisCredential,
    Secret,
    SshCredential,
    TokenCredential,
    class_of,
    environment,
)
from ringfence.client.errors import CredentialOverError, CredentialUseError
from ringfence.kernel.crypto.keys import SigningKey
from ringfence.messages.credential import Delivery

CANARY = "a-canary-of-a-secret"


def issued(kind: str, value: str = CANARY, delivery: Delivery = "agent", left_s: int = 300) -> Any:
    named: dict[str, Any] = dict.fromkeys(
        ("request_id", "target", "task_id", "agent_id", "sponsor", "on_behalf_of"), "x"
    )
    return class_of(kind, delivery)(
        lease_id="lease-1", kind=kind, secret=Secret(value), token_type=None, scope=(), delivery=delivery,
        expires_at=int(time.time()) + left_s, **named,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "delivery", "is_a"),
    [
        ("jwt", "agent", TokenCredential),
        ("mysql", "agent", MysqlCredential),
        ("postgres", "agent", PostgresCredential),
        ("redis", "agent", RedisCredential),
        ("ssh", "agent", SshCredential),
        ("paper", "agent", IssuedCredential),
        ("jwt", "gateway", GatewayCredential),
        ("http", "gateway", GatewayCredential),
        ("paper", "gateway", GatewayCredential),
    ],
)
def test_credential_type_follows_its_kind(
    kind: str, delivery: Delivery, is_a: type[IssuedCredential]
) -> None:
    assert type(issued(kind, delivery=delivery)) is is_a


@pytest.mark.parametrize("kind", ["jwt", "postgres", "redis", "paper"])
def test_credential_value_is_hidden_in_repr(kind: str) -> None:
    credential = issued(kind)
    assert CANARY not in f"{credential!r} {credential} {credential.secret!r} {credential.secret}"


async def _asked(credential: IssuedCredential, answer: Callable[[httpx.Request], httpx.Response]) -> Any:
    transport = httpx.MockTransport(answer)
    async with httpx.AsyncClient(auth=credential.apply(), transport=transport) as http:
        return await http.get("https://api.example/x", follow_redirects=True)


async def test_httpx_takes_a_token() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        return httpx.Response(401)

    response = await _asked(issued("jwt"), answer)
    assert response.status_code == 401
    assert [request.headers["authorization"] for request in seen] == [f"Bearer {CANARY}"], "asked once"


async def test_a_token_does_not_follow_to_another_host() -> None:
    seen: list[httpx.Request] = []

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request)
        elsewhere = {"location": "https://elsewhere.example/x"}
        return httpx.Response(302, headers=elsewhere) if len(seen) == 1 else httpx.Response(200)

    await _asked(issued("jwt"), answer)
    assert [request.url.host for request in seen] == ["api.example", "elsewhere.example"]
    assert "authorization" not in seen[1].headers


async def test_a_request_after_the_end_is_not_sent() -> None:
    def never(request: httpx.Request) -> httpx.Response:
        raise AssertionError("it was sent")

    with pytest.raises(CredentialOverError, match="time of lease lease-1 is over"):
        await _asked(issued("jwt", left_s=0), never)
    wiped = issued("jwt")
    auth = wiped.apply()
    wiped.wipe()
    with pytest.raises(CredentialOverError, match="wiped"):
        async with httpx.AsyncClient(auth=auth, transport=httpx.MockTransport(never)) as http:
            await http.get("https://api.example/x")


@pytest.mark.parametrize("kind", ["postgres", "redis", "paper"])
def test_libraries_take_its_url(kind: str) -> None:
    assert issued(kind).apply() == CANARY
    with pytest.raises(CredentialOverError, match="ask for a new"):
        issued(kind, left_s=0).apply()


def test_ssh_has_its_files_for_as_long_as_the_block() -> None:
    value = {
        "url": "ssh://deploy@host.example:2222/",
        "host_keys": ["ssh-ed25519 AAAA"],
        "certificate": "cert",
    }
    credential = issued("ssh", json.dumps({**value, "private_key": CANARY}))
    with credential.apply() as ssh:
        assert ssh[:2] == ["ssh", "-F"]
        folder = Path(ssh[2]).parent
        assert (folder / "key").read_text() == CANARY
        assert {file.stat().st_mode & 0o777 for file in folder.iterdir()} == {0o600}
    assert not folder.exists()
    credential.wipe()
    with pytest.raises(CredentialOverError):
        credential.apply()


@pytest.mark.parametrize("kind", ["postgres", "redis", "ssh"])
def test_a_login_is_no_header(kind: str) -> None:
    with pytest.raises(CredentialUseError, match=r"apply\(\)"):
        issued(kind).headers()


@pytest.mark.parametrize("kind", ["jwt", "postgres", "redis", "paper"])
def test_credential_is_wiped_at_the_end_of_its_block(kind: str) -> None:
    with issued(kind) as credential:
        data = credential.secret._data
        assert credential.value == CANARY
    assert data == bytes(len(CANARY)), "overwritten, not only let go of"
    for use in (lambda: credential.value, credential.usable, lambda: environment(credential)):
        with pytest.raises(CredentialOverError):
            use()
    credential.wipe()
    assert CANARY not in repr(credential)


def test_credential_is_wiped_when_its_block_raises() -> None:
    credential = issued("jwt")
    with pytest.raises(RuntimeError), credential:
        raise RuntimeError
    assert credential.secret.wiped


def test_of_what_the_gateway_injects_the_agent_has_a_handle() -> None:
    credential = issued("http", "", "gateway")
    assert credential.handle == "lease-1"
    assert environment(credential) == {"RINGFENCE_LEASE": "lease-1"}
    for use in (lambda: credential.value, credential.headers):
        with pytest.raises(CredentialUseError, match="gateway"):
            use()
    with pytest.raises(CredentialOverError):
        issued("http", "", "gateway", left_s=0).apply()


async def test_httpx_shows_the_handle_with_a_proof_and_the_gateways_nonce() -> None:
    key = SigningKey.generate("spiffe://ringfence.local/agent/bot")
    credential = replace(issued("http", "", "gateway"), key=key)
    seen: list[tuple[str, str | None]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        proof = jwt.decode(request.headers["dpop"], options={"verify_signature": False})
        seen.append((request.headers["authorization"], proof.get("nonce")))
        wants = 'DPoP error="use_dpop_nonce"'
        again = httpx.Response(401, headers={"DPoP-Nonce": "n", "WWW-Authenticate": wants})
        return again if len(seen) == 1 else httpx.Response(200)

    assert (await _asked(credential, answer)).status_code == 200
    assert seen == [("DPoP lease-1", None), ("DPoP lease-1", "n")]
