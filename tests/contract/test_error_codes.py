"""Every error code is a member of `Code`: it is written once, has a meaning, and is used."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, get_args

import orjson
import pytest

from ringfence.messages.codes import Code, inactive_agent, status_of
from ringfence.messages.credential import Reason
from ringfence.messages.registry import AgentState
from tools.references.error_codes import meanings

ROOT = Path(__file__).parents[2]
SOURCES = [file for file in (ROOT / "services/ringfence").rglob("*.py") if file.name != "codes.py"]
BUNDLE = "".join(
    file.read_text() for file in (ROOT / "deploy/policy").glob("*.rego") if not file.stem.endswith("_test")
)
OF_BUNDLE = set(re.findall(r'(?:"code":\s*|\breason\()"(\w+)"', BUNDLE))


STATUSES: Final[dict[int, set[Code]]] = {
    400: {
        Code.BODY_REFUSED, Code.CONNECT_REFUSED, Code.GIT_REQUEST_INVALID, Code.HANDLE_TWICE, Code.HOST_DISAGREES,
        Code.HOST_INVALID, Code.INVALID_REQUEST, Code.MALFORMED_HTTP, Code.MCP_STATE_MISSING, Code.MCP_STATE_OTHER_CALL,
        Code.MCP_STATE_UNKNOWN, Code.MCP_TASK_UNKNOWN, Code.OVERRIDE_REFUSED, Code.QUERY_INVALID,
    },
    401: {
        Code.CERTIFICATE_UNKNOWN, Code.HANDLE_MALFORMED, Code.HANDLE_UNKNOWN, Code.INVALID_DPOP_PROOF,
        Code.NO_CREDENTIALS, Code.PROOF_BY_STRANGER, Code.PROOF_MISSING, Code.PROOF_OTHER_KEY,
        Code.UNAUTHENTICATED, Code.USE_DPOP_NONCE,
    },
    403: {
        Code.CERTIFICATE_OTHER_AGENT, Code.FORBIDDEN, Code.INSUFFICIENT_SCOPE, Code.SOCKET_OTHER_AGENT,
        Code.SOCKET_OTHER_RUN, Code.SOCKET_OTHER_TASK,
    },
    404: {
        Code.API_PATH_UNKNOWN, Code.MCP_SESSION_UNKNOWN, Code.NOT_FOUND, Code.REQUEST_UNKNOWN,
        Code.TARGET_MISSING,
    },
    405: {Code.METHOD_UNEXPECTED},
    407: {Code.PROXY_AUTHORIZATION_MISSING},
    408: {Code.BODY_TIMEOUT, Code.HEAD_TIMEOUT},
    409: {Code.ID_TAKEN},
    413: {Code.BODY_UNSEEN, Code.TOO_LARGE},
    415: {Code.CONTENT_TYPE_UNEXPECTED},
    417: {Code.EXPECTATION_FAILED},
    421: {Code.HOST_UNKNOWN},
    429: {Code.APPROVALS_PENDING_LIMIT, Code.RELAYS_LIMIT, Code.TOO_MANY_REQUESTS, Code.WAITING_LIMIT},
    431: {Code.HEAD_TOO_LARGE, Code.TOO_MANY_FIELDS},
    502: {
        Code.MCP_SESSION_TAKEN, Code.TARGET_COMPRESSES, Code.TARGET_GONE, Code.TARGET_MISCONFIGURED,
        Code.TARGET_NOT_VERIFIED, Code.TARGET_TOO_LARGE, Code.TARGET_UNREACHABLE, Code.TARGET_UNREADABLE,
    },
    503: {
        Code.APPROVAL_UNAVAILABLE, Code.KAFKA_UNAVAILABLE, Code.PROOFS_FULL, Code.STALE_VIEW,
        Code.TARGET_NOWHERE, Code.TASK_SOCKET_MISSING, Code.TOO_MANY_CONNECTIONS, Code.UNAVAILABLE,
        Code.UNDECIDED,
    },
    504: {Code.TARGET_TIMEOUT},
}  # fmt: skip
"""The codes whose answers have an HTTP status of their own (RFC 9110)."""


def literals(tree: ast.AST) -> Iterator[ast.expr]:
    """Arguments and class attributes with the name `code`, and what an attribute `code` is compared with."""
    for node in ast.walk(tree):
        match node:
            case ast.keyword(arg="code", value=value):
                yield value
            case ast.ClassDef(body=body):
                yield from (
                    one.value
                    for one in body
                    if isinstance(one, ast.Assign) and ast.unparse(one.targets[0]) == "code"
                )
            case ast.Compare(left=ast.Attribute(attr="code"), comparators=others):
                yield from others
            case _:
                pass


def test_each_code_is_written_once() -> None:
    assert len(Code.__members__) == len(list(Code))
    found = {
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for file in SOURCES
        for node in literals(ast.parse(file.read_text()))
        for part in ast.walk(node)
        if isinstance(part, ast.Constant) and part.value in Code.__members__.values()
    }
    assert found == set()


def test_each_code_has_a_meaning_that_is_a_sentence() -> None:
    said = {code: meaning for _, code, meaning in meanings()}
    assert list(said) == list(Code)
    assert [
        code for code, meaning in said.items() if not (meaning[0].isupper() and meaning.endswith("."))
    ] == []


def test_codes_are_sorted_within_their_subject() -> None:
    in_order = [(subject, str(code)) for subject, code, _ in meanings()]
    subjects = list(dict.fromkeys(subject for subject, _ in in_order))
    assert in_order == sorted(in_order, key=lambda one: (subjects.index(one[0]), one[1]))


def test_each_code_is_used() -> None:
    used = set(re.findall(r"\bCode\.([A-Z_]+)", "".join(file.read_text() for file in SOURCES)))
    of_agents = {inactive_agent(status) for status in ("registered", "suspended", "decommissioned")}
    assert [code for code in Code if code.name not in used and code not in OF_BUNDLE | of_agents] == []


def test_the_codes_of_the_default_bundle_are_members() -> None:
    assert OF_BUNDLE - set(Code) == set()


def test_each_status_of_an_inactive_agent_has_a_code() -> None:
    statuses = set(get_args(AgentState.model_fields["status"].annotation)) - {"active"}
    assert {inactive_agent(status) for status in statuses} == {f"agent_{status}" for status in statuses}


@pytest.mark.parametrize("status", STATUSES)
def test_codes_have_their_http_status(status: int) -> None:
    assert {code for code in Code if status_of(code, 0) == status} == STATUSES[status]
    assert {status_of(str(code), 0) for code in STATUSES[status]} == {status}


def test_the_status_of_any_other_code_is_the_default() -> None:
    others = set(Code).difference(*STATUSES.values())
    assert {status_of(code, 403) for code in (*others, "a_code_of_a_bundle")} == {403}


@pytest.mark.parametrize("code", [Code.GRANT_ENDED, Code.TOO_LARGE, Code.INVALID_VALUE])
def test_a_code_is_written_as_a_plain_string(code: Code) -> None:
    text = f'{{"code":"{code.value}"}}'
    assert json.dumps({"code": code}, separators=(",", ":")) == text
    assert orjson.dumps({"code": code}).decode() == text
    reason = Reason(code=code, message="why")
    assert type(reason.code) is str, "as one that was received"
    assert reason.model_dump_json(exclude_none=True) == f'{{"code":"{code.value}","message":"why"}}'
    assert (f"{code}", str(code), f"{code:>1}") == (code.value,) * 3
