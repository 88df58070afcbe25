"""Tests in the background or under nohup: their programs end by the signals that the tests ignore."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import os, signal, subprocess, sys
from tests.support.signals import handle_ignored
number = int(sys.argv[1])
signal.signal(number, signal.SIG_IGN)
handle_ignored()
os.kill(os.getpid(), number)  # it ignores the signal as before
print(subprocess.run([sys.executable, "-c", "import os, sys; os.kill(os.getpid(), int(sys.argv[1]))", sys.argv[1]],
    stderr=subprocess.DEVNULL).returncode)
"""


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT])
def test_program_of_a_test_ends_by_a_signal_that_the_test_ignores(number: signal.Signals) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(int(number))],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (ended.returncode, ended.stdout.strip()) == (0, str(-number)), ended.stderr
