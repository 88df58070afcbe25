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


def test_a_crash_leaves_no_copy_of_the_key() -> None:
    done = subprocess.run([sys.executable, "-c", SERVICE], check=True, capture_output=True, timeout=60)
    _, core = done.stdout.decode().splitlines()
    assert core.split()[:2] == ["core", "0"]
