"""Every page: nothing that violates its policy, nothing wider than the screen, nothing that axe-core calls serious."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator

import pytest
from playwright.async_api import Browser, Page, expect

from ringfence.console.views.pages import PAGES
from ringfence.dev.stack import Stack
from tests.console.axe import serious_problems
from tests.console.conftest import Visitor
from tests.console.showcase import showcase
from tests.console.test_approvals import HOSTILE
from tests.passkeys.browser import Person
from tests.support.sign_page import Site

PATHS = (
    "/approvals", "/approvals?show=others", "/approvals/{request}", "/grants", "/grants?show=all", "/agents",
    "/agents/{agent}", "/agents/night-bot", "/agents/nobody", "/offers/{offer}", "/leases", "/leases/{lease}",
    "/tasks", "/tasks?status=all", "/tasks/{task}", "/audit", "/trace/{lease}", "/gateway", "/findings", "/coverage",
)  # fmt: skip
LivedIn = tuple[Visitor, dict[str, str]]


@pytest.fixture(scope="module")
async def lived_in(
    stack: Stack, site: Site, browser: Browser, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[LivedIn]:
    """Somebody signed in where something of everything happened, and where agents and people say odd things."""
    person = await Person.at(browser)
    dialogs: list[str] = []
    person.page.on("dialog", lambda dialog: dialogs.append(dialog.message))
    async with showcase(stack, person, site.environment, tmp_path_factory.mktemp("pages"), HOSTILE) as made:
        visitor = Visitor(person, made.user_id, site)
        page = await visitor.sign_in("/approvals")
        await expect(page.locator("article.request")).to_have_count(3)
        await expect(page.get_by_text("3 alike")).to_be_visible()
        alike = page.locator("article.request", has_text="deploy build")
        href = await alike.locator(".requestline a").first.get_attribute("href")
        await visitor.open("/agents/deploy-bot")
        await page.get_by_text("Transfer it to another sponsor").click()
        await page.get_by_role("button", name="Offer it to somebody").click()
        await page.wait_for_url("**/offers/**")
        more = {"request": str(href).rpartition("/")[2], "offer": page.url.rpartition("/")[2]}
        yield visitor, {**made.ids, **more}
    assert [one for one in person.complaints if "404" not in one] == []
    assert dialogs == []
    await person.leave()


def test_every_page_is_looked_at() -> None:
    assert set(PAGES) <= {re.sub(r"\{\w+\}", "{id}", path.partition("?")[0]) for path in PATHS}


@pytest.mark.parametrize("path", PATHS)
async def test_a_page_is_in_order(lived_in: LivedIn, path: str) -> None:
    visitor, ids = lived_in
    page = await visitor.open(path.format(**ids))
    await expect(page.get_by_role("heading", level=1)).to_be_visible()
    await in_order(page)


async def test_the_sign_in_is_in_order(person: Person, site: Site) -> None:
    page = await Visitor(person, "nobody", site).open("/sign-in?ended=1")
    await expect(page.get_by_text("Your session ended")).to_be_visible()
    await in_order(page)
    assert person.complaints == []


async def in_order(page: Page) -> None:
    """It fits both widths and axe-core finds nothing serious, in both themes; also with all forms open."""
    await page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    for width in (360, 1440):
        await page.set_viewport_size({"width": width, "height": 900})
        for scheme in ("light", "dark"):
            await page.emulate_media(color_scheme=scheme)
            assert await page.evaluate("document.documentElement.scrollWidth") <= width
            assert await serious_problems(page) == []


async def test_pages_show_what_there_is(lived_in: LivedIn) -> None:
    visitor, ids = lived_in
    page = await visitor.open("/leases?agent=deploy-bot")
    await expect(page.get_by_role("link", name=ids["lease"][:8])).to_be_visible()
    await expect(page.locator("tbody time[data-until]").first).to_have_text(re.compile(r"^in \d+ min"))
    await expect(page.locator("#ends svg")).to_be_visible()
    page = await visitor.open("/tasks")
    await expect(page.get_by_role("row").filter(has_text="release 4.2")).to_have_count(1)
    page = await visitor.open(f"/trace/{ids['lease']}")
    await expect(page.locator("#people")).to_contain_text("maria")
    await expect(page.locator("#timeline")).to_contain_text("decision")
    await expect(page.locator("#timeline details")).not_to_have_count(0)
    page = await visitor.open(f"/audit?agent={ids['agent']}&code=credential.issued&lease={ids['lease']}")
    await expect(page.locator("tbody tr")).to_have_count(1)
    page = await visitor.open("/coverage")
    await expect(page.locator("#survey")).to_contain_text("Standing privileges?")
    await expect(page.locator("#shares")).to_contain_text("100.0 %")
    page = await visitor.open("/approvals")
    unusual = page.locator("article", has_text="the release of today")
    await expect(unusual).to_contain_text("Wider than what was approved before.")
    await expect(page.locator("article", has_text="deploy build")).to_contain_text("As usual")
    page = await visitor.open("/agents?orphans=1")
    orphan = page.get_by_role("row").filter(has_text="support-bot")
    await expect(orphan).to_contain_text("disabled")
    page = await visitor.open("/agents?agent=night-bot")
    await expect(page.get_by_role("row").filter(has_text="night-bot")).to_contain_text("suspended")


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
