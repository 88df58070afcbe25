"""The machine's control groups, opened for writing."""

from __future__ import annotations

import os

from tests.runner.probes.frame import Blocked


def reach() -> str:
    for folder, _, files in os.walk("/sys/fs/cgroup"):
        if "cgroup.procs" in files:
            try:
                os.close(os.open(os.path.join(folder, "cgroup.procs"), os.O_WRONLY))
                return folder
            except OSError:
                continue
    raise Blocked("none can be written")
