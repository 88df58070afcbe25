"""More memory than it was given: 256 MB."""

from __future__ import annotations

import mmap


def reach() -> str:
    memory = mmap.mmap(-1, 256 << 20)
    for page in range(0, len(memory), 4096):
        memory[page] = 1
    return "256 MB"
