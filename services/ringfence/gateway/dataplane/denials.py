"""Denials for agents as problem details (RFC 9457), with the command that asks for the missing credential."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any, Final

import orjson

from ringfence.gateway.contract import RpcErrorReply, Verdict
from ringfence.gateway.dataplane.git import git_denial
from ringfence.messages.base import permission_argument
from ringfence.messages.codes import Code
from ringfence.messages.credential import Reason
from ringfence.model.mcp.headers import SELF_STATED

MEDIA_TYPE: Final = "application/problem+json"
_JSON: Final = "application/json"
_HTTP_STATUSES: Final = frozenset({HTTPStatus.UNAUTHORIZED, HTTPStatus.NOT_FOUND})
"""MCP clients act on these HTTP statuses: the sender is not authenticated, or the session has ended."""
PROBLEM_TYPE: Final = "urn:ringfence:problem:"
"""The beginning of the type of problem details (RFC 9457), before the code."""
_METHOD_NOT_FOUND: Final = -32601
_UNSUPPORTED_VERSION: Final = -32022
_STATELESS_CODES: Final[Mapping[str, int]] = {
    Code.MCP_HEADER: -32020,
    Code.MCP_VERSION: _UNSUPPORTED_VERSION,
    Code.MCP_UNREADABLE: -32700,
    Code.MCP_BATCH: -32600, Code.MCP_COMPRESSED: -32600, Code.MCP_MEDIA_TYPE: -32600, Code.MCP_INVALID: -32600,
    Code.MCP_META: -32602, Code.MCP_STATE_MISSING: -32602, Code.MCP_STATE_INVALID: -32602,
    Code.MCP_STATE_UNKNOWN: -32602,
    Code.MCP_STATE_OTHER_CALL: -32602, Code.MCP_TASK_UNKNOWN: -32602,
    Code.MCP_METHOD: _METHOD_NOT_FOUND,
}  # fmt: skip
"""The codes that revision 2026-07-28 of MCP has for refusals."""
_FIXED_BY_NEW_CREDENTIAL: Final = frozenset({
    Code.NO_LEASE, Code.BEYOND_LEASE, Code.LEASE_ENDED, Code.LEASE_CUT, Code.SOCKET_OTHER_RUN,
})  # fmt: skip
"""Refusal codes that a new credential may resolve."""


def problem_details(verdict: Verdict) -> dict[str, Any]:
    """The problem details of a denial: the first reason, and all of them under `reasons`.

    `type` is derived from the code of the reason. `instance` is the id of the action, by which audit finds it.
    Denials at targets with rules for models have a `message` too.
    """
    first = verdict.reasons[0] if verdict.reasons else Reason(code=Code.DENIED, message="it is not allowed")
    body: dict[str, Any] = {
        "type": f"{PROBLEM_TYPE}{first.code}",
        "title": HTTPStatus(verdict.status).phrase,
        "status": verdict.status,
        "instance": f"urn:uuid:{verdict.action_id}",
        **_reason_details(first),
    }
    if verdict.target is not None and any(rule.model is not None for rule in verdict.target.requests):
        # OpenAI's SDK shows nothing else of an error.
        body["message"] = f"{first.code}: {first.message}"
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
    permission = permission_argument(target.target_id, (action.verb,), (action.resource,))
    return (
        f"ringfence request --task {verdict.task_id or 'TASK'} --delivery gateway "
        f"--allow {shlex.quote(permission)} --reason WHY"
    )


def denial_answer(verdict: Verdict) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer. The data plane adds `Cache-Control`."""
    headers = {name: value for name, value in denial_headers(verdict).items() if name != "Cache-Control"}
    if verdict.git is not None:
        status, media, content = git_denial(verdict, verdict.git, how_to_ask(verdict))
        return status, {**headers, "Content-Type": media}, content
    if verdict.rpc is None or verdict.status in _HTTP_STATUSES:
        return verdict.status, headers, problem_body(verdict)
    if verdict.rpc.request_state is not None:
        headers.pop("Retry-After", None)
        return HTTPStatus.OK.value, {**headers, "Content-Type": _JSON}, _input_required(verdict.rpc)
    code, status = _rpc_code_and_status(verdict, verdict.rpc)
    return status, {**headers, "Content-Type": _JSON}, rpc_error(verdict, verdict.rpc, code)


def _rpc_code_and_status(verdict: Verdict, rpc: RpcErrorReply) -> tuple[int, int]:
    """The code of a JSON-RPC error, and the HTTP status that it goes with.

    Both are those of the revision, where it has some for the error (MCP 2026-07-28). Otherwise the code is the HTTP
    status: codes outside the range that JSON-RPC reserves are the application's (JSON-RPC 2.0, 5.1).
    """
    reason = verdict.reasons[0].code if verdict.reasons else ""
    if rpc.stateless and reason in _STATELESS_CODES:
        code = _STATELESS_CODES[reason]
        return code, HTTPStatus.NOT_FOUND if code == _METHOD_NOT_FOUND else HTTPStatus.BAD_REQUEST
    return verdict.status, verdict.status if rpc.id is None else HTTPStatus.OK.value


def rpc_error(verdict: Verdict, rpc: RpcErrorReply, code: int) -> bytes:
    details = problem_details(verdict)
    if code == _UNSUPPORTED_VERSION:
        details |= {"supported": list(SELF_STATED), "requested": rpc.requested or ""}
    error = {"code": code, "message": f"{details['code']}: {details['detail']}", "data": details}
    return orjson.dumps({"jsonrpc": "2.0", "id": rpc.id, "error": error})


def _input_required(rpc: RpcErrorReply) -> bytes:
    """The result that tells a client to retry (MCP 2026-07-28): a person is asked, and nothing of the client."""
    result = {"resultType": "input_required", "requestState": rpc.request_state}
    return orjson.dumps({"jsonrpc": "2.0", "id": rpc.id, "result": result})


def denial_headers(verdict: Verdict) -> dict[str, str]:
    """The headers of the answer to a denial, without its length."""
    headers = {"Content-Type": MEDIA_TYPE, "Cache-Control": "no-store"}
    if verdict.nonce is not None:
        headers["DPoP-Nonce"] = verdict.nonce
    if verdict.status == HTTPStatus.UNAUTHORIZED:
        code = verdict.reasons[0].code if verdict.reasons else ""
        error = code if code in (Code.USE_DPOP_NONCE, Code.INVALID_DPOP_PROOF) else Code.INVALID_TOKEN
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
