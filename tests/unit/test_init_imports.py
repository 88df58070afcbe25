"""A run waits for all that init imports before it starts the command."""

from __future__ import annotations

import subprocess
import sys

SLOW = ("asyncio", "http.client", "pydantic", "httpx")


def test_init_starts_a_command_without_slow_imports() -> None:
    program = f"import sys, ringfence.runner.init.main; print(*set({SLOW!r}) & set(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == ""
