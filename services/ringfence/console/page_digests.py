"""Digests of what pages show, from what services answered. One look serves all streams of a session at the same page.

Pages are not rendered for it: rendering one long page takes longer than asking for what is on it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple

from ringfence.console.views.page import Page
from ringfence.kernel.base.replay_memory import BoundedDict

_COSTLY: Final = 5
"""So much more seldom a page is looked at for which services count much."""
_MOST_PAGES: Final = 1000

PageKey = tuple[str, str]
"""The digest of a session's cookie, and path and query of a page."""


class PageDigest(NamedTuple):
    """A page as it is now."""

    digest: str
    costly: bool
    live: bool


class _Look(NamedTuple):
    began_s: float
    task: asyncio.Task[PageDigest]


def digest_of(page: Page) -> str:
    """The digest of all that a page shows."""
    return hashlib.sha256(repr((page.template, page.title, page.values)).encode()).hexdigest()


class PageDigests:
    """The latest look at each open page."""

    def __init__(self, refresh_ms: int) -> None:
        self._refresh_s = refresh_ms / 1000
        self._looks: BoundedDict[PageKey, _Look] = BoundedDict(_MOST_PAGES)

    def pause_s(self, page: PageDigest | None) -> float:
        """Seconds until a page is looked at again. None: a service did not answer."""
        return self._refresh_s * (_COSTLY if page and page.costly else 1)

    async def current(self, key: PageKey, make: Callable[[], Awaitable[Page]]) -> PageDigest:
        """A page as it is now, or was when another stream looked at it just before. Raises ApiError."""
        look = self._looks.get(key)
        if look is None or not self._is_fresh(look):
            task = asyncio.create_task(_made(make), name="look")
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            look = self._looks[key] = _Look(asyncio.get_running_loop().time(), task)
        return await asyncio.shield(look.task)

    def _is_fresh(self, look: _Look) -> bool:
        if not look.task.done():
            return True
        page = None if look.task.cancelled() or look.task.exception() else look.task.result()
        return asyncio.get_running_loop().time() - look.began_s < self.pause_s(page)


async def _made(make: Callable[[], Awaitable[Page]]) -> PageDigest:
    page = await make()
    return PageDigest(digest_of(page), page.costly, page.live)
