"""More processes than it was given: 150."""

from __future__ import annotations

import os
import time


def reach() -> str:
    children = []
    try:
        for _ in range(150):
            child = os.fork()
            if child == 0:
                time.sleep(60)
                os._exit(0)
            children.append(child)
        return f"{len(children)} processes"
    finally:
        for child in children:
            os.kill(child, 9)
