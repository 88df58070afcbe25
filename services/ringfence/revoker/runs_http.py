"""HTTP API of the revoker: runs, as their runners said, of a caller's own tasks and agents, or all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.base.api_errors import NotFoundError
from ringfence.kernel.base.clock import Clock
from ringfence.messages.run import Run
from ringfence.model.records.api_access import Authenticator, Caller
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.runs import OVER, run_id_of
from ringfence.revoker.runner_pools import RunnerPools

MAX_LISTED = 1000


class RunsApi:
    """The routes that read the table of runs, and the pools that runners say they have."""

    def __init__(
        self,
        directory: Directory,
        pools: RunnerPools,
        broker_now_ms: Callable[[], int],
        clock: Clock,
        authenticator: Authenticator,
    ) -> None:
        self._directory = directory
        self._pools = pools
        self._broker_now_ms = broker_now_ms
        self._clock = clock
        self._authenticator = authenticator

    def routes(self) -> list[BaseRoute]:
        """To be added to the runtime's routes."""
        return [
            Route("/v1/runs", self._list),
            Route("/v1/runs/{id}", self._one),
            Route("/v1/pools", self._list_pools),
        ]

    async def _list(self, request: Request) -> Response:
        """Runs that are not over, the latest first. `?all=1`: also those that are. `?agent=`, `?task=`, `?runner=`."""
        caller = self._authenticator.authenticate(request)
        asked = request.query_params
        runs = [
            run
            for run in self._directory.runs.all()
            if (asked.get("all") == "1" or not self._is_over(run))
            and asked.get("agent") in (None, "", run.agent_id)
            and asked.get("task") in (None, "", run.task_id)
            and asked.get("runner") in (None, "", _name(run.iss))
            and self._may_see(caller, run)
        ]
        runs.sort(key=lambda run: run.at_ms, reverse=True)
        listed = [self._json(run) for run in runs[:MAX_LISTED]]
        return JSONResponse({"runs": listed, "more": len(runs) > MAX_LISTED})

    async def _one(self, request: Request) -> Response:
        """One run, by its own id or by its order's."""
        caller, id = self._authenticator.authenticate(request), request.path_params["id"]
        table = self._directory.runs
        run = table.get(id) or table.get(run_id_of("", order_id=id))
        if run is None or not self._may_see(caller, run):
            raise NotFoundError(
                f"no runner has said anything yet of a run or an order {id} that {caller.user.user_id} may see; "
                "an order waits for a runner of its pool"
            )
        return JSONResponse(self._json(run))

    async def _list_pools(self, request: Request) -> Response:
        """Pools with a runner that was heard lately, by name. `?label=NAME=VALUE`, repeatable: those that have it."""
        self._authenticator.authenticate(request)
        asked = [text.partition("=") for text in request.query_params.getlist("label")]
        labels = {name: value for name, _, value in asked}
        return JSONResponse({"pools": self._pools.listed(self._broker_now_ms(), labels)})

    def _is_over(self, run: Run) -> bool:
        return run.status in OVER or run.deadline <= self._clock.now_ms() // 1000

    def _json(self, run: Run) -> dict[str, Any]:
        claims = run.model_dump(
            mode="json", exclude_none=True, exclude={"run_id", "aud", "iss", "jti", "iat"}
        )
        return {"id": run.run_id, "runner": _name(run.iss), "over": self._is_over(run), **claims}

    def _may_see(self, caller: Caller, run: Run) -> bool:
        """Operators, auditors, the task's assigner, the user it is on behalf of, and the agent's present sponsor."""
        if caller.sees_all:
            return True
        try:
            task, agent = self._directory.task(run.task_id), self._directory.agent(run.agent_id)
        except ChainError:
            return False
        if task is not None and caller.user.user_id in (task.state.assigned_by, task.state.on_behalf_of):
            return True
        return agent is not None and caller.may_see_agent_of(agent.state.sponsor)


def _name(runner: str) -> str:
    return runner.rpartition("/")[2]
