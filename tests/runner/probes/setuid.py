"""A program with the set-user-id bit, owned by root, in a mounted folder."""

from __future__ import annotations

import os
import subprocess

from tests.runner.probes.frame import Blocked, given


def reach() -> str:
    program = os.path.join(given["mounted"], "setuid-cat")
    status = subprocess.run([program, "/proc/self/status"], capture_output=True, text=True).stdout
    capabilities = [line.split()[1] for line in status.splitlines() if line.startswith("CapEff")]
    if not capabilities:
        raise Blocked("it does not run")
    if int(capabilities[0], 16) == 0:
        raise Blocked("it runs, without a capability")
    return capabilities[0]
