"""Settings of the kernel that start programs outside, opened for writing."""

from __future__ import annotations

import os


def reach() -> str:
    os.close(os.open("/proc/sys/kernel/core_pattern", os.O_WRONLY))
    return "core_pattern"
