"""What a keyboard reaches on a page: the order of focus, whether it can be seen, and the way to one control."""

from __future__ import annotations

from typing import Any, Final

from playwright.async_api import Locator, Page

_MOST_STOPS: Final = 400
_CONTROLS: Final = """
    window.controls = () => [...document.querySelectorAll(
        'a[href], button, input:not([type=hidden]), select, textarea, summary, [tabindex="0"]',
    )].filter((one) => !one.disabled && one.checkVisibility({visibilityProperty: true}));
    window.named = (one) => one === null || one === document.body ? null : [
        one.localName, one.id, one.getAttribute('name'), one.getAttribute('href'),
        (one.getAttribute('aria-label') || one.textContent || '').trim().slice(0, 40),
    ].filter(Boolean).join(' ');
"""
_STOP: Final = """() => {
    const one = document.activeElement;
    if (one === null || one === document.body || one === document.documentElement) return null;
    const box = one.getClientRects()[0] ?? one.getBoundingClientRect(), style = getComputedStyle(one), faults = [];
    if (style.outlineStyle === 'none' || parseFloat(style.outlineWidth) < 2) faults.push('no outline');
    // Of what is larger than the screen, a part.
    const x = (Math.max(box.left, 0) + Math.min(box.right, innerWidth)) / 2;
    const y = (Math.max(box.top, 0) + Math.min(box.bottom, innerHeight)) / 2;
    if (box.right < x || box.left > x || box.bottom < y || box.top > y) faults.push('outside of the screen');
    else {
        const top = document.elementFromPoint(x, y);
        if (top === null || !(one.contains(top) || top.contains(one))) faults.push(`covered by ${window.named(top)}`);
    }
    for (let above = one.parentElement; above !== null && above !== document.body; above = above.parentElement) {
        if (getComputedStyle(above).overflowX === 'visible') continue;
        const frame = above.getBoundingClientRect();
        if (box.left < frame.left + 1 || box.top < frame.top + 1) faults.push('its outline is cut off');
    }
    return {place: window.controls().indexOf(one), name: window.named(one), faults};
}"""


async def stops(page: Page, key: str = "Tab") -> list[dict[str, Any]]:
    """Where the focus stops from one end of the page to the other: `{place, name, faults}`.

    `place`: its number among the controls of the page in the order of the document, -1 if it is none.
    """
    await page.evaluate(_CONTROLS)
    await page.evaluate("document.activeElement?.blur(); getSelection().removeAllRanges()")
    found: list[dict[str, Any]] = []
    while len(found) < _MOST_STOPS:
        await page.keyboard.press(key)
        stop = await page.evaluate(_STOP)
        if stop is None or (
            found and stop["place"] == found[0]["place"]
        ):  # with no browser around it, it begins anew
            return found
        found.append(stop)
    raise AssertionError(f"the focus does not leave the page: {[one['name'] for one in found[-5:]]}")


async def controls(page: Page) -> list[str]:
    """The names of all that can be used, in the order of the document."""
    await page.evaluate(_CONTROLS)
    names: list[str] = await page.evaluate("window.controls().map(window.named)")
    return names


async def tab_to(page: Page, control: Locator) -> None:
    """Press Tab until a control has the focus."""
    for _ in range(_MOST_STOPS):
        await page.keyboard.press("Tab")
        if await control.evaluate("(one) => one === document.activeElement"):
            return
    raise AssertionError(f"Tab does not lead to {control}")
