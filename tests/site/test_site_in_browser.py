"""The site as a reader's browser shows it: no request leaves the machine, nothing sticks out, the search finds."""

from __future__ import annotations

from pathlib import Path

import pytest
from playwright.async_api import Browser, expect
from playwright.async_api import TimeoutError as PlaywrightTimeoutError

WIDTHS = (390, 1300)
FITS = "document.documentElement.scrollWidth <= window.innerWidth"


@pytest.mark.timeout(600)
async def test_every_page_fits_and_asks_nobody_else(browser: Browser, site: Path, address: str) -> None:
    page = await browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    too_wide = []
    pages = [one.relative_to(site) for one in site.rglob("*.html") if "repository" not in one.parts]
    for one in sorted(pages):
        await page.goto(f"{address}/{one}", wait_until="load")
        for width in WIDTHS:
            await page.set_viewport_size({"width": width, "height": 900})
            try:
                # The theme's script lays parts out anew after the width has changed.
                await page.wait_for_function(FITS, timeout=5000)
            except PlaywrightTimeoutError:
                too_wide.append((str(one), width))
    await page.close()
    assert len(asked) > len(pages)
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()
    assert too_wide == []


async def test_the_search_finds_a_page_without_another_host(browser: Browser, address: str) -> None:
    page = await browser.new_page(viewport={"width": 1300, "height": 900})
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    await page.goto(f"{address}/index.html")
    await page.get_by_placeholder("Search").fill("kill switch")
    result = page.locator(".md-search-result__item a").first
    await expect(result).to_be_visible()
    await result.click()
    await expect(page.locator("article")).to_contain_text("kill switch", ignore_case=True)
    await page.close()
    assert {url for url in asked if not url.startswith((address, "data:", "blob:"))} == set()


async def test_tabs_lead_to_every_kind_of_reader(browser: Browser, address: str) -> None:
    page = await browser.new_page(viewport={"width": 1300, "height": 900})
    await page.goto(f"{address}/index.html")
    tabs = page.locator(".md-tabs__link")
    assert [text.strip() for text in await tabs.all_inner_texts()] == [
        "Start", "Agent developers", "Sponsors", "Operators",
        "Security and audit", "Contributors", "Concepts", "Reference",
    ]  # fmt: skip
    await page.close()
