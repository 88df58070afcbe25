"""HTTP API of the revoker: the routes that list leases, runs and runner pools, and return one lease or run.

A caller sees the leases and runs of its own agents and tasks, or on its behalf; operators and auditors see all. The
state of a run is what its runner reported.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.base.api_errors import NotFoundError
from ringfence.kernel.base.clock import Clock
from ringfence.messages.base import UUID
from ringfence.messages.lease import Lease, LeaseStatus
from ringfence.messages.run import Run
from ringfence.model.lease_store import LeaseStore
from ringfence.model.leases.lifecycle import ALL_LEASES, matches
from ringfence.model.leases.revocations import agent_of_task
from ringfence.model.records.api_access import Authenticator, Caller, sponsored_agents
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.runs import OVER, run_id_of
from ringfence.revoker.lease_end.expiry import Overdue
from ringfence.revoker.lease_end.lease_ender import BATCH_SIZE, LeaseEnder
from ringfence.revoker.revocations.verification import RevocationVerifier
from ringfence.revoker.runner_pools import RunnerPools

MAX_LISTED = 1000


@dataclass(slots=True, eq=False)
class RunsApi:
    """The routes that read the table of runs, and the pools that runners say they have."""

    directory: Directory
    pools: RunnerPools
    broker_now_ms: Callable[[], int]
    clock: Clock
    authenticator: Authenticator

    def routes(self) -> list[BaseRoute]:
        return [
            Route("/v1/runs", self._list),
            Route("/v1/runs/{id}", self._one),
            Route("/v1/pools", self._list_pools),
        ]

    async def _list(self, request: Request) -> Response:
        """Runs that are not over, the latest first. `?all=1`: also those that are. `?agent=`, `?task=`, `?runner=`."""
        caller = self.authenticator.authenticate(request)
        asked = request.query_params
        runs = [
            run
            for run in self.directory.runs.all()
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
        caller, id = self.authenticator.authenticate(request), request.path_params["id"]
        table = self.directory.runs
        run = table.get(id) or table.get(run_id_of("", order_id=id))
        if run is None or not self._may_see(caller, run):
            raise NotFoundError(
                f"no runner has said anything yet of a run or an order {id} that {caller.user.user_id} may see; "
                "an order waits for a runner of its pool"
            )
        return JSONResponse(self._json(run))

    async def _list_pools(self, request: Request) -> Response:
        """Pools with a runner that was heard lately, by name. `?label=NAME=VALUE`, repeatable: those that have it."""
        self.authenticator.authenticate(request)
        asked = [text.partition("=") for text in request.query_params.getlist("label")]
        labels = {name: value for name, _, value in asked}
        return JSONResponse({"pools": self.pools.listed(self.broker_now_ms(), labels)})

    def _is_over(self, run: Run) -> bool:
        return run.status in OVER or run.deadline <= self.clock.now_ms() // 1000

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
            task, agent = self.directory.task(run.task_id), self.directory.agent(run.agent_id)
        except ChainError:
            return False
        if task is not None and caller.user.user_id in (task.state.assigned_by, task.state.on_behalf_of):
            return True
        return agent is not None and caller.may_see_agent_of(agent.state.sponsor)


def _name(runner: str) -> str:
    return runner.rpartition("/")[2]


_UNFINISHED: tuple[LeaseStatus, ...] = ("ending", "minting")
_FILTERS = ("agent", "task", "target", "user", "sponsor")
"""`agent`, `task` and `sponsor` also find leases of delegated tasks. `user`: on whose behalf a lease is."""


@dataclass(slots=True, eq=False)
class LeasesApi:
    """The routes that read the lease store."""

    store: LeaseStore
    ender: LeaseEnder
    overdue: Overdue
    directory: Directory
    verifier: RevocationVerifier
    clock: Clock
    authenticator: Authenticator

    def routes(self) -> list[BaseRoute]:
        return [Route("/v1/leases", self._list), Route("/v1/leases/{id}", self._one)]

    async def _list(self, request: Request) -> Response:
        """Leases that have not ended. `?status=`, each of `_FILTERS`; `?overdue=1`: cut, credential not removed yet."""
        caller = self.authenticator.authenticate(request)
        filters = {kind: value for kind in _FILTERS if (value := request.query_params.get(kind))}
        status = request.query_params.get("status")
        late = request.query_params.get("overdue") == "1"
        found_leases: list[Lease] = []
        async for leases in self._candidates(caller, filters, _UNFINISHED if late else None):
            found_leases += [
                lease
                for lease in leases.values()
                if all(matches(lease, f"{kind}:{value}") for kind, value in filters.items())
                and status in (None, lease.status)
                and not (late and self.overdue.since_ms(lease, self.clock.now_ms()) is None)
                and self._may_see(caller, lease)
            ]
            if len(found_leases) > MAX_LISTED:
                break
            await asyncio.sleep(0)  # let other tasks run
        listed = sorted(found_leases[:MAX_LISTED], key=lambda lease: (lease.deadline, lease.lease_id))
        return JSONResponse(
            {"leases": [self._json(lease) for lease in listed], "more": len(found_leases) > MAX_LISTED}
        )

    async def _candidates(
        self, caller: Caller, filters: Mapping[str, str], statuses: Collection[LeaseStatus] | None
    ) -> AsyncIterator[dict[str, Lease]]:
        """Leases that have not ended, in batches: all that pass the filters and that the caller may see, and others."""
        # Any one filter will do: every lease that passes all of them matches its selector key.
        selector_key = next((f"{kind}:{value}" for kind, value in filters.items()), ALL_LEASES)
        if selector_key == ALL_LEASES and not caller.sees_all:
            # Verifying all leases to show a sponsor a few of them would take seconds.
            me = caller.user.user_id
            agents = await sponsored_agents(self.directory, me)
            delegates = (self.verifier.known_holders(f"agent:{agent}") for agent in agents)
            ids = await self.store.find(f"user:{me}", holders=frozenset(agents).union(*delegates))
            for start in range(0, len(ids), BATCH_SIZE):
                yield await self.ender.read(await self.store.get(ids[start : start + BATCH_SIZE]))
            return
        agent_id = agent_of_task(filters["task"], self.directory) if "task" in filters else None
        holders = self.verifier.known_holders(selector_key)
        async for leases in self.ender.find(selector_key, statuses, agent_id=agent_id, holders=holders):
            yield leases

    async def _one(self, request: Request) -> Response:
        """One lease, as long as Redis keeps it after its end. `?records=1` adds the signed record."""
        caller, id = self.authenticator.authenticate(request), request.path_params["id"]
        stored = await self.store.get([id]) if UUID.fullmatch(id) else {}
        lease = (await self.ender.read(stored)).get(id)
        if lease is None or not self._may_see(caller, lease):
            raise NotFoundError(
                f"there is no lease {id} that {caller.user.user_id} may see, or it ended long ago; "
                f"see: ringfence audit trace {id}"
            )
        answer = self._json(lease)
        if request.query_params.get("records") == "1":
            answer["record"] = stored[id].jws.decode("ascii")
        return JSONResponse(answer)

    def _json(self, lease: Lease) -> dict[str, Any]:
        claims = lease.model_dump(
            mode="json", exclude_none=True, exclude={"lease_id", "aud", "iss", "jti", "iat"}
        )
        late_ms = self.overdue.since_ms(lease, self.clock.now_ms())
        late = {} if late_ms is None else {"overdue_s": late_ms // 1000}
        return {"id": lease.lease_id, "written_by": lease.iss, "written_at": lease.iat, **claims, **late}

    def _may_see(self, caller: Caller, lease: Lease) -> bool:
        """Operators, auditors, the user on whose behalf it is, and the present sponsors of the agents that act."""
        if caller.sees_all or caller.user.user_id == lease.on_behalf_of:
            return True
        return any(self._is_sponsor(caller, agent_id) for agent_id in lease.act)

    def _is_sponsor(self, caller: Caller, agent_id: str) -> bool:
        try:
            agent = self.directory.agent(agent_id)
        except ChainError:
            return False
        return agent is not None and caller.may_see_agent_of(agent.state.sponsor)
