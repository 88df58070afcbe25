"""What every page has."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ringfence.console.offers import Offers
from ringfence.console.reads import SessionReads
from ringfence.console.security import Session


@dataclass(frozen=True, slots=True)
class View:
    """A request for a page: who looks, at what."""

    session: Session
    reads: SessionReads
    query: Mapping[str, str]
    now_ms: int
    id: str
    """The last part of the path, of pages about one thing; else empty."""
    offers: Offers


@dataclass(frozen=True, slots=True)
class Page:
    """What a page shows. All of it comes from services, for this person."""

    template: str
    title: str
    values: dict[str, Any] = field(default_factory=dict)
    section: str = ""
    """The entry of the navigation that it belongs to."""
    costly: bool = False
    """Whether services count much for it, so that it is compared with the present less often."""
    live: bool = True
    """True if the page follows the services by server-sent events."""


MakePage = Callable[[View], Awaitable[Page]]
"""Raises ApiError if a service refuses or does not answer."""
