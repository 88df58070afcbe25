"""The gateway as a process: its core and its data plane, which listens on the port of loopback that is named.

python -m tests.backends.gateway_program PORT
"""

from __future__ import annotations

import asyncio
import sys

from ringfence.dev.processes import LOOPBACK
from ringfence.gateway.core import core_of
from ringfence.gateway.http import GatewayApi
from ringfence.gateway.plane import DataPlane
from ringfence.gateway.problem import answer
from ringfence.gateway.settings import GatewaySettings
from ringfence.kernel.process import run
from ringfence.kernel.runtime import Runtime
from ringfence.kernel.settings import ServiceSettings, load


def build(settings: ServiceSettings, own: GatewaySettings, port: int) -> Runtime:
    """All of it, put together."""
    runtime = Runtime("gateway", settings)
    core = core_of(runtime, settings, own)
    runtime.routes += GatewayApi(runtime, core.view).routes()

    async def serve() -> None:
        plane = DataPlane(core.gate, knows=core.targets.knows, hosts=core.targets.hosts(), answer=answer)
        await plane.start()
        try:
            await plane.listen(LOOPBACK, port, names=[f"{LOOPBACK}:{port}"])
            await asyncio.Event().wait()
        finally:
            await plane.close()

    runtime.background("data plane", serve)
    return runtime


def main() -> int:
    settings = load(ServiceSettings)
    return run([build(settings, load(GatewaySettings), int(sys.argv[1]))], settings)


if __name__ == "__main__":
    sys.exit(main())
