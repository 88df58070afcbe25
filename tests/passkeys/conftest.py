"""A running stack, a sign page, and people at browsers with authenticators."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from playwright.async_api import Browser

from ringfence.dev.stack import Stack
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation
from tests.passkeys.questions import Asked, open_question
from tests.support.sign_page import Site, browser, frozen_bundle, person, site
from tests.support.stack import options_of_stack, realm_in

__all__ = ["browser", "person", "site"]


@pytest.fixture(scope="session")
def stack(kafka: Kafka, redis_server: RedisServer) -> Iterator[Stack]:
    """All services as processes, with passkeys in their trust bundle."""
    with tempfile.TemporaryDirectory(prefix="rf-pk-") as folder:
        bundle = frozen_bundle(Path(folder))
        options = options_of_stack(
            Path(folder),
            kafka,
            redis_server,
            "passkeys",
            environment={"RINGFENCE_POLICY_BUNDLE": str(bundle)},
            sign_page=True,
        )
        with Stack(options) as running:
            yield running


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
