"""Changes that wait for a second person: from the console's button, by a touch on the sign page, to the registry."""

from __future__ import annotations

import asyncio
import json
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.async_api import expect

from ringfence.client.admin.trust_setup import (
    SERVICE_ROLES,
    load_root_and_bundle,
    publish_bundle,
    publish_operator,
    second_operator,
    sign_next_bundle,
)
from ringfence.client.admin.user_keys import prove
from ringfence.client.errors import ProposedError
from ringfence.dev.stack import Stack
from ringfence.messages.trust import SecondPersonMode
from tests.brokers import RedisServer
from tests.conftest import Kafka
from tests.console.conftest import Visitor
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation, enrolled
from tests.support.sign_page import Site
from tests.support.stack import RunningStack, now_s, options_of_stack, realm_in


@pytest.fixture
def stack_of_two(kafka: Kafka, redis_server: RedisServer) -> Iterator[Stack]:
    """A stack of one test, whose trust bundle requires a second person later on."""
    with tempfile.TemporaryDirectory(prefix="ringfence-second-person-") as folder:
        options = options_of_stack(
            Path(folder),
            kafka,
            redis_server,
            f"second-{uuid.uuid4().hex[:8]}",
            services=(*SERVICE_ROLES, "console"),
            sign_page=True,
        )
        with Stack(options) as running:
            yield running


@pytest.fixture
async def two_people(
    stack_of_two: Stack, person: Person, tmp_path: Path
) -> AsyncIterator[tuple[RunningStack, Visitor]]:
    """A realm with a second operator by the root's word, who adds a passkey; from now on, what widens needs both."""
    site = Site(stack_of_two.origins["sign"], stack_of_two.origins["session"], stack_of_two.environment())
    trust = stack_of_two.trust
    async with realm_in(stack_of_two) as realm, Organisation(realm, site.environment, tmp_path) as people:
        otto, key, package = realm.name("otto"), tmp_path / "otto.json", tmp_path / "package.json"
        invited = await people.run("user", "invite", otto, identity=trust.root_key)
        invitation = (await invited.result())["invitation"]
        realm.key("user", otto).save(key)
        proven = prove(realm.key("user", otto), invitation, now_s())
        await publish_operator(trust, realm.settings, second_operator(trust, proven, "Otto"))
        own = await people.run("user", "invite", otto, identity=key)
        page = await person.open((await own.result())["link"])
        package.write_text(json.dumps(await enrolled(page)))
        added = await people.run("user", "add-key", otto, "--package", str(package), "--yes", identity=key)
        await added.result()
        root, bundle = load_root_and_bundle(trust)
        required = SecondPersonMode(mode="required", not_before=now_s())
        modes = (*bundle.second_person, required)
        published = sign_next_bundle(trust, bundle, root, now_s(), second_person=modes)
        await publish_bundle(trust, realm.settings)
        await until_read(f"{stack_of_two.url('registry')}/readyz", published.version)
        yield realm, Visitor(person, otto, site)
    assert person.complaints == []


async def until_read(probe: str, version: int) -> None:
    """Wait until a service follows a version of the trust bundle."""
    async with httpx.AsyncClient() as http, asyncio.timeout(60):
        while (await http.get(probe)).json().get("trust_bundle") != version:
            await asyncio.sleep(0.05)


async def proposed(command: Awaitable[Any]) -> None:
    """Give a command that widens, and see that it waits."""
    with pytest.raises(ProposedError):
        await command


async def test_wider_ceiling_takes_effect_with_the_second_operators_touch(
    two_people: tuple[RunningStack, Visitor],
) -> None:
    realm, otto = two_people
    wider = realm.permission(["deploy"], "env/production/web")
    async with realm.as_operator() as olga:
        agent = (await olga.directory()).agent(realm.agent)
        assert agent is not None
        await proposed(olga.set_ceiling(realm.agent, [*agent.state.ceiling, wider]))
        page = await otto.sign_in("/proposals")
        card = page.locator("article.card")
        await expect(card).to_contain_text("env/production/web")
        await expect(card).to_contain_text("yours to second")
        await otto.asks("Second it")
        await expect(page.locator("dl")).to_contain_text("(new, or written anew)")
        before = (await olga.directory()).agent(realm.agent)
        assert before is not None
        assert wider not in before.state.ceiling
        await page.get_by_role("button", name="Second it").click()
        await page.wait_for_url(f"{otto.site.session}/**")
        await expect(page.locator("#none")).to_be_visible()
        after = (await olga.directory()).agent(realm.agent)
        assert after is not None
        assert after.state.ceiling[-1] == wider


async def test_users_of_a_list_are_seconded_with_one_touch(
    two_people: tuple[RunningStack, Visitor],
) -> None:
    realm, otto = two_people
    names = [realm.name(one) for one in ("uma", "ulf", "una")]
    async with realm.as_operator() as olga:
        for name in names:
            await proposed(olga.set_user(name, name=name.title(), roles=["sponsor"]))
        page = await otto.sign_in("/proposals")
        await otto.asks("Second 3 users and keys together")
        for name in names:
            await expect(page.locator("dl")).to_contain_text(f"there is no user {name}")
        await page.get_by_role("button", name="Second all 3").click()
        await page.wait_for_url(f"{otto.site.session}/**")
        await expect(page.locator("#none")).to_be_visible()
        directory = await olga.directory()
        roles = [found.state.roles for name in names if (found := directory.user(name))]
        assert roles == [("sponsor",)] * len(names)
