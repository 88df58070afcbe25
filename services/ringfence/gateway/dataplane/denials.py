"""Denials for agents as problem details (RFC 9457), with the command that asks for the missing credential."""

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
"""MCP clients act on these HTTP statuses: the sender is not authenticated, or the session has ended."""
_TYPE: Final = "urn:ringfence:problem:"
_FIXED_BY_NEW_CREDENTIAL: Final = frozenset({
    "no_lease", "beyond_lease", "lease_ended", "lease_cut", "socket_other_run",
})  # fmt: skip
"""Refusal codes that a new credential may resolve."""


def problem_details(verdict: Verdict) -> dict[str, Any]:
    """The problem details of a denial: the first reason, and all of them under `reasons`.

    `type` is derived from the code of the reason. `instance` is the id of the action, by which audit finds it.
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
    """The problem details as JSON, of `MEDIA_TYPE`."""
    return orjson.dumps(problem_details(verdict))


def how_to_ask(verdict: Verdict) -> str | None:
    """The command that asks for the missing credential; None if a credential would not resolve every reason."""
    target, action = verdict.target, verdict.action
    if (
        target is None
        or action is None
        or not all(reason.code in _FIXED_BY_NEW_CREDENTIAL for reason in verdict.reasons)
    ):
        return None  # a credential would not resolve every reason
    permission = f"{target.target_id}:{action.verb}:{action.resource}"
    if "," in action.resource or ":" in action.resource:
        permission_json = {"target": target.target_id, "verbs": [action.verb], "resources": [action.resource]}
        permission = orjson.dumps(permission_json).decode()
    return (
        f"ringfence request --task {verdict.task_id or 'TASK'} --delivery gateway "
        f"--allow {shlex.quote(permission)} --reason WHY"
    )


def denial_answer(verdict: Verdict) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer. The data plane adds `Cache-Control`."""
    headers = {name: value for name, value in denial_headers(verdict).items() if name != "Cache-Control"}
    if verdict.rpc is None or verdict.status in _HTTP_STATUSES:
        return verdict.status, headers, problem_body(verdict)
    status = verdict.status if verdict.rpc.id is None else HTTPStatus.OK.value
    return status, {**headers, "Content-Type": _JSON}, rpc_error(verdict, verdict.rpc)


def rpc_error(verdict: Verdict, rpc: RpcErrorReply) -> bytes:
    """The problem details as a JSON-RPC error: its code is the HTTP status.

    Codes outside the range that JSON-RPC reserves are the application's (JSON-RPC 2.0, 5.1).
    """
    details = problem_details(verdict)
    error = {"code": verdict.status, "message": f"{details['code']}: {details['detail']}", "data": details}
    return orjson.dumps({"jsonrpc": "2.0", "id": rpc.id, "error": error})


def denial_headers(verdict: Verdict) -> dict[str, str]:
    """The headers of the answer to a denial, without its length."""
    headers = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"}
    if verdict.nonce is not None:
        headers["DPoP-Nonce"] = verdict.nonce
    if verdict.status == HTTPStatus.UNAUTHORIZED:
        code = verdict.reasons[0].code if verdict.reasons else ""
        error = code if code in ("use_dpop_nonce", "invalid_dpop_proof") else "invalid_token"
        headers["WWW-Authenticate"] = f'DPoP error="{error}", algs="ES256 EdDSA"'
    if verdict.retry_after_s is not None:
        headers["Retry-After"] = str(verdict.retry_after_s)
    return headers


def _reason_details(reason: Reason) -> dict[str, Any]:
    details: dict[str, Any] = {"code": reason.code, "detail": reason.message}
    if reason.permission is not None:
        details["permission"] = reason.permission.model_dump(mode="json")
    if reason.side is not None:
        details["side"] = reason.side
    return details
