"""HTTP API to read users, agents, targets and tasks.

Operators and auditors see everything. Sponsors see their own agents, the tasks of those agents, and the parts that
those handed on. Every user sees themself, the targets, and the tasks that they assigned or that are on their behalf. An
entry that the caller may not see is answered like a missing one. `?records=1` adds the signed records for verification.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.base.api_errors import NotFoundError, WrongQueryError
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.service.http import number_in, position_in, position_text
from ringfence.messages.registry import AgentState, AnyState, TaskState, UserState
from ringfence.model.identity.spiffe_ids import SubjectKind
from ringfence.model.lifecycle import agents_of, subject_key
from ringfence.model.records.api_access import Authenticator, Caller
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory, VerifiedRecord
from ringfence.registry.domain import TASK_MAX_S, task_is_longer

_PAUSE_EVERY = 50
"""After so many entries the loop yields to the rest of the process: the first look verifies each chain."""

MAX_PAGE: Final = 1000
"""Tasks on one page."""
Filter = Callable[[VerifiedRecord[AnyState], Request], bool]


class RegistryApi:
    """HTTP routes over one directory."""

    def __init__(
        self,
        directory: Directory,
        authenticator: Authenticator,
        clock: Clock,
        *,
        task_max_s: int = TASK_MAX_S,
    ) -> None:
        """`task_max_s`: how long a new task may last; `?beyond_limit=1` asks for tasks that last longer."""
        self._directory = directory
        self._authenticator = authenticator
        self._clock = clock
        self._task_max_s = task_max_s

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [
            Route("/v1/trust", self._trust),
            Route("/v1/passkeys/{credential_id}", self._passkey),
            *self._routes_of("user"),
            *self._routes_of("agent"),
            *self._routes_of("target"),
            *self._routes_of("task", self._is_wanted_task),
        ]

    async def _trust(self, request: Request) -> Response:
        """Serve the trust bundle in force to a console: `{trust}`. It is public, and the console verifies it."""
        self._authenticator.console(request.headers.get("authorization"))
        return JSONResponse({"trust": self._directory.trust.compact.decode().strip()})

    async def _passkey(self, request: Request) -> Response:
        """Serve whose passkey has a credential id, to a console at which its holder signs in: `{user_id, kid}`.

        An authenticator made the id at random, so nobody finds a person by it who has not seen their passkey.
        """
        self._authenticator.console(request.headers.get("authorization"))
        credential_id, now_s = request.path_params["credential_id"], self._clock.now_ms() / 1000
        for seen, entry in enumerate(self._directory.entries("user"), start=1):
            user = entry.state
            if not isinstance(user, UserState) or user.status != "active":
                continue
            for key in user.keys:
                if key.credential_id == credential_id and key.not_before <= now_s < key.not_after:
                    return JSONResponse({"user_id": user.user_id, "kid": key.kid})
            if seen % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)
        raise NotFoundError("nobody who is active has this passkey")

    def _routes_of(self, kind: SubjectKind, wanted: Filter = lambda entry, request: True) -> list[BaseRoute]:
        async def all_of_them(request: Request) -> Response:
            caller = self._authenticator.authenticate(request)
            if kind == "task" and "limit" in request.query_params:
                return JSONResponse(await self._page_of_tasks(caller, request))
            entries = [
                _json(entry, request) async for entry in self._visible(kind, caller) if wanted(entry, request)
            ]
            return JSONResponse({f"{kind}s": entries})

        async def one(request: Request) -> Response:
            caller, id = self._authenticator.authenticate(request), request.path_params["id"]
            try:
                entry = self._directory.entry(kind, id)
            except ChainError as error:
                if caller.sees_all:
                    raise NotFoundError(f"the record of {kind} {id} counts for nothing: {error}") from None
                entry = None
            # A caller who may not see it learns nothing, not even whether it exists.
            if entry is None or not self._may_see(caller, entry.state):
                raise NotFoundError(f"there is no {kind} {id} that {caller.user.user_id} may see")
            return JSONResponse(_json(entry, request))

        return [Route(f"/v1/{kind}s", all_of_them), Route(f"/v1/{kind}s/{{id}}", one)]

    async def _page_of_tasks(self, caller: Caller, request: Request) -> dict[str, Any]:
        """A page of tasks: `{tasks, after, count}`; `count` is of all pages.

        Query: `limit`, `after` (of the page before), and the filters. Running tasks come in the order of their ends;
        with others among them, those that end last come first.
        """
        query = request.query_params
        limit, after = number_in(query["limit"], 1, MAX_PAGE), position_in(query)
        if limit is None:
            raise WrongQueryError(f"limit is a number from 1 to {MAX_PAGE}")
        last_first = query.get("status") != "active"
        positions = sorted(
            [
                ((entry.state.not_after, entry.state.task_id), entry)
                async for entry in self._visible("task", caller)
                if isinstance(entry.state, TaskState) and self._is_wanted_task(entry, request)
            ],
            key=lambda one: one[0],
            reverse=last_first,
        )
        rest = [
            one for one in positions if after is None or (one[0] < after if last_first else one[0] > after)
        ]
        page = rest[:limit]
        return {
            "tasks": [_json(entry, request) for _, entry in page],
            "after": position_text(page[-1][0] if len(rest) > limit else None),
            "count": len(positions),
        }

    # --- access rules ---

    async def _visible(self, kind: SubjectKind, caller: Caller) -> AsyncIterator[VerifiedRecord[AnyState]]:
        for seen, entry in enumerate(self._directory.entries(kind), start=1):
            if self._may_see(caller, entry.state):
                yield entry
            if seen % _PAUSE_EVERY == 0:
                await asyncio.sleep(0)

    def _may_see(self, caller: Caller, state: AnyState) -> bool:
        me = caller.user.user_id
        if caller.sees_all:
            return True
        match state:
            case UserState():
                return state.user_id == me
            case AgentState():
                return caller.may_see_agent_of(state.sponsor)
            case TaskState():
                if me in (state.assigned_by, state.on_behalf_of):
                    return True
                agents = (self._state("agent", id) for id in agents_of(state))
                return any(isinstance(a, AgentState) and caller.may_see_agent_of(a.sponsor) for a in agents)
            case _:
                return True

    def _is_wanted_task(self, entry: VerifiedRecord[AnyState], request: Request) -> bool:
        """Apply the filters `?agent=`, `?parent=`, `?status=` and `?beyond_limit=1`.

        A task past its end counts as ended, and so do its parts, even if nobody published that.
        """
        task = entry.state
        if not isinstance(task, TaskState):
            return False
        if request.query_params.get("beyond_limit") == "1" and not self._is_beyond_limit(entry, task):
            return False
        agent, parent, status = (request.query_params.get(name) for name in ("agent", "parent", "status"))
        return (
            agent in (None, task.agent_id)
            and parent in (None, task.parent)
            and status in (None, "ended" if self._is_over(task) else "active")
        )

    def _is_beyond_limit(self, entry: VerifiedRecord[AnyState], task: TaskState) -> bool:
        """Return whether a task lasts longer than a new one may: it was assigned under another limit."""
        assigned_ms = entry.record.commands[0].appended_at_ms
        return task_is_longer(task.not_after, assigned_ms, self._task_max_s)

    def _is_over(self, task: TaskState) -> bool:
        now_s = self._clock.now_ms() / 1000
        above: AnyState | None = task
        while isinstance(above, TaskState):
            if above.status == "ended" or above.not_after <= now_s:
                return True
            if above.parent is None:
                return False
            above = self._state("task", above.parent)
        return True

    # --- look-up ---

    def _state(self, kind: SubjectKind, id: str) -> AnyState | None:
        try:
            entry = self._directory.entry(kind, id)
        except ChainError:
            return None
        return entry.state if entry else None


def _json(entry: VerifiedRecord[Any], request: Request) -> dict[str, Any]:
    _, id = subject_key(entry.state)
    answer = {"id": id, "revision": entry.revision, "state": entry.state.model_dump(mode="json")}
    if request.query_params.get("records") == "1":
        answer["record"] = entry.compact.decode()
    return answer
