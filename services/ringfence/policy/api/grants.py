"""HTTP API to read grants, and what a person needs to sign one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.base.api_errors import NotFoundError
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import Grant
from ringfence.model.records.api_access import Authenticator, Caller
from ringfence.model.records.directory import Directory
from ringfence.model.requests.facts import DeniedError, RecordContext, load_records
from ringfence.model.requests.grants import GrantTable, id_of, signer_of
from ringfence.policy.grants import GrantBook


class GrantApi:
    """HTTP routes over the grants that this replica knows, which are all."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        authenticator: Authenticator,
        table: GrantTable,
        book: GrantBook,
        policy_revision: Callable[[], str],
    ) -> None:
        self._runtime = runtime
        self._directory = directory
        self._authenticator = authenticator
        self._table = table
        self._book = book
        self._policy_revision = policy_revision

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [
            Route("/v1/bundle", self._bundle),
            Route("/v1/grants", self._grants),
            Route("/v1/grants/{grant_id}", self._grant),
        ]

    async def _bundle(self, request: Request) -> Response:
        self._caller(request)
        return JSONResponse({"revision": self._policy_revision()})

    async def _grants(self, request: Request) -> Response:
        caller = self._caller(request)
        views = [view for grant in self._table.all() if (view := self._view(grant.claims, caller))]
        return JSONResponse({"grants": sorted(views, key=lambda view: int(view["ends_at"]))})

    async def _grant(self, request: Request) -> Response:
        caller = self._caller(request)
        entry = self._table.get(request.path_params["grant_id"])
        view = self._view(entry.signed.claims, caller) if entry else None
        if view is None:
            raise NotFoundError("no grant with this id that you could see is remembered here")
        return JSONResponse(view)

    def _caller(self, request: Request) -> Caller:
        return self._authenticator.authenticate(request)

    def _view(self, grant: Grant, caller: Caller) -> dict[str, Any] | None:
        """Return a grant for a caller who may see it: operators, auditors, its signer, the sponsor, and the user it
        is on behalf of.
        """
        try:
            ground = load_records(self._directory, grant.agent_id, grant.task_id, grant.scope[0].target)
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
            "used": self._book.used(id),
            "status": self._status(grant, ground),
        }

    def _status(self, grant: Grant, ground: RecordContext | None) -> str:
        if grant.exp * 1000 <= self._runtime.clock.now_ms():
            return "ended"
        if ground is None:
            return "stale"
        sponsor, on_behalf_of = ground.agent.state.sponsor, ground.task.state.on_behalf_of
        if self._table.is_withdrawn(grant, sponsor=sponsor, on_behalf_of=on_behalf_of):
            return "withdrawn"
        if grant.revisions != ground.revisions(self._policy_revision()):
            return "stale"
        return "used_up" if self._book.used(id_of(grant)) >= grant.count else "live"
