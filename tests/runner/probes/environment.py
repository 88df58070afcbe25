"""A credential in the environment that it was started with."""

from __future__ import annotations

import os

from tests.runner.probes.frame import Blocked, canary


def reach() -> str:
    for name, value in os.environ.items():
        if canary in value:
            return name
    raise Blocked("no variable holds it")
