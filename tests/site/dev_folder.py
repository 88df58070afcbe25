"""A folder in which `ringfence dev` runs, and the environment of a reader who types a page's commands there."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.mortal import mortal

PROGRAM = Path(sys.executable).with_name("ringfence")
WITHIN_S = 300


def inherited() -> dict[str, str]:
    """The environment without any setting of Ringfence, with its program on the path."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RINGFENCE_")}
    return kept | {"PATH": f"{PROGRAM.parent}:{kept['PATH']}"}


@contextmanager
def dev_running(folder: Path, *options: str, **environment: str) -> Iterator[Path]:
    """`ringfence dev` in a folder, as after `make dev` in a clone. `environment`: settings of its services."""
    log = folder / "dev.log"
    with log.open("wb") as out:
        dev = subprocess.Popen(
            mortal(str(PROGRAM), "dev", "--free-ports", *options), cwd=folder, env=inherited() | environment,
            stdout=out, stderr=out, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    try:
        over = time.monotonic() + WITHIN_S
        while dev.poll() is None and "Ctrl-C ends" not in log.read_text():
            assert time.monotonic() < over, log.read_text()
            time.sleep(0.1)
        assert dev.poll() is None, log.read_text()
        yield folder
    finally:
        dev.terminate()
        dev.wait(60)
