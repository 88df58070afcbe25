"""What an agent is told that may not do what it asked for: problem details (RFC 9457), and how to ask for it."""

from __future__ import annotations

import shlex
from http import HTTPStatus
from typing import Any, Final

import orjson

from ringfence.gateway.contract import RpcErrorReply, Verdict
from ringfence.messages.credential import Reason

MEDIA_TYPE: Final = "application/problem+json"
_JSON: Final = "application/json"
_HTTP_STATUSES: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND})
"""What clients of MCP act upon by the status: who sends it is not shown yet, and the session is no more."""
_TYPE: Final = "urn:ringfence:problem:"
_FIXED_BY_NEW_CREDENTIAL: Final = frozenset({"no_lease", "beyond_lease", "lease_ended", "lease_cut"})
"""What a new credential would help against."""


def problem_details(verdict: Verdict) -> dict[str, Any]:
    """The problem details of a verdict that does not allow: the first reason's, and all of them under `reasons`.

    `type` is a name of the reason's code, `instance` the id of the action, by which audit finds it.
    """
    first = verdict.reasons[0] if verdict.reasons else Reason(code="denied", message="it is not allowed")
    body: dict[str, Any] = {
        "type": f"{_TYPE}{first.code}",
        "title": HTTPStatus(verdict.status).phrase,
        "status": verdict.status,
        "instance": f"urn:uuid:{verdict.action_id}",
        **_reason_details(first),
    }
    if len(verdict.reasons) > 1:
        body["reasons"] = [_reason_details(reason) for reason in verdict.reasons]
    if verdict.retry_after_s is not None:
        body["retry_after_s"] = verdict.retry_after_s
    if (how := how_to_ask(verdict)) is not None:
        body["ask"] = how
    return body


def problem_body(verdict: Verdict) -> bytes:
    """The same as JSON, of `MEDIA_TYPE`."""
    return orjson.dumps(problem_details(verdict))


def how_to_ask(verdict: Verdict) -> str | None:
    """The command that asks for what is lacking, where a credential is what lacks."""
    target, action = verdict.target, verdict.action
    if (
        target is None
        or action is None
        or not all(reason.code in _FIXED_BY_NEW_CREDENTIAL for reason in verdict.reasons)
    ):
        return None  # where something else stands against it too, asking would be in vain
    permission = f"{target.target_id}:{action.verb}:{action.resource}"
    if "," in action.resource or ":" in action.resource:
        wanted = {"target": target.target_id, "verbs": [action.verb], "resources": [action.resource]}
        permission = orjson.dumps(wanted).decode()
    return (
        f"ringfence request --task {verdict.task_id or 'TASK'} --delivery gateway "
        f"--allow {shlex.quote(permission)} --reason WHY"
    )


def denial_answer(verdict: Verdict) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to an agent, for a data plane that adds `Cache-Control` by itself."""
    said = {name: value for name, value in denial_headers(verdict).items() if name != "Cache-Control"}
    if verdict.rpc is None or verdict.status in _HTTP_STATUSES:
        return verdict.status, said, problem_body(verdict)
    status = verdict.status if verdict.rpc.id is None else HTTPStatus.OK.value
    return status, {**said, "Content-Type": _JSON}, rpc_error(verdict, verdict.rpc)


def rpc_error(verdict: Verdict, rpc: RpcErrorReply) -> bytes:
    """The same words as a JSON-RPC error: its code is the status, its data are the problem details.

    A code beside those that JSON-RPC keeps for itself is the application's (JSON-RPC 2.0, 5.1).
    """
    said = problem_details(verdict)
    error = {"code": verdict.status, "message": f"{said['code']}: {said['detail']}", "data": said}
    return orjson.dumps({"jsonrpc": "2.0", "id": rpc.id, "error": error})


def denial_headers(verdict: Verdict) -> dict[str, str]:
    """What stands in the head of such an answer besides its length."""
    found = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"}
    if verdict.nonce is not None:
        found["DPoP-Nonce"] = verdict.nonce
    if verdict.status == HTTPStatus.UNAUTHORIZED:
        code = verdict.reasons[0].code if verdict.reasons else ""
        error = code if code in ("use_dpop_nonce", "invalid_dpop_proof") else "invalid_token"
        found["WWW-Authenticate"] = f'DPoP error="{error}", algs="ES256 EdDSA"'
    if verdict.retry_after_s is not None:
        found["Retry-After"] = str(verdict.retry_after_s)
    return found


def _reason_details(reason: Reason) -> dict[str, Any]:
    said: dict[str, Any] = {"code": reason.code, "detail": reason.message}
    if reason.permission is not None:
        said["permission"] = reason.permission.model_dump(mode="json")
    if reason.side is not None:
        said["side"] = reason.side
    return said
