"""Files that identify the machine or hold passwords."""

from __future__ import annotations

from tests.runner.probes.frame import Blocked, given


def reach() -> str:
    for path in ("/etc/shadow", "/etc/machine-id", "/etc/ssh/ssh_host_ed25519_key", given["secret_file"]):
        try:
            with open(path) as file:
                if file.read().strip():
                    return path
        except OSError:
            continue
    raise Blocked("none is there")
