"""Why a runner refuses an order, a sandbox or a message of its init, a row for each code."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from ringfence.cli.commands.mcp import _refuse_static_keys
from ringfence.messages.codes import Code
from ringfence.messages.registry import TargetRecord
from ringfence.runner.control.messages import EnrolMessage, decode, relays_of
from ringfence.runner.init.command import init_command
from ringfence.runner.lifecycle.plan import make_backend
from ringfence.runner.sandbox.backend import SandboxSpec
from ringfence.runner.stdio_mcp.wrap import _endpoint
from tests.support.verdicts import refusal_code
from tools.schemas.examples import EXAMPLES

EXAMPLE: Final = EXAMPLES[TargetRecord]
assert isinstance(EXAMPLE, TargetRecord)
TARGET: Final = EXAMPLE.state

REFUSALS: Final[dict[Code, Callable[[], object]]] = {
    Code.CONTROL_MESSAGE_INVALID: lambda: decode(b"{}\n", EnrolMessage),
    Code.RELAY_INVALID: lambda: relays_of([("staging.example", 0)]),
    Code.INIT_UNAVAILABLE: lambda: init_command("other"),
    Code.RUN_REFUSED: lambda: make_backend("other", Path("/nonexistent")),
    Code.NOT_STDIO: lambda: _endpoint(TARGET),
    Code.STATIC_KEY: lambda: _refuse_static_keys({"GITHUB_TOKEN": "ghp_" + secrets.token_hex(18)}, []),
    Code.SANDBOX_SPEC_INVALID: lambda: SandboxSpec("run-1", ()),
}


@pytest.mark.parametrize(("code", "ask"), REFUSALS.items(), ids=REFUSALS)
def test_run_is_refused(code: Code, ask: Callable[[], object]) -> None:
    assert refusal_code(ask) == code


def test_the_run_without_the_change_is_accepted() -> None:
    assert relays_of([("staging.example", 443)])
    assert init_command("oci").argv
    assert SandboxSpec("run-1", ("true",)).argv
