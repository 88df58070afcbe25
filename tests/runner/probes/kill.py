"""A signal to a process outside."""

from __future__ import annotations

import os

from tests.runner.probes.frame import given


def reach() -> str:
    os.kill(given["victim"], 0)
    return "permitted"
