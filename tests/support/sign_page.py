"""A sign page on a running stack, and people at browsers with authenticators: fixtures that several suites share.

A suite takes them up by name in its `conftest.py`, and has a fixture `stack` of its own with `sign_page=True`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass

import pytest
from playwright.async_api import Browser

from ringfence.dev.processes import StackError
from ringfence.dev.stack import Stack
from tests.passkeys.browser import Person, chromium


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
