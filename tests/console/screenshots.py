"""Pictures of the console: `python -m tests.console.screenshots FOLDER [--png]`.

Without `--png` those that the pages show, as WebP; with it every page, whole, in both themes and at two widths. Starts
a stack, has something happen there, and signs in with a virtual authenticator.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import tempfile
from pathlib import Path
from typing import Final

from playwright.async_api import CDPSession, Page, expect

from ringfence.client.admin.trust_setup import SERVICE_ROLES
from ringfence.dev.stack import Stack, StackOptions
from tests.console.conftest import Visitor
from tests.console.showcase import showcase
from tests.passkeys.browser import Person, chromium
from tests.support.sign_page import Site, frozen_bundle

PATHS: Final = {
    "approvals": "/approvals",
    "approval": "/approvals/{request}",
    "grants": "/grants",
    "agents": "/agents",
    "agent": "/agents/{agent}",
    "leases": "/leases",
    "lease": "/leases/{lease}",
    "tasks": "/tasks",
    "task": "/tasks/{task}",
    "audit": "/audit",
    "trace": "/trace/{lease}",
    "gateway": "/gateway?since=24h",
    "usage": "/usage",
    "findings": "/findings",
    "coverage": "/coverage",
}
SIZES: Final = {"wide": (1440, 900), "narrow": (360, 740)}
SCHEMES: Final = ("light", "dark")
IN_DOCS: Final = frozenset({
    "approvals-wide-light", "approvals-wide-dark", "approvals-narrow-light", "agents-wide-light", "agent-wide-light",
    "leases-wide-light", "audit-wide-light", "trace-wide-light", "gateway-wide-light", "findings-wide-light",
    "sign-wide-light", "sign-narrow-light",
})  # fmt: skip
_QUALITY: Final = 60
_SESSIONS: Final[dict[Page, CDPSession]] = {}


async def pictures(stack: Stack, folder: Path, *, png: bool) -> None:
    """Take them all."""
    site = Site(stack.origins["sign"], stack.origins["session"], stack.environment())
    with tempfile.TemporaryDirectory() as files:
        async with chromium() as browser:
            person = await Person.at(browser)
            async with showcase(stack, person, site.environment, Path(files)) as made:
                visitor = Visitor(person, made.user_id, site)
                page = await visitor.open("/approvals")
                await _sized(page, "wide", "light")
                await _take(page, folder, "sign-in-wide-light", png=png)
                await _sized(page, "wide", "dark")
                await _take(page, folder, "sign-in-wide-dark", png=png)
                await visitor.sign_in("/approvals")
                # The actions of a day are counted before anything is pictured.
                await visitor.open("/gateway?since=24h")
                await expect(page.locator("#blocked")).to_have_text("200", timeout=60_000)
                await visitor.open("/approvals")
                await expect(page.locator("article.request")).to_have_count(2)
                link = await page.locator("article .requestline a").first.get_attribute("href")
                ids = {**made.ids, "request": str(link).rpartition("/")[2]}
                for name, path in PATHS.items():
                    await visitor.open(path.format(**ids))
                    await expect(page.locator("#live-state")).to_have_text("Live")
                    for size in SIZES:
                        for scheme in SCHEMES:
                            await _sized(page, size, scheme)
                            await _take(page, folder, f"{name}-{size}-{scheme}", png=png)
                await visitor.open("/approvals")
                await visitor.asks("Approve", within="article.request >> nth=0")
                for size in SIZES:
                    for scheme in SCHEMES:
                        await _sized(page, size, scheme)
                        await _take(page, folder, f"sign-{size}-{scheme}", png=png)
            if complaints := [one for one in person.complaints if "404" not in one]:
                raise SystemExit("\n".join(complaints))
            await person.leave()


async def _sized(page: Page, size: str, scheme: str) -> None:
    width, height = SIZES[size]
    await page.set_viewport_size({"width": width, "height": height})
    await page.emulate_media(color_scheme="dark" if scheme == "dark" else "light", reduced_motion="reduce")


async def _take(page: Page, folder: Path, name: str, *, png: bool) -> None:
    if not png and name not in IN_DOCS:
        return
    await page.evaluate("scrollTo(0, 0)")
    if png:
        await page.screenshot(path=folder / f"{name}.png", full_page=True)
        return
    # A page of its own would not be signed in, and a session that is detached takes the authenticator along.
    session = _SESSIONS.get(page) or _SESSIONS.setdefault(page, await page.context.new_cdp_session(page))
    taken = await session.send("Page.captureScreenshot", {"format": "webp", "quality": _QUALITY})
    (folder / f"{name}.webp").write_bytes(base64.b64decode(taken["data"]))


def main() -> None:
    """Take pictures on a fresh stack."""
    parser = argparse.ArgumentParser(prog="python -m tests.console.screenshots", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--png", action="store_true", help="every page, whole and without loss: to look at")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="ringfence-pictures-") as folder:
        bundle = frozen_bundle(Path(folder))
        stack = StackOptions(
            Path(folder) / "state", trust_domain="acme.example", services=(*SERVICE_ROLES, "console"),
            sign_page=True, environment={"RINGFENCE_POLICY_BUNDLE": str(bundle)},
        )  # fmt: skip
        with Stack(stack) as running:
            asyncio.run(pictures(running, options.folder, png=options.png))


if __name__ == "__main__":
    main()
