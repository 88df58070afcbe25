"""The reviewer of the demo runs in a sandbox, where Ringfence is not installed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from ringfence.dev import reviewer


def test_reviewer_needs_nothing_but_python(tmp_path: Path) -> None:
    program = shutil.copy(reviewer.__file__, tmp_path)
    command = [sys.executable, "-I", "-S", program, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--checkout" in done.stdout
