"""Each built-in kind of credential is declared once (`CREDENTIAL_KINDS`), and each place that needs it has it.

A new kind is added to that list first: what fails here then is the list of what is left to do.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ringfence.backends import BackendContext, built_in
from ringfence.cli.commands.target_templates import TEMPLATES
from ringfence.client.agent.credentials import CLASSES, VARIABLES
from ringfence.gateway.domain import INJECTABLE
from ringfence.model.target_settings import CREDENTIAL_KINDS

ROOT = Path(__file__).parents[2]
BACKENDS = built_in(BackendContext("acme.example", "https://issuer.acme.example"))
HANDED_OUT = {name for name, kind in CREDENTIAL_KINDS.items() if kind.handed_out}


def test_each_has_a_backend_which_says_the_same() -> None:
    assert BACKENDS.keys() == CREDENTIAL_KINDS.keys()
    for name, kind in CREDENTIAL_KINDS.items():
        assert BACKENDS[name].enforced_by == ("target" if kind.handed_out else "gateway"), name


def test_the_sdk_has_a_class_and_variables_for_each_that_is_handed_out() -> None:
    assert CLASSES.keys() == HANDED_OUT
    assert VARIABLES.keys() == HANDED_OUT


def test_gateway_only_kinds_are_injectable() -> None:
    assert CREDENTIAL_KINDS.keys() - HANDED_OUT <= INJECTABLE <= CREDENTIAL_KINDS.keys()


def test_each_has_a_template_of_target_add() -> None:
    assert {template.backend for template in TEMPLATES.values()} == CREDENTIAL_KINDS.keys()


@pytest.mark.parametrize("name", CREDENTIAL_KINDS)
def test_each_has_its_page_and_its_row_among_the_targets(name: str) -> None:
    overview = (ROOT / "docs/targets.md").read_text()
    assert (ROOT / f"docs/targets/{name}.md").is_file()
    assert re.search(rf"^\| \[`{name}`\]\(targets/{name}\.md\) \| ", overview, re.MULTILINE)


@pytest.mark.parametrize("name", CREDENTIAL_KINDS)
def test_each_goes_through_the_conformance_suite(name: str) -> None:
    """Which starts from the fixture of its real server."""
    assert f"def {name}_kind(" in (ROOT / "tests/backends/conftest.py").read_text()
