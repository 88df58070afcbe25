"""Every page: nothing that violates its policy, nothing wider than the screen, nothing that axe-core calls serious."""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from playwright.async_api import Browser, Page, expect

from ringfence.cli.commands.dev import client_settings
from ringfence.dev.stack import Stack
from tests.console.axe import serious_problems
from tests.console.conftest import Visitor
from tests.console.test_approvals import HOSTILE, ask
from tests.passkeys.browser import Person
from tests.passkeys.organisation import Organisation
from tests.support.sign_page import Site
from tests.support.stack import RunningStack

SCREENSHOTS = os.environ.get("RINGFENCE_TEST_SCREENSHOTS")
"""A folder for pictures of every page, for people to look at."""
PATHS = (
    "/approvals", "/approvals/{request}", "/grants", "/agents", "/agents/{agent}", "/leases", "/leases/{lease}",
    "/tasks", "/tasks/{task}", "/audit", "/trace/{lease}", "/gateway", "/findings", "/coverage", "/agents/nobody",
)  # fmt: skip


LivedIn = tuple[Visitor, dict[str, str]]


@pytest.fixture(scope="module")
async def lived_in(
    stack: Stack, site: Site, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LivedIn]:
    """Somebody signed in where something happened: a lease, a request that waits, and a hostile reason."""
    person = await Person.at(browser)
    realm = await RunningStack(stack, client_settings(stack.environment())).make()
    async with Organisation(realm, site.environment, tmp_path_factory.mktemp("pages")) as organisation:
        visitor = Visitor(person, await organisation.sponsor(person), site)
        async with realm.as_agent() as agent:
            lease = await realm.read(agent)
            waiting = [
                asyncio.create_task(ask(organisation, agent, reason)) for reason in ("to deploy", HOSTILE)
            ]
            page = await visitor.sign_in("/approvals")
            await expect(page.locator("article")).to_have_count(1)
            href = await page.locator("article .requestline a").first.get_attribute("href")
            ids = {
                "request": str(href).rpartition("/")[2], "agent": realm.agent, "lease": lease.lease_id,
                "task": realm.task,
            }  # fmt: skip
            await expect(page.get_by_text("2 alike")).to_be_visible()
            yield visitor, ids
            for one in waiting:
                one.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
    assert [one for one in person.complaints if "404" not in one] == []
    await person.leave()


@pytest.mark.parametrize("path", PATHS)
async def test_a_page_is_in_order(lived_in: LivedIn, path: str) -> None:
    visitor, ids = lived_in
    page = await visitor.open(path.format(**ids))
    await expect(page.get_by_role("heading", level=1)).to_be_visible()
    for width in (360, 1440):
        await page.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
            assert await serious_problems(page) == []
            await _picture(page, path, width, scheme)


async def test_pages_show_what_there_is(lived_in: LivedIn) -> None:
    visitor, ids = lived_in
    page = await visitor.open("/leases")
    await expect(page.get_by_role("link", name=ids["lease"][:8])).to_be_visible()
    await expect(page.locator("tbody time[data-until]").first).to_have_text(re.compile(r"^in \d+ min"))
    page = await visitor.open("/tasks")
    await expect(page.get_by_role("row").filter(has_text="a test")).to_have_count(1)
    page = await visitor.open(f"/trace/{ids['lease']}")
    await expect(page.locator("#people")).to_contain_text("maria")
    await expect(page.locator("#timeline")).to_contain_text("decision")
    page = await visitor.open(f"/audit?agent={ids['agent']}&code=credential.issued")
    await expect(page.locator("tbody tr")).to_have_count(1)
    page = await visitor.open("/coverage")
    await expect(page.locator("#survey")).to_contain_text("Standing privileges?")
    await expect(page.locator("#shares")).to_contain_text("100.0 %")


async def test_a_page_works_by_keyboard_alone(lived_in: LivedIn) -> None:
    visitor, ids = lived_in
    page = await visitor.open(f"/agents/{ids['agent']}")
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    await page.keyboard.press("Enter")
    for _ in range(30):
        await page.keyboard.press("Tab")
        if await page.evaluate("document.activeElement?.matches('#actions summary')"):
            break
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    await page.keyboard.type("it behaves oddly")
    await page.keyboard.press("Tab")
    await page.keyboard.press("Enter")
    await expect(page.get_by_role("heading", level=1)).to_have_text(f"Suspend {ids['agent']}")
    # On the sign page too: past the first button, which signs, to the one that does not.
    for _ in range(10):
        await page.keyboard.press("Tab")
        if await page.evaluate("document.activeElement?.textContent") == "Sign nothing":
            break
    await page.keyboard.press("Enter")
    await expect(page.locator("#notice")).to_have_text(f"Not signed: suspend agent {ids['agent']}")
    assert page.url == visitor.url(f"/agents/{ids['agent']}")


async def _picture(page: Page, path: str, width: int, scheme: str) -> None:
    if SCREENSHOTS:
        name = re.sub(r"\W+", "-", path).strip("-") or "home"
        await page.screenshot(path=Path(SCREENSHOTS) / f"{name}-{width}-{scheme}.png", full_page=True)
