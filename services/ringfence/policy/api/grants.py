"""HTTP APIs of grants, with what a person needs to sign one, and of reach: the agents that could act at a target now.

Reach is answered page by page. Operators and auditors see all agents, sponsors their own, others none.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.base.api_errors import NotFoundError, WrongQueryError
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import Grant
from ringfence.messages.base import Permission, Scope
from ringfence.messages.registry import TargetState
from ringfence.model.records.api_access import Authenticator, Caller
from ringfence.model.records.directory import Directory
from ringfence.model.requests.facts import DeniedError, RecordContext, load_records, violations_of
from ringfence.model.requests.grants import GrantTable, id_of, signer_of
from ringfence.model.scope.globs import ScopeError
from ringfence.model.scope.rule import Limit, effective
from ringfence.model.scope.scope import validate_scope
from ringfence.model.unknown_fields import is_understood
from ringfence.policy.agents.inventory import AgentFacts, row_of
from ringfence.policy.api.inventory import AgentsApi, answered
from ringfence.policy.grants import GrantBook

_ROWS: Final = 500
_LOOKED_AT: Final = 5000
MAX_TASKS: Final = 20
"""The most running tasks of an agent that are examined. The answer says so where there are more."""
_A_TURN, _LINES_A_TURN = 5, 500


class ReachApi(AgentsApi):
    """`GET /v1/reach`."""

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [Route("/v1/reach", self._reach)]

    async def _reach(self, request: Request) -> Response:
        now_ms, query = self._runtime.clock.now_ms(), request.query_params
        caller = self._caller(request)
        target_id = query.get("target")
        if not target_id:
            raise WrongQueryError("target is the id of the target that is asked about")
        target = self._target(target_id)
        gaps = await self._gaps(caller)
        agents: list[Any] = []
        after = None
        if target is not None:
            scope = _queried_scope(target, query.get("verb"), query.get("resource"))
            agents, after = await self._page(caller, scope, target_id, query.get("after") or "", gaps)
        document = {
            "at_ms": now_ms,
            "exists": target is not None,
            "agents": agents,
            "after": after,
            "gaps": gaps,
        }
        return answered(document)

    async def _page(
        self, caller: Caller, asked: Scope, target_id: str, after: str, gaps: list[str]
    ) -> tuple[list[Any], str | None]:
        """Return agents by id after one, and the last that was examined, if there may be more."""
        ids = (
            list(self._agent_index.ids())
            if caller.sees_all
            else self._agent_index.ids_of(caller.user.user_id)
        )
        agents: list[Any] = []
        remaining_ids = ids[bisect_right(ids, after) :]
        for number, agent_id in enumerate(remaining_ids[:_LOOKED_AT], start=1):
            line = self._agent_index.line(agent_id)
            if line is not None and caller.may_see_agent_of(line.sponsor) and target_id in line.targets:
                if row := self._row(agent_id, asked, target_id, gaps):
                    agents.append(row)
                if len(agents) == _ROWS:
                    return agents, agent_id if len(remaining_ids) > number else None
                if number % _A_TURN == 0:
                    await asyncio.sleep(0)
            elif number % _LINES_A_TURN == 0:
                await asyncio.sleep(0)
        return agents, remaining_ids[_LOOKED_AT - 1] if len(remaining_ids) > _LOOKED_AT else None

    def _row(self, agent_id: str, asked: Scope, target_id: str, gaps: list[str]) -> Any:
        facts = self._agent_index.facts(agent_id)
        if facts is None or facts.agent.status == "decommissioned":
            return None
        ceiling = by_ceiling(facts, asked)
        if not ceiling:
            return None
        max_age_s = self._runtime.settings.entitlements_max_age_s
        running = sorted(facts.tasks, key=lambda task: (task.not_after, task.task_id))
        if len(running) > MAX_TASKS:
            gaps.append(f"agent {agent_id} has {len(running)} running tasks: {MAX_TASKS} were looked at")
        tasks = []
        for task in running[:MAX_TASKS]:
            try:
                ground = load_records(self._directory, agent_id, task.task_id, target_id)
            except DeniedError:
                continue  # a record of the task is invalid: nothing is issued in it
            if by_this_task := by_task(ground, asked, facts.now_s, max_age_s):
                tasks.append(by_this_task)
        return line_of(facts, ceiling, tasks)


def _queried_scope(target: TargetState, verb: str | None, resource: str | None) -> Scope:
    if verb is not None and verb not in {one.verb for one in target.verbs}:
        verbs = ", ".join(one.verb for one in target.verbs)
        raise WrongQueryError(f"{target.target_id} has no verb {verb[:64]}; it has {verbs or 'none'}")
    try:
        scope = asked_for(target, verb, resource)
        validate_scope(scope, allow_empty=True)
    except ScopeError as error:
        raise WrongQueryError(str(error)) from None
    return scope


# Reach of a target: agents in running tasks, on behalf of a user, as far as all limits allow. Pure.


def asked_for(target: TargetState, verb: str | None, resource: str | None) -> Scope:
    """Return the scope in question: by default all verbs that this version understands, and all resources."""
    verbs = (verb,) if verb else tuple(one.verb for one in target.verbs if is_understood(one))
    if not verbs:
        return ()
    resources = (resource or "**",)
    return (Permission.model_construct(target=target.target_id, verbs=verbs, resources=resources),)


def by_ceiling(facts: AgentFacts, asked: Scope) -> Scope:
    """Return the part of the scope that an agent's ceiling allows."""
    return effective((Limit("asked", asked), Limit.ceiling(facts.agent.agent_id, facts.agent.ceiling)))


def by_task(
    ground: RecordContext, asked: Scope, now_s: int, entitlements_max_age_s: int
) -> dict[str, Any] | None:
    """Return the part of the scope that an agent can receive in a task, or None.

    `violations_of` lists what would still prevent it, such as a suspended agent.
    """
    scope = effective((Limit("asked", asked), *ground.limits(now_s, entitlements_max_age_s)))
    if not scope:
        return None
    task = ground.task.state
    verbs = {verb for permission in scope for verb in permission.verbs}
    return {
        "id": task.task_id,
        "purpose": task.purpose,
        "on_behalf_of": task.on_behalf_of,
        "assigned_by": task.assigned_by,
        "handed_on_by": list(ground.act[1:]),
        "not_after": task.not_after,
        "entitlements_by": ground.user.state.entitlements.source,
        "scope": plain(scope),
        "approvals": sorted(
            {one.floor for one in ground.target.state.verbs if one.verb in verbs and one.floor != "none"}
        ),
        "against": [reason.message for reason in violations_of(ground, scope, now_s, entitlements_max_age_s)],
    }


def line_of(facts: AgentFacts, ceiling: Scope, tasks: list[dict[str, Any]]) -> Mapping[str, Any]:
    """Return an agent that could act: `now` if it has a task for it that nothing prevents."""
    row = row_of(facts, frozenset())
    return {
        **{name: row[name] for name in ("id", "status", "sponsor", "sponsor_is", "ceiling_by")},
        "ceiling": plain(ceiling),
        "tasks": tasks,
        "now": any(not task["against"] for task in tasks),
    }


def plain(scope: Scope) -> list[dict[str, Any]]:
    return [permission.model_dump(mode="json") for permission in scope]


@dataclass(slots=True, eq=False)
class GrantApi:
    """HTTP routes over the grants that this replica knows, which are all."""

    runtime: Runtime
    directory: Directory
    authenticator: Authenticator
    table: GrantTable
    book: GrantBook
    policy_revision: Callable[[], str]

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [
            Route("/v1/bundle", self._bundle),
            Route("/v1/grants", self._grants),
            Route("/v1/grants/{grant_id}", self._grant),
        ]

    async def _bundle(self, request: Request) -> Response:
        self._caller(request)
        return JSONResponse({"revision": self.policy_revision()})

    async def _grants(self, request: Request) -> Response:
        caller = self._caller(request)
        views = [view for grant in self.table.all() if (view := self._view(grant.claims, caller))]
        return JSONResponse({"grants": sorted(views, key=lambda view: int(view["ends_at"]))})

    async def _grant(self, request: Request) -> Response:
        caller = self._caller(request)
        entry = self.table.get(request.path_params["grant_id"])
        view = self._view(entry.signed.claims, caller) if entry else None
        if view is None:
            raise NotFoundError("no grant with this id that you could see is remembered here")
        return JSONResponse(view)

    def _caller(self, request: Request) -> Caller:
        return self.authenticator.authenticate(request)

    def _view(self, grant: Grant, caller: Caller) -> dict[str, Any] | None:
        """Return a grant for a caller who may see it: operators, auditors, its signer, the sponsor, and the user it
        is on behalf of.
        """
        try:
            ground = load_records(self.directory, grant.agent_id, grant.task_id, grant.scope[0].target)
        except DeniedError:
            ground = None
        concerned = {signer_of(grant)}
        if ground is not None:
            concerned |= {ground.agent.state.sponsor, ground.task.state.on_behalf_of}
        if not caller.sees_all and caller.user.user_id not in concerned:
            return None
        id = id_of(grant)
        view = grant.model_dump(
            mode="json",
            include={"agent_id", "task_id", "scope", "count", "ttl_s", "delivery", "comment", "revisions"},
            exclude_none=True,
        )
        return {
            "grant_id": id,
            **view,
            "by": signer_of(grant),
            "given_at": grant.iat,
            "ends_at": grant.exp,
            "used": self.book.used(id),
            "status": self._status(grant, ground),
        }

    def _status(self, grant: Grant, ground: RecordContext | None) -> str:
        if grant.exp * 1000 <= self.runtime.clock.now_ms():
            return "ended"
        if ground is None:
            return "stale"
        sponsor, on_behalf_of = ground.agent.state.sponsor, ground.task.state.on_behalf_of
        if self.table.is_withdrawn(grant, sponsor=sponsor, on_behalf_of=on_behalf_of):
            return "withdrawn"
        if grant.revisions != ground.revisions(self.policy_revision()):
            return "stale"
        return "used_up" if self.book.used(id_of(grant)) >= grant.count else "live"
