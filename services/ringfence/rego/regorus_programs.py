"""Rego by regorus, in this process: compiling a bundle and running its tests.

What stands here may hang or end the process, as a bundle likes: services call it in a worker (`workers`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import regorus

from ringfence.rego.bundle import BundleError, MissingRuleError, Module

_PLACE = re.compile(r"--> (.+?:\d+:\d+)")
_ERROR = re.compile(r"^error: (.+)$", re.MULTILINE)
_RULE = re.compile(r"^; ===== RULE: (\S+) =====$", re.MULTILINE)
_CALL = re.compile(r"(?:CallRule|FunctionCall) +r\d+ ← ([^\s(]+)")
_PACKAGE = re.compile(r"^package (\S+)", re.MULTILINE)
_TEST = re.compile(r"^(test_\w+)", re.MULTILINE)
_CONDITIONAL = re.compile(r"^(\w+) (?:.*? )?(?:if|contains)\b", re.MULTILINE)
_NO_RULE = "not a valid rule path"
_NAMED = 5
"""So many failing tests are named in one message."""


def compiled(modules: Sequence[Module], entry_point: str) -> Any:
    """The bundle as a program for `regorus.Rvm`. Raises BundleError if it does not compile, naming file and line;
    MissingRuleError, a subclass, if it has no such rule.
    """
    try:
        program = regorus.Program.compile_from_modules("{}", list(modules), [entry_point])
    except RuntimeError as error:
        kind = MissingRuleError if _NO_RULE in str(error) else BundleError
        raise kind(f"the policy bundle does not compile: {_explained(str(error), entry_point)}") from None
    if circle := _circle(program.generate_listing()):
        raise BundleError(
            "the policy bundle does not compile: rules refer to themselves in a circle: "
            + " -> ".join(circle)
        )
    return program


@dataclass(frozen=True, slots=True)
class Outcome:
    """One rule `test_...` of a bundle, and how it went."""

    name: str
    """As in `data.ringfence.scope_test.test_one_target`."""
    passed: bool
    problem: str = ""
    """What went wrong where it could not be evaluated."""


@dataclass(frozen=True, slots=True)
class Covered:
    """The lines of one file of rules that tests evaluated, and those that none did."""

    file: str
    covered: tuple[int, ...]
    missed: tuple[int, ...]

    @property
    def percent(self) -> float:
        """100 where there is nothing to evaluate."""
        lines = len(self.covered) + len(self.missed)
        return 100 * len(self.covered) / lines if lines else 100.0


def run_tests(
    modules: Sequence[Module], tests: Sequence[Module], *, coverage: bool = False
) -> tuple[list[Outcome], list[Covered]]:
    """Run a bundle's tests; the coverage is empty where it was not asked for. Raises BundleError."""
    engine = regorus.Engine()
    engine.set_gather_prints(True)
    for name, text in (*modules, *tests):
        try:
            engine.add_policy(name, text)
        except RuntimeError as error:
            raise BundleError(f"the policy bundle does not compile: {_explained(str(error), name)}") from None
    engine.set_enable_coverage(coverage)
    outcomes = [_tested(engine, name) for name in _test_names(tests)]
    return outcomes, _coverage(engine, modules) if coverage else []


def check_tests(modules: Sequence[Module], tests: Sequence[Module]) -> None:
    """Raises BundleError if a test of the bundle fails, naming the first of them."""
    outcomes, _ = run_tests(modules, tests)
    failed = [outcome.name for outcome in outcomes if not outcome.passed]
    if failed:
        more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
        raise BundleError(
            f"the policy bundle fails {len(failed)} of its {len(outcomes)} tests: "
            + ", ".join(failed[:_NAMED]) + more
        )  # fmt: skip


def fired(modules: Sequence[Module], input_json: str, *, leave_out: str) -> list[tuple[str, Any]]:
    """The rules with a condition that holds for an input, and what they say: `("identity.agent_active", True)`.

    `leave_out` is an entry point whose package is not of interest. Raises BundleError if the bundle does not
    compile, or cannot be evaluated.
    """
    engine = regorus.Engine()
    engine.set_gather_prints(True)
    found: list[tuple[str, Any]] = []
    try:
        for name, text in modules:
            engine.add_policy(name, text)
        engine.set_input_json(input_json)
        for package, name in _conditional(modules):
            value = json.loads(engine.eval_rule_as_json(f"data.{package}.{name}"))
            holds = value not in (None, False, "<undefined>", [], {})
            if holds and leave_out.rpartition(".")[0] != f"data.{package}":
                found.append((f"{package.rpartition('.')[2]}.{name}", value))
    except RuntimeError as error:
        raise BundleError(f"the policy bundle cannot be evaluated: {first_line(error)}") from None
    return found


def _conditional(modules: Iterable[Module]) -> list[tuple[str, str]]:
    """(package, name) of the rules that have a condition, or that several lines add to."""
    found: dict[tuple[str, str], None] = {}
    for _, text in modules:
        if package := _PACKAGE.search(text):
            found |= {(package[1], name): None for name in _CONDITIONAL.findall(text) if name != "default"}
    return list(found)


def _test_names(tests: Iterable[Module]) -> list[str]:
    found: dict[str, None] = {}
    for _, text in tests:
        if package := _PACKAGE.search(text):
            found |= {f"data.{package[1]}.{name}": None for name in _TEST.findall(text)}
    return list(found)


def _tested(engine: Any, name: str) -> Outcome:
    try:
        return Outcome(name, engine.eval_rule(name) is True)
    except RuntimeError as error:
        return Outcome(name, False, _explained(str(error), name))


def _coverage(engine: Any, modules: Sequence[Module]) -> list[Covered]:
    report = json.loads(engine.get_coverage_report_as_json())
    rules = {name for name, _ in modules}
    return sorted(
        (
            Covered(file["path"], tuple(sorted(file["covered"])), tuple(sorted(file["not_covered"])))
            for file in report["files"]
            if file["path"] in rules
        ),
        key=lambda covered: covered.file,
    )


def _circle(listing: str) -> tuple[str, ...]:
    """Rules that call each other in a circle, which OPA refuses to compile. regorus compiles them, and evaluating them
    overflows its stack: found in the listing of the compiled program, before it ever runs.
    """
    calls: dict[str, list[str]] = {}
    for name, body in zip(*[iter(_RULE.split(listing)[1:])] * 2, strict=True):
        calls.setdefault(name, []).extend(_CALL.findall(body))
    cleared: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> tuple[str, ...]:
        if name in path:
            return (*path[path.index(name) :], name)
        if name not in cleared:
            for called in calls.get(name, ()):
                if circle := visit(called, (*path, name)):
                    return circle
            cleared.add(name)
        return ()

    return next((circle for name in calls if (circle := visit(name, ()))), ())


def _explained(text: str, entry_point: str) -> str:
    """File, line and cause out of what regorus says: the rest is a picture, and a trace of its own code."""
    if _NO_RULE in text:
        return f"it has no rule {entry_point}"
    place, cause = _PLACE.search(text), _ERROR.search(text)
    if place and cause:
        return f"{place[1]}: {cause[1]}"
    return first_line(text)


def first_line(error: object) -> str:
    """The first line of an error that says something, shortened."""
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), "no reason was given")[:300]
