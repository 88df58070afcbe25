"""More storage than it was given: 96 MB in one directory."""

from __future__ import annotations

import os

from tests.runner.probes.frame import Blocked, given


def reach() -> str:
    folders = ["/tmp", "/var/tmp", "/dev/shm", "/dev", "/run", "/", os.environ["HOME"]]
    if os.path.isdir(given["scratch"]):
        folders = [given["scratch"]]
    most = 0
    for folder in folders:
        path = os.path.join(folder, "probe-fill")
        written = 0
        try:
            with open(path, "wb") as file:
                while written < 96 << 20:
                    file.write(bytes(1 << 20))
                    file.flush()
                    written += 1 << 20
        except OSError:
            pass
        finally:
            if os.path.exists(path):
                os.unlink(path)
        most = max(most, written)
    if most < 96 << 20:
        raise Blocked(f"{most >> 20} MB at most")
    return "96 MB"
