"""What a service makes of the process that it runs in."""

from __future__ import annotations

import subprocess
import sys

SERVICE = """
import resource
from types import SimpleNamespace

from ringfence.kernel.process import run

hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
resource.setrlimit(resource.RLIMIT_CORE, (hard, hard))


class Service:
    role = "policy"

    async def run(self, stop):
        print("core", *resource.getrlimit(resource.RLIMIT_CORE))


print("before", *resource.getrlimit(resource.RLIMIT_CORE))
run([Service()], SimpleNamespace(log_format="json", log_level="info"))
"""


ASKED_TWICE = """
import os, signal
from types import SimpleNamespace

from ringfence.kernel.process import run


class Service:
    role = "policy"

    async def run(self, stop):
        os.kill(os.getpid(), signal.SIGTERM)
        await stop.wait()


status = run([Service()], SimpleNamespace(log_format="json", log_level="info"))
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    os.kill(os.getpid(), number)
raise SystemExit(status)
"""


def test_who_is_told_to_stop_once_more_while_it_ends_has_ended_well() -> None:
    done = subprocess.run([sys.executable, "-c", ASKED_TWICE], check=False, capture_output=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_crash_leaves_no_copy_of_the_key() -> None:
    done = subprocess.run([sys.executable, "-c", SERVICE], check=True, capture_output=True, timeout=60)
    _, core = done.stdout.decode().splitlines()
    assert core.split()[:2] == ["core", "0"]
