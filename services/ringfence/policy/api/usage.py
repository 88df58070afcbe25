"""HTTP APIs to read an agent's ceiling and usage, the combinations that a ceiling allows, and the open questions about
single actions that gateways hold.

Usage includes the agent's holdings, and a narrower ceiling that would suffice.

A question is visible to operators and auditors, to the agent's sponsor, and to everybody who could answer it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.client.approvals.action_approvals import OpenActions, PendingAction, is_action
from ringfence.client.signed_messages import Subject, compose, evidence_of, ground_of, stamp
from ringfence.kernel.base.api_errors import NotFoundError, WrongQueryError
from ringfence.kernel.base.clock import Clock
from ringfence.kernel.base.errors import InvalidMessageError, UnavailableError
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.crypto.jws import sign
from ringfence.kernel.kafka.record import Received
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.approval import ActionApproval, ActionRequest, CeilingReport, UsedVerb
from ringfence.messages.base import Scope
from ringfence.model.records.api_access import Authenticator, Caller, ForbiddenError
from ringfence.model.records.command_chain import ChainError
from ringfence.model.records.directory import Directory
from ringfence.model.records.seconders import sole_givers
from ringfence.policy.agents.ceilings import CeilingCombinations
from ringfence.policy.agents.holdings import Holdings
from ringfence.policy.agents.usage import DAY_S, WINDOW_DAYS, KeyLastSeen, narrower, verbs_of
from ringfence.policy.api.authzen import BadQuestionError, parse_question, question_body
from ringfence.rego.engine import PolicyFailedError

KEEP_MS = 24 * 3600 * 1000
"""How far back questions are read: no longer than the longest may wait."""
_NOT_WAITING = "no action with this id waits for an answer that you could see; it may be over"


class ActionQuestions:
    """The open questions about actions, from `approval.request` and `approval.response`."""

    def __init__(self, open_actions: OpenActions) -> None:
        self.open = open_actions

    def on_requests(self, records: Sequence[Received]) -> None:
        """Read gateways' questions. Ignores those that do not verify."""
        for record in records:
            if is_action(record, ActionRequest):
                try:
                    self.open.on_request(record)
                except InvalidMessageError:
                    continue

    def on_answers(self, records: Sequence[Received]) -> None:
        """Read people's answers. Ignores those that do not verify."""
        for record in records:
            if is_action(record, ActionApproval):
                try:
                    self.open.on_answer(record)
                except (InvalidMessageError, ChainError):
                    continue


class CeilingApi:
    """`POST /v1/combinations`: which forbidden combinations a ceiling would allow by itself. It changes nothing."""

    def __init__(self, authenticator: Authenticator, ceilings: CeilingCombinations) -> None:
        self._authenticator = authenticator
        self._ceilings = ceilings

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [Route("/v1/combinations", self._combinations, methods=["POST"])]

    async def _combinations(self, request: Request) -> Response:
        caller = self._authenticator.authenticate(request)
        if not (caller.sees_all or "sponsor" in caller.user.roles):
            raise ForbiddenError("operators, auditors and sponsors see what ceilings allow")
        question = parse_question(_Ceiling, await question_body(request))
        try:
            found = await self._ceilings.of(question.ceiling)
        except PolicyFailedError as error:
            raise UnavailableError(f"which combinations it allows is not known: {error}") from None
        return JSONResponse({"combinations": [reason.message for reason in found]})


class _Ceiling(BaseModel):
    ceiling: Scope


@dataclass(slots=True, eq=False)
class CeilingReportApi:
    """`GET /v1/agents/{agent_id}/ceiling-report`: what policy knows of a whole ceiling that somebody proposes. It is
    signed, so that the sign page need not believe the console.
    """

    runtime: Runtime
    directory: Directory
    authenticator: Authenticator
    ceilings: CeilingCombinations
    holdings: Holdings

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [Route("/v1/agents/{agent_id}/ceiling-report", self._report)]

    async def _report(self, request: Request) -> Response:
        """Serve `{report}`, a signed `CeilingReport`. Query: `ceiling` (JSON) and `people` (ids, by commas).

        It is for people who may see the agent's use: who gave what to the people is in it.
        """
        caller, query = self.authenticator.authenticate(request), request.query_params
        agent_id = request.path_params["agent_id"]
        try:
            entry = self.directory.agent(agent_id)
        except ChainError:
            entry = None
        if not (caller.sees_all or (entry is not None and caller.may_see_agent_of(entry.state.sponsor))):
            raise NotFoundError("there is no such agent that you may see")
        try:
            document = json_object(b'{"ceiling":%s}' % query.get("ceiling", "").encode())
            ceiling = parse_question(_Ceiling, document).ceiling
        except (ValueError, BadQuestionError):
            raise WrongQueryError("ceiling is a JSON list of permissions") from None
        people = tuple(sorted({one for one in query.get("people", "").split(",") if one}))
        now_ms = self.runtime.clock.now_ms()
        key = self.runtime.believed_key()
        stamped = stamp(key.id, self.runtime.settings.trust_domain, now_ms // 1000, 0)
        report = compose(
            CeilingReport,
            stamped,
            agent_id=agent_id,
            ceiling=ceiling,
            people=people,
            used=self._used(agent_id, now_ms // 1000) if entry is not None else None,
            combinations=await self._combinations(ceiling),
            givers=tuple(sorted(sole_givers(self.directory, people, now_ms))),
        )
        return JSONResponse({"report": sign(report, key)})

    async def _combinations(self, ceiling: Scope) -> tuple[str, ...] | None:
        try:
            return tuple(reason.message for reason in await self.ceilings.of(ceiling))
        except PolicyFailedError:
            return None

    def _used(self, agent_id: str, now_s: int) -> tuple[UsedVerb, ...]:
        used = sorted(self.holdings.used(agent_id, now_s), key=lambda one: (one.target, one.verb))
        return tuple(UsedVerb(target=one.target, verb=one.verb, days=one.days) for one in used)


@dataclass(slots=True, eq=False)
class ActionsApi:
    """`GET /v1/action-approvals`, one of them, and the evidence by which the sign page shows it."""

    questions: ActionQuestions
    directory: Directory
    authenticator: Authenticator

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [
            Route("/v1/action-approvals", self._list),
            Route("/v1/action-approvals/{request_id}", self._one),
            Route("/v1/action-approvals/{request_id}/evidence", self._evidence),
        ]

    async def _list(self, request: Request) -> Response:
        caller = self.authenticator.authenticate(request)
        return JSONResponse({"actions": [asdict(one) for one in self._visible(caller)]})

    async def _one(self, request: Request) -> Response:
        return JSONResponse(asdict(self._found(request, self.authenticator.authenticate(request))))

    async def _evidence(self, request: Request) -> Response:
        """Serve `{trust, records}`; only who could answer gets them."""
        caller = self.authenticator.authenticate(request)
        action = self._found(request, caller)
        if not action.mine:
            raise NotFoundError(_NOT_WAITING)
        ground = ground_of(self.directory, action.agent, action.task_id, action.target)
        subjects: list[Subject] = [("user", caller.user.user_id), *ground]
        return JSONResponse(evidence_of(self.directory, self.directory.trust, subjects))

    def _visible(self, caller: Caller) -> list[PendingAction]:
        pending = self.questions.open.pending(everyone=True, user_id=caller.user.user_id)
        return [one for one in pending if one.mine or caller.may_see_agent_of(one.sponsor)]

    def _found(self, request: Request, caller: Caller) -> PendingAction:
        id = request.path_params["request_id"]
        for one in self._visible(caller):
            if one.request_id == id:
                return one
        raise NotFoundError(_NOT_WAITING)


@dataclass(slots=True, eq=False)
class UsageApi:
    """One HTTP route. Every replica knows the leases of all agents."""

    directory: Directory
    authenticator: Authenticator
    holdings: Holdings
    key_last_seen: KeyLastSeen
    clock: Clock

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [Route("/v1/agents/{agent_id}/usage", self._usage)]

    async def _usage(self, request: Request) -> Response:
        caller = self.authenticator.authenticate(request)
        try:
            entry = self.directory.agent(request.path_params["agent_id"])
        except ChainError:
            entry = None
        if entry is None or not caller.may_see_agent_of(entry.state.sponsor):
            raise NotFoundError("no agent with this id that you could see")
        agent, now_s = entry.state, self.clock.now_ms() // 1000
        used = self.holdings.used(agent.agent_id, now_s)
        held = self.holdings.held(agent.agent_id, now_s)
        used_verbs = {(one.target, one.verb) for one in used}
        used_verbs |= {(p["target"], verb) for lease in held for p in lease["scope"] for verb in p["verbs"]}
        unused = sorted(verbs_of(agent.ceiling) - used_verbs)
        narrowed = narrower(agent.ceiling, used_verbs)
        return JSONResponse(
            {
                "agent_id": agent.agent_id,
                "registered_at": entry.record.commands[0].appended_at_ms // 1000,
                "since": (now_s // DAY_S - WINDOW_DAYS + 1) * DAY_S,
                "ceiling": [permission.model_dump(mode="json") for permission in agent.ceiling],
                "used": [
                    {
                        "target": one.target,
                        "verb": one.verb,
                        "first_used": one.first_s,
                        "last_used": one.last_s,
                        "days": one.days,
                    }
                    for one in sorted(used, key=lambda one: (one.target, one.verb))
                ],
                "never_used": [{"target": target, "verb": verb} for target, verb in unused],
                "held": held,
                "keys_seen": [
                    {"kid": kid, "last_seen_ms": at_ms}
                    for kid, at_ms in sorted(self.key_last_seen.of(agent.agent_id).items())
                ],
                "narrower": [p.model_dump(mode="json") for p in narrowed] if unused else None,
            }
        )
