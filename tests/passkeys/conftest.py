"""A running stack, a sign page, and people at browsers with authenticators."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from playwright.async_api import Browser

from ringfence.dev.processes import StackError
from ringfence.dev.stack import Stack, StackOptions
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.passkeys.browser import Person, chromium
from tests.passkeys.organisation import Organisation
from tests.passkeys.questions import Asked, open_question
from tests.support.stack import realm_in

FROZEN = "although it is frozen"
"""The reason that the bundle of this stack denies."""
DEFAULT_BUNDLE = Path(__file__).parents[2] / "deploy" / "policy"
_FROZEN_RULE = f"""package ringfence.limits

deny contains {{"code": "frozen", "message": "everything is frozen"}} if input.request.reason == "{FROZEN}"
"""


@dataclass(frozen=True, slots=True)
class Site:
    """The origins of this stack: where people sign, and where a console would be."""

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
def stack(kafka: Kafka, redis_server: RedisServer) -> Iterator[Stack]:
    """All services as processes, with passkeys in their trust bundle."""
    with tempfile.TemporaryDirectory(prefix="rf-pk-") as folder:
        bundle = Path(folder) / "policy"
        shutil.copytree(DEFAULT_BUNDLE, bundle, ignore=shutil.ignore_patterns("*_test.rego"))
        (bundle / "frozen.rego").write_text(_FROZEN_RULE)
        options = StackOptions(
            Path(folder) / "state",
            trust_domain="acme.example",
            kafka=kafka.bootstrap,
            embedded_broker=kafka.embedded,
            redis_url=redis_server.url,
            topic_prefix="passkeys",
            redis_prefix="passkeys",
            keep_bytes=1024 * 1024,
            environment={"RINGFENCE_POLICY_BUNDLE": str(bundle)},
            sign_page=True,
        )
        with Stack(options) as running:
            yield running


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


@pytest.fixture
async def organisation(stack: Stack, site: Site, tmp_path: Path) -> AsyncIterator[Organisation]:
    """A small organisation of this test's own, in which sam has no key file."""
    async with realm_in(stack) as realm, Organisation(realm, site.environment, tmp_path) as made:
        yield made


@pytest.fixture(scope="module")
async def asked(
    stack: Stack, site: Site, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Asked]:
    """A question that is in order, for all these tests."""
    somebody = await Person.at(browser)
    async with (
        realm_in(stack) as realm,
        Organisation(realm, site.environment, tmp_path_factory.mktemp("asked")) as organisation,
    ):
        user_id = await organisation.sponsor(somebody)
        async with open_question(organisation, site.sign, user_id) as question:
            yield question
    await somebody.leave()
