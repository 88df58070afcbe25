"""What `ringfence request` prints about a lease whose credential is at the gateway."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path
from typing import Any

import pytest

from ringfence.cli.commands.request import _use_lines
from ringfence.client.agent.credentials import GatewayCredential, Secret
from ringfence.client.settings import ClientSettings

LEASE, TASK = "0f7b6f44-8f0e-5c0e-9a10-6b1b3f2f7c11", "c1a5e0a2-4b0f-5d9e-8f4e-0a7a5e1d9f10"
CREDENTIAL = GatewayCredential(
    lease_id=LEASE, request_id=LEASE, kind="jwt", secret=Secret(""), token_type=None, expires_at=0, target="platform",
    scope=(), task_id=TASK, agent_id="bot", sponsor="sam", on_behalf_of="uma", delivery="gateway",
)  # fmt: skip


def printed(**settings: Any) -> list[str]:
    return list(_use_lines(CREDENTIAL, ClientSettings(**settings), Path("my-bot.json")))


def python_in(lines: list[str]) -> ast.Module:
    begin = next(number for number, line in enumerate(lines) if line.startswith("  httpx."))
    return ast.parse("\n".join([line for line in lines[begin:] if line.startswith("  ")]).strip())


@pytest.mark.parametrize(
    "settings",
    [{"gateway_sockets": Path(".ringfence/tasks")}, {"door": f"unix:.ringfence/tasks/{TASK}.sock"}],
)
def test_request_with_socket_prints_commands_to_paste(settings: dict[str, Any]) -> None:
    lines = printed(**settings)
    assert max(map(len, lines)) <= 80
    begin = next(number for number, line in enumerate(lines) if line.startswith("  curl"))
    assert shlex.split("\n".join(lines[begin : begin + 4]).replace("\\\n", "")) == [
        "curl", "--unix-socket", f".ringfence/tasks/{TASK}.sock", "-H", f"Authorization: DPoP {LEASE}",
        "http://gateway/platform/PATH",
    ]  # fmt: skip
    assert f"DPoP {LEASE}" in ast.unparse(python_in(lines))


def test_request_with_gateway_url_prints_the_line_for_httpx() -> None:
    lines = printed(door="http://127.0.0.1:8707")
    assert max(map(len, lines)) <= 80
    code = ast.unparse(python_in(lines))
    assert "http://127.0.0.1:8707/platform/PATH" in code
    assert f"DpopAuth('{LEASE}', SigningKey.load('my-bot.json'))" in code


def test_request_without_gateway_address_names_the_settings() -> None:
    lines = printed()
    assert max(map(len, lines)) <= 80
    assert any("RINGFENCE_GATEWAY_SOCKETS" in line for line in lines)
    assert any("RINGFENCE_DOOR" in line for line in lines)
