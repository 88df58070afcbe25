"""One run by an ordinary user, as a program of its own. It imports `run_host` and nothing else of the tests."""

from __future__ import annotations

import asyncio
import json
import sys

from ringfence.runner.control.messages import relays_of
from tests.runner.run_host import run_host

PROGRAM = """
import os, socket
socket.create_connection(("build.test", 22)).close()
print(open("/proc/self/status").read().split("CapEff:")[1].split()[0], sorted(os.listdir("/run/ringfence/instance")))
raise SystemExit(5)
"""


async def main() -> None:
    async with run_host() as host:
        ended = await host.python(PROGRAM, relays=relays_of([("build.test", 22)]))
    json.dump([ended.code, ended.stdout.decode(), ended.stderr.decode()], sys.stdout)


if __name__ == "__main__":
    asyncio.run(main())
