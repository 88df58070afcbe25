"""The sign page on small screens, in the dark, by the keyboard alone, and for screen readers."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from playwright.async_api import Page, expect

from tests.passkeys.browser import Person
from tests.passkeys.questions import Asked

CONTRASTS = """() => {
  const rgb = (text) => text.match(/[0-9.]+/g).map(Number);
  const light = (colour) => {
    const [r, g, b] = rgb(colour).slice(0, 3).map((one) => one / 255)
      .map((one) => one <= 0.03928 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    const colour = getComputedStyle(node).backgroundColor;
    return rgb(colour)[3] === 0 ? ground(node.parentElement) : colour;
  };
  const found = {};
  const kinds = "h1, p, dt, dd, button, summary, header span, label, legend, pre, textarea";
  for (const node of document.querySelectorAll(kinds)) {
    const [one, other] = [light(getComputedStyle(node).color), light(ground(node))].sort();
    found[node.tagName + "." + node.className] = (other + 0.05) / (one + 0.05);
  }
  return found;
}"""
"""By kind of element, the contrast of its text with its ground (WCAG 2.2, 1.4.3)."""


async def overflow(page: Page) -> list[Any]:
    """The elements that reach beyond the screen."""
    return list(
        await page.evaluate(
            "() => [...document.querySelectorAll('*')]"
            ".filter((one) => one.getBoundingClientRect().right > innerWidth + 1)"
            ".map((one) => one.outerHTML.slice(0, 80))"
        )
    )


async def test_page_fits_a_small_phone(asked: Asked, person: Person) -> None:
    await person.page.set_viewport_size({"width": 360, "height": 740})
    page = await person.open(asked.link(asked.question()))
    await expect(page.get_by_role("button", name="Approve")).to_be_visible()
    await page.get_by_text("Exactly what is signed").click()
    assert await overflow(page) == []
    for button in await page.get_by_role("button").all():
        box = await button.bounding_box()
        assert box is not None
        assert box["height"] >= 44
    assert await page.locator("textarea").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_text_can_be_read(asked: Asked, person: Person, scheme: Literal["light", "dark"]) -> None:
    await person.page.emulate_media(color_scheme=scheme)
    page = await person.open(asked.link(asked.question()))
    await expect(page.get_by_role("button", name="Approve")).to_be_visible()
    dim = {name: ratio for name, ratio in (await page.evaluate(CONTRASTS)).items() if ratio < 4.5}
    assert dim == {}
    ground = await page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (ground == "rgb(18, 20, 23)") == (scheme == "dark")


async def test_the_keyboard_alone_is_enough(asked: Asked, person: Person) -> None:
    page = await person.open(asked.link(asked.question()))
    await expect(page.get_by_role("heading", level=1)).to_be_focused()
    reached = []
    for _ in range(4):
        await page.keyboard.press("Tab")
        reached.append(await page.evaluate("document.activeElement.textContent"))
        outline = await page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert outline == "solid", reached
        if reached[-1] == "Exactly what is signed":
            break
    assert reached == ["Approve", "Sign nothing", "Exactly what is signed"]
    await page.keyboard.press("Enter")
    await expect(page.locator("pre")).to_be_visible()


async def test_without_a_link_a_question_is_pasted(asked: Asked, person: Person) -> None:
    page = await person.open(asked.sign_origin)
    await page.get_by_label("Question").fill(asked.text)
    await page.get_by_role("button", name="Look at it").click()
    await expect(page.get_by_role("button", name="Approve")).to_be_visible()
    page = await person.open(asked.sign_origin)
    await page.get_by_label("Question").fill(asked.text[:-1])
    await page.get_by_role("button", name="Look at it").click()
    await expect(page.get_by_role("alert")).to_contain_text("JSON")
