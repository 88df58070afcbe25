"""A socket of a family that no network namespace bounds, or that speaks to the kernel."""

from __future__ import annotations

import socket

from tests.runner.probes.frame import given


def reach() -> str:
    socket.socket(given["family"], given["kind"], 0).close()
    return "made"
