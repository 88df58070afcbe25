"""HTTP API to read pending approvals and recent decisions.

Operators and auditors see everything. Sponsors see their own agents' requests. Everybody sees what they could approve.
Other requests are answered as not found, so that nobody learns whether they exist.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.client.signed_messages import evidence_of, ground_of
from ringfence.kernel.base.api_errors import NotFoundError, WrongQueryError
from ringfence.kernel.crypto.jws import parse, sign
from ringfence.kernel.service.http import number_in, position_in, position_text
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.credential import CredentialDecision
from ringfence.model.records.api_access import Authenticator, Caller
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.requests.facts import RequestContext
from ringfence.policy.api.pending_index import PendingIndex, Show
from ringfence.policy.decision_log import DecisionLog, RecordPosition, RequestState
from ringfence.policy.decisions.explanation import NOT_SEEN, Explainer
from ringfence.policy.decisions.responder import question_for

MAX_PAGE = 1000
"""Pending requests on one page."""
_SHOWS: Final[dict[str, Show]] = {"mine": "mine", "others": "others", "all": "all"}
_NOT_WAITING = (
    "no request with this id waits for an approval that you could see; it may be decided: see /v1/decisions"
)


class DecisionsApi:
    """HTTP routes over the decision log of this replica. Every replica knows the decisions of all."""

    def __init__(
        self,
        runtime: Runtime,
        directory: Directory,
        authenticator: Authenticator,
        decisions: DecisionLog,
        policy_revision: Callable[[], str],
    ) -> None:
        self._directory = directory
        self._authenticator = authenticator
        self._decisions = decisions
        self._runtime = runtime
        self._explainer = Explainer(runtime)
        self.index = PendingIndex(directory, decisions, policy_revision)

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [
            Route("/v1/approvals", self._approvals),
            Route("/v1/approvals/{request_id}", self._approval),
            Route("/v1/approvals/{request_id}/evidence", self._evidence),
            Route("/v1/decisions/{request_id}", self._decision),
            Route("/v1/decisions/{request_id}/explanation", self._explanation),
        ]

    async def _approvals(self, request: Request) -> Response:
        """Serve what waits, the most urgent first: `{approvals}`; with `limit` a page: `{approvals, after, counts}`.

        Query: `limit`, `after` (of the page before), `show` (mine, others, all), `agent`. `counts` are of all pages.
        A page leaves out what is superseded: a record or the bundle changed, so that no approval of it counts.
        """
        caller, query = self._caller(request), request.query_params
        if "limit" not in query:
            shown = [view for known in self._decisions.pending() if (view := self._waiting(known, caller))]
            return JSONResponse({"approvals": sorted(shown, key=lambda view: int(view["expires_at"]))})
        limit = number_in(query["limit"], 0, MAX_PAGE)
        show = _SHOWS.get(query.get("show", "all"))
        if limit is None:
            raise WrongQueryError(f"limit is a number from 0 to {MAX_PAGE}")
        if show is None:
            raise WrongQueryError("show is one of mine, others, all")
        page = await self.index.page(
            caller, show=show, agent=query.get("agent"), after=position_in(query), limit=limit
        )
        return JSONResponse(
            {
                "approvals": [view for state in page.states if (view := self._waiting(state, caller))],
                "after": position_text(page.after),
                "counts": {"mine": page.mine, "others": page.others},
            }
        )

    async def _approval(self, request: Request) -> Response:
        return JSONResponse(self._waiting_for(request, self._caller(request)))

    async def _evidence(self, request: Request) -> Response:
        """Serve the signed messages by which a person is shown what they approve: `{trust, question, records}`.

        `question` is policy's question to the caller, signed now; `records` are the signer's, the agent's, the task's,
        the target's, and that of the user on whose behalf the task is. Only who could give an approval gets them.
        """
        caller = self._caller(request)
        if not self._waiting_for(request, caller)["you_can_give"]:
            raise NotFoundError(_NOT_WAITING)
        me = caller.user.user_id
        state = self._decisions.get(request.path_params["request_id"])
        decision = state.pending if state else None
        facts = self.index.context(state, decision) if state and decision else None
        if decision is None or facts is None:
            raise NotFoundError(_NOT_WAITING)
        question = sign(question_for(decision, me, self._runtime.key.id), self._runtime.believed_key())
        ground = ground_of(
            self._directory,
            facts.agent.state.agent_id,
            facts.task.state.task_id,
            facts.target.state.target_id,
        )
        evidence = evidence_of(self._directory, self._directory.trust, [("user", me), *ground])
        return JSONResponse({**evidence, "question": question})

    def _waiting_for(self, request: Request, caller: Caller) -> dict[str, Any]:
        """The pending request of a path, as the caller sees it. Raises NotFoundError."""
        state = self._decisions.get(request.path_params["request_id"])
        view = self._waiting(state, caller) if state else None
        if view is None:
            raise NotFoundError(_NOT_WAITING)
        return view

    async def _decision(self, request: Request) -> Response:
        state = self._state_of(request)
        view = _decided(state)
        if state.outcome == "denied" and state.jws is None:
            explanation = await self._explainer.explain(state)
            view |= {name: explanation[name] for name in ("reasons", "required") if name in explanation}
        return JSONResponse(view)

    async def _explanation(self, request: Request) -> Response:
        """Explain a remembered decision, or the one at the query's `partition` and `offset`, which audit knows."""
        place = _cursor(request)
        if place is None:
            return JSONResponse(await self._explainer.explain(self._state_of(request)))
        caller = self._caller(request)
        explanation = await self._explainer.explain_recorded(request.path_params["request_id"], place)
        if not self._may_see_agent(caller, explanation["agent_id"]):
            raise NotFoundError(NOT_SEEN)
        return JSONResponse(explanation)

    def _state_of(self, request: Request) -> RequestState:
        caller = self._caller(request)
        state = self._decisions.get(request.path_params["request_id"])
        if state is None or state.outcome is None or not self._may_see(caller, state):
            raise NotFoundError(NOT_SEEN)
        return state

    def _caller(self, request: Request) -> Caller:
        return self._authenticator.authenticate(request)

    def _may_see(self, caller: Caller, state: RequestState) -> bool:
        return self._may_see_agent(caller, state.agent_id)

    def _may_see_agent(self, caller: Caller, agent_id: str) -> bool:
        try:
            agent = self._directory.agent(agent_id)
        except ChainError:
            agent = None
        return caller.may_see_agent_of(agent.state.sponsor) if agent else caller.sees_all

    def _waiting(self, state: RequestState, caller: Caller) -> dict[str, Any] | None:
        """Return a pending request as the caller sees it; None if it is not pending, or they may neither see nor
        approve it.
        """
        decision = state.pending
        if decision is None:
            return None
        facts = self.index.context(state, decision)
        yours = self.index.classes(state, decision, caller)
        if not yours and not self._may_see(caller, state):
            return None
        view = decision.model_dump(
            mode="json",
            include={
                "request_id",
                "request",
                "source",
                "required",
                "ttl_s",
                "delivery",
                "revisions",
                "reasons",
                "expires_at",
                "approvals",
            },
            exclude_none=True,
        )
        about = {"about": _about(facts)} if facts else {}
        superseded = {"superseded": True} if self.index.is_superseded(state, decision) else {}
        return {**view, **about, **superseded, "agent_id": state.agent_id, "you_can_give": list(yours)}


def _about(facts: RequestContext) -> dict[str, Any]:
    """What records say about a request, for people who do not see all of these records."""
    task = facts.task.state
    return {
        "agent_description": facts.agent.state.description,
        "sponsor": facts.agent.state.sponsor,
        "purpose": task.purpose,
        "on_behalf_of": task.on_behalf_of,
        "task_ends_at": task.not_after,
        "target_description": facts.target.state.description,
        "delegators": list(facts.act[1:]),
    }


def _cursor(request: Request) -> RecordPosition | None:
    """Return the position of the decision that the query names, or None."""
    numbers = [request.query_params.get(name, "") for name in ("partition", "offset")]
    if not all(number.isdecimal() for number in numbers):
        return None
    return RecordPosition(int(numbers[0][:9]), int(numbers[1][:18]))


def _decided(state: RequestState) -> dict[str, Any]:
    view: dict[str, Any] = {
        "request_id": state.request_id,
        "agent_id": state.agent_id,
        "decision_id": state.decision_id,
        "outcome": state.outcome,
        "ttl_s": state.ttl_s,
        "source": state.at._asdict(),
        "reasons": [],
    }
    if state.jws is not None:
        decision = parse(state.jws).unverified_claims(CredentialDecision)
        view |= decision.model_dump(
            mode="json", include={"reasons", "required", "expires_at"}, exclude_none=True
        )
    return view
