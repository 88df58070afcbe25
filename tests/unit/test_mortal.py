"""Processes of fixtures when pytest is killed before its teardown."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWNER = """
import subprocess, sys, time
from tests.support.mortal import mortal
subprocess.Popen(mortal(sys.executable, "-c", "import time; print('started', flush=True); time.sleep(600)"))
time.sleep(600)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about a signal of Linux")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_process_of_a_killed_owner_ends(number: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], cwd=ROOT, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"started\n"
        os.kill(owner.pid, number)
        # The end of the output: no process has it open any more.
        assert owner.stdout.read() == b""
        assert owner.wait() == -number
