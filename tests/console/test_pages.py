"""Every page: nothing that violates its policy, nothing wider than the screen, nothing that axe-core calls serious."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator
from typing import Literal

import pytest
from playwright.async_api import Browser, Page, expect

from ringfence.console.views.pages import PAGES
from ringfence.dev.stack import Stack
from tests.console.axe import serious_problems
from tests.console.conftest import Visitor
from tests.console.keyboard import controls, stops, tab_to
from tests.console.showcase import showcase
from tests.console.test_approvals import HOSTILE
from tests.passkeys.browser import Person
from tests.support.sign_page import Site

PATHS = (
    "/approvals", "/approvals?show=others", "/approvals/{request}", "/grants", "/grants?show=all", "/proposals",
    "/agents", "/agents/{agent}", "/agents/night-bot", "/agents/nobody", "/offers/{offer}", "/leases",
    "/leases/{lease}", "/tasks", "/tasks?status=all", "/tasks/{task}", "/audit", "/trace/{lease}", "/gateway",
    "/usage", "/findings", "/coverage",
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
    await skips_to_the_content(page)
    await in_order(page)


async def test_the_sign_in_is_in_order(person: Person, site: Site) -> None:
    page = await Visitor(person, "nobody", site).open("/sign-in?ended=1")
    await expect(page.get_by_text("Your session ended")).to_be_visible()
    await in_order(page)
    assert person.complaints == []


async def skips_to_the_content(page: Page) -> None:
    """The first stop of the keyboard on a page just opened leads past what all pages have."""
    await page.keyboard.press("Tab")
    await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
    await expect(page.get_by_role("link", name="Skip to the content")).to_be_in_viewport(ratio=1)
    await page.keyboard.press("Enter")
    await page.keyboard.press("Tab")
    assert await page.evaluate("document.activeElement.closest('main, body').localName") in ("main", "body")
    assert not await page.evaluate("document.activeElement.matches('nav *, header *, .skip')")


async def in_order(page: Page) -> None:
    """It fits both widths and axe-core finds nothing serious, in both themes; also with all forms open."""
    await page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    # Colours depend on the theme alone, and what is shown on the width alone: two of the four pairs have all of both.
    pairs: tuple[tuple[int, Literal["light", "dark"]], ...] = ((360, "light"), (1440, "dark"))
    for width, scheme in pairs:
        await page.set_viewport_size({"width": width, "height": 900})
        await page.emulate_media(color_scheme=scheme)
        assert await page.evaluate("document.documentElement.scrollWidth") <= width
        assert await serious_problems(page) == []


async def test_pages_show_what_there_is(lived_in: LivedIn) -> None:
    visitor, ids = lived_in
    page = await visitor.open("/leases?agent=deploy-bot")
    await expect(page.get_by_role("link", name=ids["lease"][:8])).to_be_visible()
    await expect(page.locator("tbody time[data-until]").first).to_have_text(re.compile(r"^in \d+ (min|s)"))
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
    # What somebody wrote about the agent cannot say who its sponsor is.
    assert "pia" not in await unusual.locator("dd", has=page.locator("blockquote")).first.inner_text()
    await unusual.get_by_text("Task, agent and policy").click()
    await expect(unusual.locator("dt", has_text="Sponsor").locator("+ dd")).to_have_text("pia")
    page = await visitor.open("/agents?orphans=1")
    orphan = page.get_by_role("row").filter(has_text="support-bot")
    await expect(orphan).to_contain_text("disabled")
    page = await visitor.open("/agents?agent=night-bot")
    await expect(page.get_by_role("row").filter(has_text="night-bot")).to_contain_text("suspended")


@pytest.mark.parametrize("width", [360, 1440])
@pytest.mark.parametrize("path", PATHS)
async def test_a_keyboard_reaches_all_of_a_page_in_order_and_people_see_where(
    lived_in: LivedIn, path: str, width: int
) -> None:
    visitor, ids = lived_in
    page = await visitor.open(path.format(**ids))
    await page.set_viewport_size({"width": width, "height": 900})
    await page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
    # What is looked at here is one state of the page: it must not follow the services meanwhile.
    await page.evaluate("window.dispatchEvent(new Event('pagehide'))")
    names = await controls(page)
    assert names[0].endswith("Skip to the content")
    forth, back = await stops(page), await stops(page, "Shift+Tab")
    assert [one["name"] for one in forth] == names
    assert [one["name"] for one in back] == names[::-1]
    assert [one for one in (*forth, *back) if one["faults"]] == []


SIGNED = {
    "approve": ("/approvals", ["Approve"], "Approve"),
    "deny": ("/approvals", ["Your comment", "Deny"], "Deny"),
    "grant": ("/approvals", ["Approve ahead", "Credentials like this one", "Approve ahead"], "Approve"),
    "answer one request": ("/approvals/{request}", ["Your comment", "Approve"], "Approve"),
    "withdraw": ("/grants?show=all", ["Take it back", "Your reason", "Take it back"], "Take back"),
    "suspend": ("/agents/{agent}", ["Your reason", "Suspend the agent"], "Suspend"),
    "resume": ("/agents/night-bot", ["Resume the agent", "Your reason", "Resume the agent"], "Resume"),
    "narrow": ("/agents/{agent}", ["Narrow the ceiling to what it used", "Narrow the ceiling"], ""),
    "transfer": (
        "/agents/{agent}",
        ["Transfer it to another sponsor", "Or name the new sponsor", "without their consent", "Transfer the agent"],
        "",
    ),
    "revoke the leases of an agent": (
        "/agents/{agent}", ["Revoke all its leases", "Your reason", "Revoke all its leases"], "Revoke",
    ),
    "kill switch": (
        "/leases", ["Revoke many at once", "All leases of", "Your reason", "Revoke them all"], "Revoke",
    ),
    "revoke a lease of the list": ("/leases", ["Revoke", "Your reason", "Revoke"], "Revoke"),
    "revoke a lease": ("/leases/{lease}", ["Revoke this lease", "Your reason", "Revoke this lease"], "Revoke"),
    "end a task": ("/tasks/{task}", ["End the task", "Your reason", "End the task"], "End"),
}  # fmt: skip
"""By action: the page, the controls that lead to it, and how the title of the sign page begins."""
TYPED = {"Or name the new sponsor": "sam", "Credentials like this one": None, "All leases of": "every agent"}
"""What is typed into a control; a reason elsewhere. None: nothing."""


@pytest.mark.parametrize("action", SIGNED)
async def test_an_action_is_started_by_keyboard_alone(lived_in: LivedIn, action: str) -> None:
    """On a small screen: that the keyboard reaches all of a page is shown at both widths."""
    visitor, ids = lived_in
    path, names, title = SIGNED[action]
    page = await visitor.open(path.format(**ids))
    await page.set_viewport_size({"width": 360, "height": 900})
    live = page.locator("#live")
    if names[0] != "Your comment":
        part = (
            live.locator("details")
            .filter(has=page.locator("summary").get_by_text(names[0], exact=True))
            .first
        )
        if await part.count():
            await tab_to(page, part.locator("summary"))
            await page.keyboard.press("Space")
            names, live = names[1:], part
    for name in names[:-1]:
        field = live.get_by_label(name).first
        await tab_to(page, field)
        if await field.get_attribute("type") == "checkbox":
            await page.keyboard.press("Space")
            await expect(field).to_be_checked()
        elif (text := TYPED.get(name, "because it has to be")) is not None:
            await page.keyboard.type(text)
    await tab_to(page, live.get_by_role("button", name=names[-1], exact=True).first)
    await page.keyboard.press("Enter")
    await page.wait_for_url(f"{visitor.site.sign}/**")
    await expect(page.get_by_role("heading", level=1)).to_contain_text(title)
    # On the sign page too: past the first button, which signs, to the one that does not.
    nothing = page.get_by_role("button", name="Sign nothing")
    await expect(nothing).to_be_visible()
    await tab_to(page, nothing)
    await page.keyboard.press("Enter")
    await expect(page.locator("#notice")).to_contain_text("Not signed: ")
