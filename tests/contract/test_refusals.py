"""Each error code has a row in a table of refusals: a small change of a valid input, and the code that it leads to.

A table is a parametrized test under `tests/unit` with an argument `code` or `codes`. Its rows are written in the call
of `parametrize`, or in a list or a dict of the same module. Tables by package are in `tests/unit/refusals`. The default
policy bundle has its own table: `tests/policy/cases.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from ringfence.messages.codes import Code

TESTS: Final = Path(__file__).parents[1]
CODE_ARGUMENTS: Final = frozenset(("code", "codes"))
WITHOUT_A_ROW: Final[frozenset[Code]] = frozenset({
    Code.DEADLINE_PASSED, Code.FENCED, Code.BACKEND_CANNOT,
    Code.CANNOT_LISTEN, Code.CONSUMER_HALTED, Code.ERROR, Code.EXTRA_MISSING, Code.FORBIDDEN,
    Code.INTERNAL, Code.MESSAGE_INVALID, Code.NOT_FOUND, Code.NOT_PRIVATE, Code.RECORDS_GONE,
    Code.TOPIC_REFUSED, Code.KEY_UNCOUNTED, Code.NOT_A_JWE, Code.REPLY_UNFIT, Code.ALREADY_DECIDED,
    Code.CHAIN_INCOMPLETE, Code.REFUSED, Code.REPLAYED, Code.TABLE_DIFFERS, Code.NOT_AUDITOR,
    Code.WIDENED_ALONE, Code.WIDENED_BY_ROOT,
    Code.ATTESTATION_INVALID, Code.KEY_ADDED, Code.KEY_ENDING, Code.KEY_SHARED, Code.ENROL_REFUSED,
    Code.ISSUER_NOT_UNDERSTOOD, Code.TOKEN_REPLAYED, Code.TOO_MANY_PARTS, Code.BREAK_GLASS,
    Code.BUNDLE_FORGOTTEN, Code.BUNDLE_REFUSED, Code.CONNECTION_STALE, Code.HOLDS_TOO_MUCH,
    Code.PARTITION_UNEXPECTED, Code.REQUESTS_SHED, Code.WITHDRAWN, Code.WORKER_LOST,
    Code.APPROVAL_REPLAYED, Code.APPROVAL_UNAVAILABLE,
    Code.APPROVAL_USED, Code.APPROVALS_PENDING_LIMIT, Code.APPROVED_ALREADY, Code.NOT_REQUESTER,
    Code.NOT_SIGNED, Code.GATEWAY_MISSING, Code.LEASE_RECORD_BROKEN, Code.MINT_TOO_SLOW,
    Code.BACKEND_INVALID, Code.RULE_NOT_UNDERSTOOD, Code.ORPHAN_UNDONE, Code.REVOCATION_OVERDUE,
    Code.BODY_TIMEOUT, Code.CLIENT_GONE, Code.EXPECTATION_FAILED, Code.FORWARD_NOT_RELAYED, Code.GONE,
    Code.HEAD_TIMEOUT, Code.KAFKA_UNAVAILABLE, Code.OBSERVE_MODE, Code.STDIO_OUTSIDE_RUN,
    Code.TARGET_COMPRESSES, Code.TARGET_GONE, Code.TARGET_NOT_VERIFIED, Code.TARGET_TIMEOUT,
    Code.TARGET_UNREACHABLE, Code.TLS_FAILED, Code.TOO_MANY_CONNECTIONS, Code.MCP_ID_TAKEN,
    Code.MCP_SEVERAL_APPROVALS, Code.CLAIM_LOST, Code.COMMAND_NOT_STARTED, Code.CONTAINER_ENGINE_FAILED,
    Code.CONTROL_LOST, Code.EXCHANGE_REFUSED, Code.GATEWAY_SOCKET_MISSING, Code.ORDER_EXPIRED,
    Code.QUEUE_FULL, Code.RUN_STOPPED, Code.SANDBOX_FAILED, Code.SANDBOX_UNAVAILABLE, Code.SERVER_GONE,
    Code.STREAM_ENDED, Code.EPOCH_OVER, Code.NOT_CHAINED, Code.REVIEW_REFUSED, Code.VERSION_FELL,
    Code.STANDING, Code.API_FAILED, Code.HTTP_STATUS, Code.NOT_ANSWERED, Code.NOTHING_PENDING,
    Code.TASK_SOCKET_MISSING, Code.TIMEOUT, Code.INACTIVE, Code.TOKEN_REJECTED, Code.CANCELLED,
    Code.NOT_A_HANDLE, Code.ABORTED, Code.KAFKA_FAILED, Code.SCAN_FAILED, Code.STACK_FAILED,
    Code.STORY_BROKEN, Code.ACCESS_DENIED, Code.AUTHENTICATION_FAILED,
    Code.INVALID_VALUE, Code.SIGNAL_REFUSED, Code.TOKEN_UNKNOWN, Code.WEBHOOK_FAILED,
})  # fmt: skip
"""The codes that have no row yet. It only shrinks."""


def codes_in(node: ast.expr) -> Iterator[str]:
    """Every code that is written in an expression: as a member of `Code`, or as a string."""
    for part in ast.walk(node):
        match part:
            case ast.Attribute(value=ast.Name(id="Code"), attr=name):
                yield Code[name]
            case ast.Constant(value=str(code)) if code in Code.__members__.values():
                yield code
            case _:
                pass


def rows_of(node: ast.expr, names: dict[str, ast.expr]) -> list[ast.expr]:
    """The rows of a table: each an expression. `names` are the variables of its module."""
    match node:
        case ast.Name(id=name) if name in names:
            return rows_of(names[name], names)
        case ast.Call(func=ast.Attribute(value=ast.Name(id=name), attr="items")) if name in names:
            return rows_of(names[name], names)
        case ast.List(elts=rows) | ast.Tuple(elts=rows):
            return rows
        case ast.Dict(keys=keys, values=values):
            return [ast.Tuple([key, value]) for key, value in zip(keys, values, strict=True) if key]
        case _:
            return []


def codes_of_table(call: ast.Call, names: dict[str, ast.expr]) -> Iterator[str]:
    """The codes in the rows of one call of `parametrize`."""
    arguments = ast.literal_eval(call.args[0])
    if isinstance(arguments, str):
        arguments = [name.strip() for name in arguments.split(",")]
    for place in (place for place, name in enumerate(arguments) if name in CODE_ARGUMENTS):
        for row in rows_of(call.args[1], names):
            match row:
                case ast.Call(args=cells):  # pytest.param
                    yield from codes_in(cells[place])
                case ast.Tuple(elts=cells) if len(arguments) > 1:
                    yield from codes_in(cells[place])
                case _:
                    yield from codes_in(row)


def codes_of_module(text: str) -> set[str]:
    """The codes in the tables of a test module."""
    tree = ast.parse(text)
    names: dict[str, ast.expr] = {}
    for node in tree.body:
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value):
                names[name] = value
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                names[name] = value
            case _:
                pass
    return {
        code
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.parametrize"
        for code in codes_of_table(decorator, names)
    }


def codes_of_cases(text: str) -> set[str]:
    """The codes that the cases of a policy bundle expect: of denials, and of notes."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Call(func=ast.Name(id="_case" | "_action"), args=[_, _, *denials], keywords=keywords):
                notes = [one.value for one in keywords if one.arg == "notes"]
                found.update(code for part in (*denials, *notes) for code in codes_in(part))
            case ast.Dict(keys=keys, values=values):
                for key, value in zip(keys, values, strict=True):
                    if isinstance(key, ast.Constant) and key.value == "notes":
                        found.update(codes_in(value))
            case _:
                pass
    return found


def test_each_code_has_a_row() -> None:
    rows = codes_of_cases((TESTS / "policy/cases.py").read_text())
    for file in (TESTS / "unit").rglob("test_*.py"):
        rows |= codes_of_module(file.read_text())
    assert [code for code in Code if code not in rows | WITHOUT_A_ROW] == [], "add a row"
    assert [code for code in Code if code in rows & WITHOUT_A_ROW] == [], "remove them from WITHOUT_A_ROW"


def test_rows_are_found_in_each_form_of_a_table() -> None:
    text = """
REFUSALS: dict[Code, object] = {Code.EXPIRED: "gone"}

@pytest.mark.parametrize(("code", "ask"), REFUSALS.items(), ids=REFUSALS)
def test_a(code, ask): ...

@pytest.mark.parametrize(("fields", "codes"), [({"ttl": 1}, ["too_old"]), pytest.param({}, "denied", id="timeout")])
def test_b(fields, codes): ...

@pytest.mark.parametrize("code", ["not_yet"])
@pytest.mark.parametrize("target", ["policy"])
def test_c(code, target): ...
"""
    assert codes_of_module(text) == {"expired", "too_old", "denied", "not_yet"}
