"""Whether `regopy`, the Rego engine in a wheel of Microsoft's own, could take the place of regorus (ADR 0086).

`PYTHONPATH=FOLDER python -m bench.regopy_wheel`, after `pip install --target FOLDER regopy==1.5.2`. It prints which
files of the own bundle regopy refuses, how many cases of `tests/policy/cases.py` it answers otherwise than regorus once
the refused expression is rewritten, and the CPU time of one decision of each engine.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import orjson
import regorus
from regopy import Input, Interpreter
from regopy.rego_shared import RegoError

from bench.machine import percentile
from bench.policy import Directory
from ringfence.rego.bundle import Module, load_bundle
from ringfence.rego.engine import ACTION, ISSUANCE, PolicyFailedError, read_result
from ringfence.rego.regorus_programs import compiled
from tests.policy.cases import CASES

_REFUSED, _REWRITTEN = (
    "some at, earlier in segments; at < place",
    "some at; earlier := segments[at]; at < place",
)
_DECISIONS = 1000

Evaluate = Callable[[str, bytes], str | bytes]
"""The result of an entry point for an input, as JSON."""


def _regopy(modules: list[Module]) -> Evaluate:
    interpreter = Interpreter()
    for name, text in modules:
        interpreter.add_module(name, text)
    paths = {entry: entry.removeprefix("data.").replace(".", "/") for entry in (ISSUANCE, ACTION)}
    bundle = interpreter.build(None, list(paths.values()))

    def evaluate(entry_point: str, given: bytes) -> bytes:
        interpreter.set_input(Input(orjson.loads(given)))
        output = interpreter.query_bundle_entrypoint(bundle, paths[entry_point])
        return orjson.dumps(output.results[0].expressions[0])

    return evaluate


def _regorus(modules: list[Module]) -> Evaluate:
    machines = {}
    for entry_point in (ISSUANCE, ACTION):
        machines[entry_point] = regorus.Rvm()
        machines[entry_point].load_program(compiled(modules, entry_point))

    def evaluate(entry_point: str, given: bytes) -> str:
        machines[entry_point].set_input_json(given.decode())
        return str(machines[entry_point].execute())

    return evaluate


def _answer(evaluate: Evaluate, entry_point: str, given: bytes) -> Any:
    try:
        return read_result(evaluate(entry_point, given))
    except (RegoError, RuntimeError, ValueError, PolicyFailedError, TypeError, KeyError, IndexError):
        return "no result"


def _refused(modules: list[Module]) -> list[str]:
    names = []
    for name, text in modules:
        try:
            Interpreter().add_module(name, text)
        except RegoError:
            names.append(name)
    return names


def main() -> None:
    """Print all of it."""
    modules = list(load_bundle().modules)
    print(f"regopy refuses: {', '.join(_refused(modules)) or 'no file'}")
    ours, theirs = _regorus(modules), _regopy([(n, t.replace(_REFUSED, _REWRITTEN)) for n, t in modules])
    pairs = []
    for case in CASES:
        given = orjson.dumps(case.input)
        pairs.append((_answer(ours, case.entry_point, given), _answer(theirs, case.entry_point, given)))
    longer = sum(a != "no result" != b and b.max_ttl_s > a.max_ttl_s for a, b in pairs)
    none = sum(b == "no result" != a for a, b in pairs)
    print(
        f"of {len(CASES)} cases, {sum(a != b for a, b in pairs)} differ: {longer} by a longer life, {none} by no result"
    )
    for name, engine in (("regorus", ours), ("regopy", theirs)):
        took = []
        for given in Directory(1000).inputs(_DECISIONS):
            began = time.thread_time()
            engine(ISSUANCE, given)
            took.append((time.thread_time() - began) * 1e6)
        print(
            f"{name}: p50 {percentile(took, 0.5):.0f} µs, p99 {percentile(took, 0.99):.0f} µs of CPU a decision"
        )


if __name__ == "__main__":
    main()
