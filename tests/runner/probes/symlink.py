"""A link in a mounted folder that leads to a file beside it."""

from __future__ import annotations

import os

from tests.runner.probes.frame import Blocked, canary, given


def reach() -> str:
    for link in ("link-absolute", "link-relative"):
        try:
            with open(os.path.join(given["mounted"], link)) as file:
                if canary in file.read():
                    return link
        except OSError:
            continue
    raise Blocked("it leads nowhere")
