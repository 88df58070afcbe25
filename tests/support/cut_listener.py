"""The gateway's view of leases and cuts alone, in a process: for tests and benchmarks of what revokers do.

    python -m tests.support.cut_listener          # settings and key as for a service: RINGFENCE_*, RINGFENCE_KEY_FILE

`GET /v1/forwards/LEASE` says whether a request under a lease could go on to its target now, whoever it was given to.
"""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ringfence.gateway.state.view import View
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.settings import ServiceSettings, load
from ringfence.kernel.service.process import run
from ringfence.kernel.service.runtime import Runtime
from ringfence.model.verdict import ALLOWED, Refused


class CutListener:
    """What a gateway knows of leases: those that there are, and what was revoked."""

    def __init__(self, runtime: Runtime, *, acknowledges: bool = True) -> None:
        self._runtime = runtime
        self._view = View(runtime, acknowledges=acknowledges)
        runtime.routes.append(Route("/v1/forwards/{lease}", self._told))

    def knows(self, lease_id: str) -> bool:
        """Whether it has heard of this lease."""
        return self._view.table.get(lease_id) is not None

    def stale(self) -> str | None:
        """Why it denies everything, or None."""
        return self._view.stale()

    def doubt(self) -> str | None:
        """Why it cannot tell whether a lease has ended that goes no further here, or None."""
        doubt = self._view.check_view()
        return doubt.reason.message if isinstance(doubt, Refused) else None

    def denial(self) -> str | None:
        """The code by which it denies everything, or None."""
        freshness = self._view.check_freshness()
        return freshness.reason.code if isinstance(freshness, Refused) else None

    def problem(self, lease_id: str) -> str | None:
        """The code of what it says of a lease that may be used no more, or None."""
        lease = self._view.table.get(lease_id)
        live = self._view.table.check_live(lease) if lease is not None else ALLOWED
        return live.reason.code if isinstance(live, Refused) else None

    def forwards(self, lease_id: str) -> bool:
        """Whether a request under this lease could go on to its target now."""
        lease = self._view.table.get(lease_id)
        if lease is None or self._view.stale() is not None:
            return False
        return self._view.table.check_live(lease) == ALLOWED

    async def _told(self, request: Request) -> Response:
        if self._runtime.unready():
            return Response(status_code=503)
        return JSONResponse({"forwards": self.forwards(request.path_params["lease"])})


def build(
    settings: ServiceSettings, clock: Clock | None = None, *, acknowledges: bool = True
) -> tuple[Runtime, CutListener]:
    """The process, and what it knows."""
    runtime = Runtime("gateway", settings, clock)
    return runtime, CutListener(runtime, acknowledges=acknowledges)


def main() -> int:
    settings = load(ServiceSettings)
    return run([build(settings)[0]], settings)


if __name__ == "__main__":
    raise SystemExit(main())
