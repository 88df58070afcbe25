"""Pages as HTML. All text is made visible and escaped as it is written: templates cannot forget it.

Digests of what pages show, from what services answered. One look serves all streams of a session at the same page.

Pages are not rendered for it: rendering one long page takes longer than asking for what is on it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Iterable
from functools import cache
from typing import Any, Final, NamedTuple
from urllib.parse import quote

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ringfence.console.assets import STYLE, assets
from ringfence.console.views.page import Page
from ringfence.kernel.base.clock import END_OF_TIME, utc_text
from ringfence.kernel.base.replay_memory import BoundedDict
from ringfence.kernel.base.text import visible_lines, visible_name

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


_MAX_SCOPE_CHARS: Final = 1000


def render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("ringfence.console"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        # Texts of agents may hide characters, or turn the direction of what follows: as at the terminal, none do.
        finalize=_shown,
    )
    made.filters |= {
        "name": lambda text: escape(visible_name(str(text))),  # marked once: `finalize` leaves it as it is
        "beginning": beginning,
        "resources": lambda scope: sum(len(_permission(one)["resources"]) for one in scope),
        "segment": lambda text: quote(str(text), safe=""),
        "until": _until,
        "within": lambda seconds: _time(seconds, Markup('data-until="{}" data-within').format(int(seconds))),
        "when": _when,
        "at": _at,
        "span": span,
        "prose": _prose,
        "plural": lambda count, one, many=None: f"{count:,} {one if count == 1 else many or one + 's'}",
    }
    made.globals |= {"assets": assets(), "style": Markup(assets()[STYLE].content.decode())}  # noqa: S704 - a file of this package
    return made


def _shown(value: Any) -> Any:
    if isinstance(value, Markup):
        return value
    if isinstance(value, str):
        return visible_lines(value)
    return "" if value is None else value


def _prose(text: Any) -> Markup:
    """Somebody's words. Characters that are hidden, or turn the direction of text, are written out and marked."""
    marked = Markup('<mark title="hidden character">{}</mark>')
    return Markup().join(
        one if (shown := visible_lines(one)) == one else marked.format(shown) for one in str(text)
    )


def beginning(scope: Iterable[Any]) -> list[dict[str, Any]]:
    """So much of a scope as a list shows of it, beside others. Permissions are messages, or JSON of services."""
    left = _MAX_SCOPE_CHARS
    shown: list[dict[str, Any]] = []
    for one in map(_permission, scope):
        resources: list[str] = []
        for resource in one["resources"]:
            left -= len(resource)
            if left < 0 and (shown or resources):
                break
            resources.append(resource)
        if resources:
            shown.append({**one, "resources": resources})
        if len(resources) < len(one["resources"]):
            break
    return shown


def _permission(one: Any) -> dict[str, Any]:
    return one if isinstance(one, dict) else one.model_dump()


def span(seconds: float) -> str:
    """A duration for people, as `2 h 5 min`."""
    left = int(seconds)
    if left < 60:
        return f"{left} s"
    if left < 3600:
        return f"{left // 60} min" + (f" {left % 60} s" if left % 60 and left < 600 else "")
    if left < 2 * 86_400:
        return f"{left // 3600} h" + (f" {left % 3600 // 60} min" if left % 3600 // 60 else "")
    return f"{left // 86_400} days"


def _time(seconds: float, attributes: Markup) -> Markup:
    text = utc_text(seconds, "%Y-%m-%d %H:%M:%S UTC")
    if text == END_OF_TIME:  # browsers know no such date
        return Markup("<span>{}</span>").format(text)
    iso = utc_text(seconds, "%Y-%m-%dT%H:%M:%S+00:00")
    return Markup('<time datetime="{}" {} title="{}">{}</time>').format(iso, attributes, text, text)


def _until(seconds: float) -> Markup:
    """A moment that a script counts down to."""
    return _time(seconds, Markup('data-until="{}"').format(int(seconds)))


def _when(millis: float | None) -> Markup:
    """A moment of the past, in milliseconds since 1970, in the reader's own time zone by a script."""
    if millis is None:
        return Markup("never")
    return _time(millis / 1000, Markup('data-at="{}"').format(int(millis)))


def _at(millis: float) -> Markup:
    """A moment in milliseconds since 1970, to the second: in the reader's own time zone by a script."""
    return _time(millis / 1000, Markup('data-at="{}" data-exact').format(int(millis)))
