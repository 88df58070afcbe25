"""AuthZEN Authorization API 1.0, for other enforcement points that want decisions by the same rules.

https://openid.net/specs/authorization-api-1_0-final.xml: `POST /access/v1/evaluation` and `/evaluations`, and the
metadata that name them. There is no search: an agent's rights depend on its tasks, and a resource server need not know
of tasks that nobody shows it. A target's resource server asks about its own target, with a token signed by its key.
`subject` is `{"type": "agent", "id"}`, `action.name` a verb, `resource` `{"type": <the target's id>, "id": <a resource
of it>}`; `context.task_id` names the task.

The answer is the decision that such a request would get now: the invariant in code, then the bundle. If a person would
have to approve, it is a denial, because no approval belongs to a question. Nothing is issued, and nothing is stored.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, Field, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import BaseRoute, Route

from ringfence.kernel.base.errors import RingfenceError
from ringfence.kernel.base.ids import message_id
from ringfence.kernel.base.strict_json import json_object
from ringfence.kernel.base.validation_problems import explain
from ringfence.kernel.crypto.jws import Signed
from ringfence.kernel.service.runtime import Runtime
from ringfence.messages.base import Permission
from ringfence.messages.codes import Code, status_of
from ringfence.messages.credential import Coordinates, CredentialRequest
from ringfence.model.records.api_access import Authenticator, ForbiddenError
from ringfence.policy.decisions.evaluator import RequestEvaluator
from ringfence.policy.domain import Case, Evaluation, RequestAllowed

log = logging.getLogger(__name__)

M = TypeVar("M", bound=BaseModel)

MAX_BODY_BYTES = 64 * 1024
MAX_EVALUATIONS = 64
_STOPS_AT = {"deny_on_first_deny": False, "permit_on_first_permit": True}


class BadQuestionError(RingfenceError):
    """Raised when a question is not valid AuthZEN, or lacks a field that is needed here."""

    code = Code.QUESTION_INVALID


class _Subject(BaseModel):
    type: Literal["agent"]
    id: str


class _Action(BaseModel):
    name: str


class _Resource(BaseModel):
    type: str
    id: str


class _Context(BaseModel):
    task_id: str


class _AuthzenRequest(BaseModel):
    subject: _Subject
    action: _Action
    resource: _Resource
    context: _Context


class _Options(BaseModel):
    evaluations_semantic: Literal["execute_all", "deny_on_first_deny", "permit_on_first_permit"] = (
        "execute_all"
    )


class _Batch(BaseModel):
    evaluations: list[dict[str, Any]] = Field(default_factory=list, max_length=MAX_EVALUATIONS)
    options: _Options = Field(default_factory=_Options)


@dataclass(slots=True, eq=False)
class AuthZen:
    """The two endpoints and their metadata."""

    runtime: Runtime
    authenticator: Authenticator
    evaluator: RequestEvaluator

    def routes(self) -> list[BaseRoute]:
        """Return the routes to add to those of the runtime."""
        return [
            Route("/.well-known/authzen-configuration", self._metadata),
            Route("/access/v1/evaluation", _answering(self._evaluation), methods=["POST"]),
            Route("/access/v1/evaluations", _answering(self._evaluations), methods=["POST"]),
        ]

    async def _metadata(self, request: Request) -> Response:
        """Serve the metadata of section 9. It needs no token, as it only names the endpoints.

        If the decision point has a path of its own, the well-known path with that suffix also leads here.
        """
        base = self.runtime.settings.policy_url.rstrip("/")
        return JSONResponse(
            {
                "policy_decision_point": base,
                "access_evaluation_endpoint": f"{base}/access/v1/evaluation",
                "access_evaluations_endpoint": f"{base}/access/v1/evaluations",
            }
        )

    async def _evaluation(self, request: Request) -> dict[str, Any]:
        target_id = self._caller(request)
        question = parse_question(_AuthzenRequest, await question_body(request))
        return await self._answered(question, target_id)

    async def _evaluations(self, request: Request) -> dict[str, Any]:
        """Evaluate several questions.

        Without `evaluations` it is a single one; each may omit members that the outer object has.

        A mistake in one of them becomes its own answer, a denial, and affects no other.
        """
        target_id = self._caller(request)
        document = await question_body(request)
        batch = parse_question(_Batch, document)
        if not batch.evaluations:
            return await self._answered(parse_question(_AuthzenRequest, document), target_id)
        defaults = {name: document[name] for name in _AuthzenRequest.model_fields if name in document}
        stops_at = _STOPS_AT.get(batch.options.evaluations_semantic)
        answers: list[dict[str, Any]] = []
        for one in batch.evaluations:
            try:
                answers.append(
                    await self._answered(parse_question(_AuthzenRequest, {**defaults, **one}), target_id)
                )
            except RingfenceError as error:
                problem = {"status": status_of(error.code, 400), "message": str(error)}
                answers.append({"decision": False, "context": {"error": problem}})
            if answers[-1]["decision"] is stops_at:
                break
        return {"evaluations": answers}

    def _caller(self, request: Request) -> str:
        return self.authenticator.target(request.headers.get("authorization"))

    async def _answered(self, question: _AuthzenRequest, target_id: str) -> dict[str, Any]:
        if question.resource.type != target_id:
            raise ForbiddenError(f"resource.type has to be {target_id}, the target that asks")
        now_ms = self.runtime.clock.now_ms()
        evaluation = await self.evaluator.evaluate(self._as_case(question, now_ms), now_ms, binding=False)
        return _authzen_response(evaluation)

    def _as_case(self, question: _AuthzenRequest, now_ms: int) -> Case:
        """Return the question as an unsigned request. It may be evaluated, and used for nothing else."""
        settings = self.runtime.settings
        try:
            permission = Permission(
                target=question.resource.type,
                verbs=(question.action.name,),
                resources=(question.resource.id,),
            )
        except ValidationError as error:
            raise BadQuestionError(f"this is no permission: {explain(error)}") from None
        iss = f"spiffe://{settings.trust_domain}/agent/{question.subject.id}"
        fields: dict[str, Any] = {
            "iss": iss,
            "aud": settings.trust_domain,
            "jti": str(uuid.uuid4()),
            "task_id": question.context.task_id,
            "scope": (permission,),
            "ttl_s": 1,
            "delivery": "gateway",  # no credential is handed out
            "reason": "asked by an enforcement point",
        }
        unsigned = CredentialRequest.model_construct(**fields)
        source = Coordinates(topic="authzen", partition=0, offset=0, appended_at_ms=now_ms)
        id = message_id(iss, unsigned.jti)
        return Case(Signed(unsigned, ""), id, question.subject.id, source, None)


def _authzen_response(evaluation: Evaluation) -> dict[str, Any]:
    ruling, revisions = evaluation.ruling, evaluation.revisions
    context: dict[str, Any] = {
        "outcome": ruling.outcome,
        "reasons": [reason.model_dump(mode="json", exclude_none=True) for reason in ruling.reasons],
    }
    if ruling.required:
        context["approvals"] = list(ruling.required)
    if revisions is not None:
        context["policy_revision"] = revisions.policy
    return {"decision": isinstance(ruling, RequestAllowed), "context": context}


def _answering(
    endpoint: Callable[[Request], Awaitable[dict[str, Any]]],
) -> Callable[[Request], Awaitable[Response]]:
    """Wrap an endpoint as the specification demands: an error is a status and a sentence, and the request's id is
    repeated.
    """

    async def answer(request: Request) -> Response:
        id = request.headers.get("x-request-id")
        headers = {"X-Request-ID": id} if id else {}
        try:
            return JSONResponse(await endpoint(request), headers=headers)
        except RingfenceError as error:
            if (status := status_of(error.code, 400)) == 401:
                headers["WWW-Authenticate"] = "Bearer"
            return PlainTextResponse(str(error), status_code=status, headers=headers)
        except Exception:
            log.exception("a question could not be answered")
            message = "the question could not be answered, which is no yes"
            return PlainTextResponse(message, status_code=500, headers=headers)

    return answer


async def question_body(request: Request) -> dict[str, Any]:
    """Return the JSON object that a question is. Raises BadQuestionError."""
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BadQuestionError("a question has the Content-Type application/json")
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise BadQuestionError(f"a question has at most {MAX_BODY_BYTES} bytes", code=Code.TOO_LARGE)
    try:
        return json_object(body)
    except ValueError:
        raise BadQuestionError("a question is a JSON object in which no name comes twice") from None


def parse_question(model: type[M], document: dict[str, Any]) -> M:
    """Raises BadQuestionError if a question is not as `model` says."""
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise BadQuestionError(f"the question is not understood: {explain(error)}") from None
