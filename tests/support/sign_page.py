"""A sign page on a running stack, and people at browsers with authenticators: fixtures that several suites share.

A suite takes them up by name in its `conftest.py`, and has a fixture `stack` of its own with `sign_page=True`.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.async_api import Browser

from ringfence.dev.processes import StackError
from ringfence.dev.stack import Stack
from tests.passkeys.browser import Person, chromium

FROZEN = "although it is frozen"
"""The reason that a `frozen_bundle` denies, so that only break glass helps."""
_DEFAULT_BUNDLE = Path(__file__).parents[2] / "deploy" / "policy"
_FROZEN_RULE = f"""package ringfence.limits

deny contains {{"code": "frozen", "message": "everything is frozen"}} if input.request.reason == "{FROZEN}"
"""


def frozen_bundle(folder: Path) -> Path:
    """Make the default policy bundle in a folder, with a rule that denies whatever is asked for because of `FROZEN`."""
    bundle = folder / "policy"
    shutil.copytree(_DEFAULT_BUNDLE, bundle, ignore=shutil.ignore_patterns("*_test.rego"))
    (bundle / "frozen.rego").write_text(_FROZEN_RULE)
    return bundle


@dataclass(frozen=True, slots=True)
class Site:
    """The origins of a stack: where people sign, and where its console is or would be."""

    sign: str
    session: str
    environment: dict[str, str]
    """For the command line."""


@pytest.fixture(scope="session")
async def browser(request: pytest.FixtureRequest) -> AsyncIterator[Browser]:
    """Chromium. A run that wants it and cannot have it fails."""
    async with AsyncExitStack() as exits:
        try:
            started = await exits.enter_async_context(chromium())
        except StackError as error:
            request.session.shouldfail = error.message
            pytest.fail(error.message, pytrace=False)
        yield started


@pytest.fixture(scope="session")
def site(stack: Stack) -> Site:
    """Where people sign on this stack."""
    return Site(stack.origins["sign"], stack.origins["session"], stack.environment())


@pytest.fixture
async def person(browser: Browser) -> AsyncIterator[Person]:
    """Somebody at a browser that has seen no page before."""
    made = await Person.at(browser)
    yield made
    await made.leave()
