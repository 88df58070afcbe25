"""No rule of the bundle can be changed without a case that notices, on every engine."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
import regorus

from ringfence.rego.bundle import BundleError, Module, load_bundle
from ringfence.rego.engine import ACTION, CEILING, ISSUANCE, PolicyFailedError, result_of
from ringfence.rego.regorus_programs import compiled
from tests.policy.cases import CASES, Case
from tests.policy.mutants import Mutant, mutants_of, rules_of
from tests.policy.opa_server import running_opa

MODULES = load_bundle().modules


def _right(case: Case, answer: Any) -> bool:
    try:
        found = result_of(answer)
    except PolicyFailedError:
        return False
    return case.agrees(found)


class Regorus:
    """A bundle, compiled in this process."""

    def __init__(self, modules: list[Module]) -> None:
        """Raises BundleError."""
        self._machines = {}
        for entry_point in (ISSUANCE, ACTION, CEILING):
            machine = self._machines[entry_point] = regorus.Rvm()
            machine.load_program(compiled(modules, entry_point))

    def answer(self, case: Case) -> Any:
        machine = self._machines[case.entry_point]
        machine.set_input_json(orjson.dumps(case.input).decode())
        try:
            return orjson.loads(machine.execute())
        except RuntimeError as error:
            return str(error)

    def first_wrong(self, cases: tuple[Case, ...]) -> Case | None:
        return next((case for case in cases if not _right(case, self.answer(case))), None)


class Opa:
    """An OPA server without a bundle, whose modules can be replaced one by one."""

    def __init__(self, url: str) -> None:
        self._http = httpx.Client(base_url=url, trust_env=False, timeout=60)
        for module in MODULES:
            assert self.put(module)

    def put(self, module: Module) -> bool:
        """False where it does not compile; then the one before it stays."""
        return self._http.put(f"/v1/policies/{module[0]}", content=module[1]).is_success

    def answer(self, case: Case) -> Any:
        path = f"/v1/{case.entry_point.replace('.', '/')}"
        answered = self._http.post(path, content=orjson.dumps({"input": case.input}))
        return answered.json().get("result")

    def first_wrong(self, cases: tuple[Case, ...]) -> Case | None:
        return next((case for case in cases if not _right(case, self.answer(case))), None)


def _with(mutant: Mutant) -> list[Module]:
    return [(name, mutant.text if name == mutant.file else text) for name, text in MODULES]


@pytest.fixture(scope="session")
def caught() -> dict[Mutant, Case | None]:
    """By mutant, the first case that notices it (regorus). Those that do not compile are left out."""
    found: dict[Mutant, Case | None] = {}
    for module in MODULES:
        for mutant in mutants_of(module):
            try:
                found[mutant] = Regorus(_with(mutant)).first_wrong(CASES)
            except BundleError:
                continue
    return found


def _rules() -> set[tuple[str, str]]:
    return {(module[0], name) for module in MODULES for name, _, _ in rules_of(module)}


def test_the_unchanged_bundle_passes():
    assert Regorus(list(MODULES)).first_wrong(CASES) is None


def test_every_mutant_is_noticed(caught: dict[Mutant, Case | None]):
    unnoticed = [str(mutant) for mutant, case in caught.items() if case is None]
    assert len(caught) > 10 * len(MODULES)
    assert not unnoticed, "\n".join(unnoticed)


def test_every_rule_has_a_mutant_that_is_noticed(caught: dict[Mutant, Case | None]):
    noticed = {(mutant.file, mutant.rule) for mutant, case in caught.items() if case is not None}
    assert _rules() - noticed == set()


@pytest.mark.opa
def test_opa_notices_the_same(opa: Path, tmp_path: Path, caught: dict[Mutant, Case | None]):
    """By the case that regorus noticed it by."""
    noticed: set[tuple[str, str]] = set()
    unnoticed: list[str] = []
    with running_opa(opa, tmp_path) as url:
        server = Opa(url)
        assert server.first_wrong(CASES) is None
        for module, mutants in _by_module(caught):
            for mutant, case in mutants:
                if not server.put((mutant.file, mutant.text)):
                    continue  # OPA refuses more than regorus does
                if server.first_wrong((case,)) is None:
                    unnoticed.append(f"{mutant}, by {case.name}")
                else:
                    noticed.add((mutant.file, mutant.rule))
            assert server.put(module)
    assert not unnoticed, "\n".join(unnoticed)
    assert _rules() - noticed == set()


def _by_module(caught: dict[Mutant, Case | None]) -> Iterator[tuple[Module, list[tuple[Mutant, Case]]]]:
    for module in MODULES:
        yield module, [(m, case) for m, case in caught.items() if m.file == module[0] and case is not None]
