"""Services start in an environment that has none of the extras: `make demo` has one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ringfence.messages.base import SERVICE_ROLES

BLOCKED = """
import sys

sys.modules["opentelemetry"] = None  # so that importing it fails
import ringfence.{role}.app
"""


@pytest.mark.parametrize("role", [role for role in SERVICE_ROLES if role not in ("runner", "console")])
def test_a_service_needs_no_extra_of_others(role: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED.format(role=role)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
